"""Asynchronous tables: every contribution is applied by itself, as a round of one.

Part of `treefold.server.core` in a file of its own; just as pure. Effects are appended to the
core's list.

A contribution is named by round and slot, as in a synchronous table, and each shard applies it
once: its clocks say of every slot which rounds are in. Two workers may compute it, from different
versions; the one that is here first as a whole counts, the other is a duplicate. So leases carry no
safety here either, and a worker that dies leaves nothing to be settled.
"""

from itertools import zip_longest

import msgspec

from treefold.common.round_state import Applied
from treefold.common.spec import ConsistencyKind
from treefold.common.tree import Node, span
from treefold.server import answers
from treefold.server.checkpoints import Saves
from treefold.server.compensation import compensated
from treefold.server.effects import CorrectParts, Effect, ReleasePayload
from treefold.server.holding import Shard, Staged, Wait
from treefold.server.rounds import Arrived, HyperOf
from treefold.wire.exchange import Peer, Send
from treefold.wire.membership import MS
from treefold.wire.messages import PartMissing, Pull, Refused, RoundMeta, RoundStatus
from treefold.wire.words import INITIAL_ROUND, STALE_CLASSES, Code, Need

STAGED_MAX = 4  # contributions of one slot that are on their way at a time; the oldest has to go
LIMIT_MS = 250  # so long nothing more is applied where all shards are to be read alike
STATUS_PARTS_MAX = 64  # parts named in one RoundStatus; the worker asks again for the rest


