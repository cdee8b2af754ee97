"""Contributions that are kept slot by slot, until it is known what of them is in a round.

Part of `treefold.server.core` in a file of its own; just as pure. Effects are appended to the
core's list.
"""

from treefold.common.round_state import decode_progress
from treefold.common.tree import Node, span
from treefold.server.effects import Effect, ReleasePayload
from treefold.server.holding import Shard
from treefold.server.rounds import Arrived, Leaf, Round
from treefold.wire.exchange import Peer, Send
from treefold.wire.membership import Membership
from treefold.wire.messages import Push, Refused, RoundMeta
from treefold.wire.words import Code


class Gathering:
    """Contributions to rounds that are folded when it is decided what is in.

    Parameters
    ----------
    membership : Membership
        Who this server is.
    out : list of Effect
        The core's effects.

    Attributes
    ----------
    late : int
        Parts of contributions that came when their round had gone on.
    """

    def __init__(self, membership: Membership, out: list[Effect]) -> None:
        self.late = 0
        self._membership = membership
        self._out = out

    def on_push(self, peer: Peer, shard: Shard, arrived: Arrived) -> None:
        """Take in parts of a contribution."""
        push = arrived.push
        low, high = span(Node(push.level, push.index), push.active)
        refusal = shard.refusal_of(push) or shard.out_of_turn(push.round, push.active)
        if refusal is None and high - low != 1:
            text = f"node ({push.level}, {push.index}) is not one slot; workers do not fold here"
            refusal = Refused(0, Code.BAD_NODE, text)
        leaf = self._leaf(shard, push, low) if refusal is None else None
        if leaf is None:
            self._release([*arrived.payloads])
            self._out += [] if refusal is None else [Send(peer, refusal)]
            self.late += push.count if refusal is None else 0
            return
        for number in range(push.count):
            held, part = arrived.held(number), push.part + number
            if part not in leaf.parts:
                leaf.parts[part] = held
                self._taken(shard, low, part)
            elif held.payload is not None:
                self._release([held.payload])

    def on_meta(self, peer: Peer, shard: Shard, meta: RoundMeta) -> None:
        """Take in what goes with a contribution."""
        refusal = shard.refusal_of_hyper(meta) or shard.out_of_turn(meta.round, meta.active)
        refusal = refusal or _refusal(shard, meta)
        if refusal is not None:
            self._out.append(Send(peer, refusal))
            return
        leaf = self._leaf(shard, meta, meta.slot)
        if leaf is not None and leaf.meta is None:
            leaf.meta = meta

    def _taken(self, shard: Shard, slot: int, part: int) -> None:
        """A part of a slot's contribution is here."""

    def _leaf(self, shard: Shard, message: Push | RoundMeta, slot: int) -> Leaf | None:
        """Where a slot's contribution is gathered; None if nothing can be added to it any more."""
        current = shard.round
        if current is None or message.round != current.number or not current.is_by_leaves:
            return None
        if current.included is not None and slot not in current.included:
            return None
        return current.leaves.setdefault(slot, Leaf(message.sender))

    def _release(self, payloads: list[int]) -> None:
        self._out += [ReleasePayload(payload) for payload in payloads]


def whole(shard: Shard, current: Round) -> list[int]:
    """The slots of which everything is here."""
    return sorted(s for s, leaf in current.leaves.items() if leaf.is_whole(shard.parts_count))


def _refusal(shard: Shard, meta: RoundMeta) -> Refused | None:
    """Why a contribution must not be taken, None if it may."""
    where = f"table {shard.spec.name!r} shard {shard.number} round {meta.round}"
    if meta.slot >= meta.due or meta.due > meta.active or not 0 < meta.samples <= meta.total:
        text = (
            f"{where}: slot {meta.slot} of {meta.due} due and {meta.active} active ones, with "
            f"{meta.samples} of {meta.total} samples"
        )
        return Refused(0, Code.BAD_NODE, text)
    current = shard.round
    known = current.metas() if current is not None and current.number == meta.round else ()
    of = meta.active, meta.due, meta.first, meta.is_again
    for other in known:
        if (other.active, other.due, other.first, other.is_again) != of:
            text = f"{where}: slots {other.slot} and {meta.slot} are of different data plans"
            return Refused(0, Code.SPEC_MISMATCH, text)
    if meta.is_again and shard.spec.is_quorum and meta.round == shard.version:
        again = len(decode_progress(shard.kept[shard.version].state).again)
        if meta.due > again:
            text = f"{where}: {meta.due} late batches are due, and there are {again}"
            return Refused(0, Code.SPEC_MISMATCH, text)
    return None