class Asynchronous:
    """Contributions on their way to a version each.

    Parameters
    ----------
    saves : Saves
        Told of versions with which a pass over the data ends.
    out : list of Effect
        The core's effects.

    Attributes
    ----------
    duplicates : int
        Parts of contributions that were here already.
    too_stale : int
        Contributions that were let go for the table's bound.
    stale : dict of (table, worker) to list of int
        Contributions to shard 0 by class of staleness.
    sums : dict of (table, worker) to int
        The staleness of all of them together.
    slots : int
        How many slots there are, 0 until a view has said it.
    """

    def __init__(self, saves: Saves, out: list[Effect]) -> None:
        self.duplicates = self.too_stale = self.slots = 0
        self.stale: dict[tuple[int, int], list[int]] = {}
        self.sums: dict[tuple[int, int], int] = {}
        self._saves = saves
        self._out = out

    def note_slots(self, slots: int) -> None:
        """A view has leases of so many slots."""
        self.slots = max(self.slots, slots)

    # ---- contributions ------------------------------------------------------------------------

    def on_push(self, peer: Peer, shard: Shard, arrived: Arrived) -> None:
        """Take in parts of a contribution."""
        push = arrived.push
        low, high = span(Node(push.level, push.index), push.active)
        refusal = shard.refusal_of(push)
        if refusal is None and high - low != 1:
            text = f"node ({push.level}, {push.index}) is not one slot; nothing is folded here"
            refusal = Refused(0, Code.BAD_NODE, text)
        staged = self._stage(shard, push.round, low, push.sender) if refusal is None else None
        if staged is None:
            self._out += [ReleasePayload(payload) for payload in arrived.payloads]
            self._out += [] if refusal is None else [Send(peer, refusal)]
            self.duplicates += push.count if refusal is None else 0
            return
        for number in range(push.count):
            held, part = arrived.held(number), push.part + number
            if part not in staged.parts:
                staged.parts[part] = held
                continue
            self.duplicates += 1
            self._release(held.payload)

    def on_meta(self, peer: Peer, shard: Shard, meta: RoundMeta) -> None:
        """Take in what goes with a contribution."""
        refusal = shard.refusal_of_hyper(meta) or _refusal(shard, meta)
        if refusal is not None:
            self._out.append(Send(peer, refusal))
            return
        staged = self._stage(shard, meta.round, meta.slot, meta.sender)
        if staged is not None and staged.meta is None:
            staged.meta, staged.peer = meta, peer

    def _stage(self, shard: Shard, round_: int, slot: int, sender: int) -> Staged | None:
        """Where a sender's contribution is gathered; None if it is in already, or too old."""
        if round_ < shard.clock(slot):
            return None
        known = shard.staged.get((slot, sender))
        if known is not None and known.round >= round_:
            return known if known.round == round_ else None
        if 0 < self.slots <= slot:  # nobody in earnest has one; it would never be complete
            return None
        others = [key for key in shard.staged if key[0] == slot]
        if known is not None:
            self._drop(shard, (slot, sender))
        elif len(others) >= STAGED_MAX:
            self._drop(shard, others[0])
        shard.staged[slot, sender] = Staged(round_, slot, sender)
        return shard.staged[slot, sender]

    def begin(self, shard: Shard) -> None:
        """Make the next contribution that is whole the round that the shard collects."""
        current = shard.round
        if current is None or current.active or current.number == INITIAL_ROUND:
            return
        if not (shard.chain.is_primary and shard.chain.is_started and shard.is_settled):
            return
        for key, one in list(shard.staged.items()):
            if one.round < shard.clock(one.slot):  # another copy of it is in meanwhile
                self._drop(shard, key)
        chosen = self._choose(shard)
        if chosen is None or chosen.meta is None:
            return
        del shard.staged[chosen.slot, chosen.sender]
        current.open(1, shard.parts_count)
        for part in range(shard.parts_count):
            current.put(part, chosen.parts[part], chosen.sender)
        stale = _staleness(shard, chosen)
        self._count(shard, chosen.sender, stale)
        rule = shard.spec.consistency.compensation
        groups = compensated(rule, chosen.meta.groups, stale, shard.staleness.value)
        current.hyper = HyperOf(groups, 0.0)
        if rule.is_delayed:
            of = shard.table, shard.number, current.ready()
            self._out.append(CorrectParts(*of, chosen.meta.base, chosen.meta.active))
        state = msgspec.msgpack.encode(_with(shard.applied, chosen, chosen.meta))
        current.meta = msgspec.structs.replace(chosen.meta, state=state)
        current.contributed = [(chosen.round, chosen.slot, chosen.sender)]

    def _choose(self, shard: Shard) -> Staged | None:
        """The next contribution that is whole; those that are too stale are to be made again."""
        most = shard.spec.consistency.staleness_max
        for key, one in list(shard.staged.items()):
            if not one.is_whole(shard.parts_count) or shard.is_beyond(one.round, one.slot):
                continue
            if not most or _staleness(shard, one) <= most:
                return one
            self.too_stale += 1
            self._drop(shard, key)
            if one.peer is not None:
                which = shard.table, shard.number, one.round, [PartMissing(0, [one.slot])]
                word = RoundStatus(*which, is_meta_missing=False, is_stale=True)
                self._out.append(Send(one.peer, word))
        return None

    def _count(self, shard: Shard, worker: int, stale: int) -> None:
        shard.staleness.add(stale)
        if shard.number == 0:
            counts = self.stale.setdefault((shard.table, worker), [0] * STALE_CLASSES)
            counts[min(stale.bit_length(), STALE_CLASSES - 1)] += 1
            self.sums[shard.table, worker] = self.sums.get((shard.table, worker), 0) + stale

    def counts(self) -> list[tuple[int, int, list[int]]]:
        """The same for a heartbeat."""
        return [(table, worker, list(counts)) for (table, worker), counts in self.stale.items()]

    def close(self, shard: Shard) -> None:
        """Let go of what is on its way: workers send it again to whoever leads the shard then."""
        self._out += [ReleasePayload(payload) for payload in shard.unstage()]

    def _drop(self, shard: Shard, key: tuple[int, int]) -> None:
        for held in shard.staged.pop(key).parts.values():
            self._release(held.payload)

    def _release(self, payload: int | None) -> None:
        if payload is not None:
            self._out.append(ReleasePayload(payload))

    # ---- pulls --------------------------------------------------------------------------------

    def limit(self, now_ns: int, shard: Shard, need: Need | None) -> None:
        """Apply nothing beyond what somebody wants to read, or has missed already, for a moment."""
        if need is not None and need.exact:
            pairs = zip_longest(shard.applied.clocks, need.exact, fillvalue=0)
            shard.limit = [max(pair) for pair in pairs]
            shard.limited_ns = now_ns + LIMIT_MS * MS

    def on_pull(self, peer: Peer, shard: Shard, pull: Pull, parts: list[int]) -> None:
        """Answer with the newest version, or with the one that the worker has some parts of."""
        need, is_met = pull.need, _is_met(pull.need, shard.applied)
        if not shard.is_settled or not is_met:
            if not is_met or pull.version != shard.version:
                parts = list(range(shard.parts_count))
            shard.waits[peer] = Wait(0, dict.fromkeys(parts), need)
            if pull.attempt > 0 and need is not None:
                self._out.append(Send(peer, _status(shard, pull, need)))
            return
        older = shard.kept.get(pull.version) if pull.parts else None
        version = pull.version
        if older is None or not _is_met(need, older.applied):
            version, parts = shard.version, list(range(shard.parts_count))
        self._out += answers.of_version(peer, shard, version, parts)
        self._saves.end_pass(shard, need)


def _staleness(shard: Shard, staged: Staged) -> int:
    """Versions that were made since the one that a whole contribution was computed with."""
    return 0 if staged.meta is None else max(0, shard.version - staged.meta.base)


def _refusal(shard: Shard, meta: RoundMeta) -> Refused | None:
    """Why a contribution must not be applied, None if it may."""
    where = f"table {shard.spec.name!r} shard {shard.number}"
    if meta.norm_max > 0:
        text = f"{where} is asynchronous: gradients have no norm that all slots share"
        return Refused(0, Code.BAD_MESSAGE, text)
    if meta.slot >= meta.active:
        text = f"{where}: round {meta.round} has {meta.active} active slots, no slot {meta.slot}"
        return Refused(0, Code.BAD_NODE, text)
    due = max(shard.clock(meta.slot), meta.first)
    if meta.round > due:
        text = f"{where}: slot {meta.slot} is at round {due}, round {meta.round} is not its turn"
        return Refused(0, Code.FUTURE_ROUND, text)
    rule = shard.spec.consistency
    if rule.kind is not ConsistencyKind.SSP:
        return None
    last = min(range(meta.active), key=shard.clock)
    ahead = meta.round - max(shard.clock(last), meta.first)
    if ahead <= rule.staleness:
        return None
    text = (
        f"{where}: slot {meta.slot} is at round {meta.round}, {ahead} ahead of slot {last}, and at "
        f"most {rule.staleness} (staleness) are allowed"
    )
    return Refused(0, Code.FUTURE_ROUND, text)


def _is_met(need: Need | None, applied: Applied) -> bool:
    return need is None or need.is_met(applied.clocks)


def _with(applied: Applied, chosen: Staged, meta: RoundMeta) -> Applied:
    """What is in the version that a contribution makes."""
    lacking = chosen.slot + 1 - len(applied.clocks)
    clocks = [*applied.clocks, *([0] * lacking)]
    clocks[chosen.slot] = chosen.round + 1
    is_front = chosen.round > applied.front
    return Applied(
        clocks,
        (chosen.round, chosen.slot, chosen.sender),
        chosen.round if is_front else applied.front,
        meta.state if is_front else applied.record,
    )


def _status(shard: Shard, pull: Pull, need: Need) -> RoundStatus:
    """What the shard lacks of the contributions that the worker waits for."""
    if need.clock and shard.clock(need.slot) < need.clock:
        return _lacking(shard, pull.sender, need.clock - 1, [need.slot])
    owed = [] if need.clock else list(need.lacking(shard.applied.clocks))
    last = max((round_ for _, round_ in owed), default=max(need.clock - 1, 0))
    return _lacking(shard, pull.sender, last, [slot for slot, round_ in owed if round_ == last])


def _lacking(shard: Shard, sender: int, round_: int, slots: list[int]) -> RoundStatus:
    """What of some slots of a round has not come from a sender."""
    staged = {slot: shard.staged.get((slot, sender)) for slot in slots}
    known = {slot: one for slot, one in staged.items() if one is not None and one.round == round_}
    parts = {slot: one.parts for slot, one in known.items()}
    missing: list[PartMissing] = []
    for part in range(shard.parts_count):
        owing = [slot for slot in slots if slot not in parts or part not in parts[slot]]
        if owing and len(missing) < STATUS_PARTS_MAX:
            missing.append(PartMissing(part, owing))
    lacks_meta = any(slot not in known or known[slot].meta is None for slot in slots)
    return RoundStatus(shard.table, shard.number, round_, missing, lacks_meta)
