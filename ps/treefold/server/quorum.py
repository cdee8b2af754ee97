"""Rounds that go on without the last slots: what has come is folded once it is known what is in.

Part of `treefold.server.core` in a file of its own; just as pure. Effects are appended to the
core's list.

Which slots are in is decided by the scheduler, once for all shards: of those that all of them
have. Slots that are left out take part in the fold as if they had no gradient, so that the bits of
a version depend on which slots are in, and on nothing else.
"""

from fractions import Fraction

import msgspec

from treefold.common.lineup import Lineup, after
from treefold.common.round_state import decode_progress
from treefold.common.spec import Late
from treefold.common.tree import Node
from treefold.server.effects import ScaleParts
from treefold.server.gathering import Gathering, whole
from treefold.server.holding import Shard
from treefold.server.rounds import Held, HyperOf, Round
from treefold.wire.decisions import HealthDecision, QuorumDecision, QuorumReport
from treefold.wire.exchange import SCHEDULER, Send
from treefold.wire.membership import MS
from treefold.wire.messages import RoundMeta

RETRY_MS = 500  # a report that is not answered with a decision is sent again


class Quorum(Gathering):
    """Contributions to rounds that may go on without the last slots."""

    # ---- which slots are in -------------------------------------------------------------------

    def begin(self, now_ns: int, shard: Shard) -> None:
        """Tell the scheduler what is here, or fold what is in."""
        current = shard.round
        if current is None or not current.is_by_leaves or not current.leaves:
            return
        if not (shard.chain.is_primary and shard.chain.is_started):
            return
        there = whole(shard, current)
        if current.included is None:
            enough = max(1, min(shard.spec.consistency.quorum, current.due))
            if len(there) >= enough and len(there) > current.reported:
                self._report(now_ns, shard, current, there)
        elif all(slot in there for slot in current.included):
            shard.decision_retry_ns = None
            self._fold(shard, current, current.included)

    def report_again(self, now_ns: int, shard: Shard) -> bool:
        """Ask for the decision once more; False if it is known, or is not asked for."""
        current = shard.round
        if current is None or not current.is_by_leaves:
            return False
        self._report(now_ns, shard, current, whole(shard, current))
        return True

    def _report(self, now_ns: int, shard: Shard, current: Round, there: list[int]) -> None:
        current.reported = len(there)
        shard.stuck_ns = now_ns if shard.stuck_ns is None else shard.stuck_ns
        shard.decision_retry_ns = now_ns + RETRY_MS * MS
        who = self._membership.incarnation
        planned = max((meta.first for meta in current.metas()), default=0)
        of = shard.table, shard.number, current.number
        missed = decode_progress(shard.kept[shard.version].state).missed
        report = QuorumReport(who, *of, there, current.due, planned, missed)
        self._out.append(Send(SCHEDULER, report))

    def on_decision(self, shard: Shard, decision: QuorumDecision | HealthDecision) -> bool:
        """The scheduler says which slots are in; False if this is not about the shard's round."""
        current = shard.round
        if current is None or not isinstance(decision, QuorumDecision):
            return False
        if not current.is_by_leaves or current.number != decision.round:
            return False
        if current.included is None:
            current.included = decision.slots
            shard.decision_retry_ns = None
            shard.stuck_ns = None if shard.is_settled else shard.stuck_ns
            for slot in [slot for slot in current.leaves if slot not in decision.slots]:
                leaf = current.leaves.pop(slot)
                held = [one.payload for one in leaf.parts.values() if one.payload is not None]
                self.late += len(leaf.parts)
                self._release(held)
        return True

    def _fold(self, shard: Shard, current: Round, included: list[int]) -> None:
        """Fold what is in, and let the round go its way as any other."""
        leaves, current.leaves = current.leaves, {}
        metas = [meta for slot in included if (meta := leaves[slot].meta) is not None]
        first = metas[0]
        if current.active == 0:
            current.open(first.active, shard.parts_count)
        before = dict.fromkeys([*current.rooted, *current.made])
        for part, pieces in enumerate(shard.pieces):
            nothing = (1 << pieces) - 1
            for slot in range(current.active):
                leaf = leaves.get(slot) if slot in included else None
                held = Held(None, nothing) if leaf is None else leaf.parts[part]
                who = None if leaf is None else leaf.sender
                is_taken = part not in before and current.take(
                    part, Node(0, slot), who, held, self._out
                )
                if not is_taken and held.payload is not None:
                    self._release([held.payload])
        self._scale(shard, current, metas, before)
        current.hyper = HyperOf(first.groups, first.norm_max)
        progress = decode_progress(shard.kept[shard.version].state)
        batches = [(first.first, slot) for slot in range(first.due)]
        if first.is_again:
            batches = progress.again[: first.due]
        is_requeued = shard.spec.consistency.late is Late.REQUEUE
        tried = Lineup(batches, first.is_again)
        state = after(progress, tried, included, first.state, is_requeued=is_requeued)
        current.meta = msgspec.structs.replace(first, state=msgspec.msgpack.encode(state))
        current.contributed = [(*batches[slot], leaves[slot].sender) for slot in included]

    def _scale(
        self, shard: Shard, current: Round, metas: list[RoundMeta], before: dict[int, None]
    ) -> None:
        """Let means be means, though some slots are not in.

        Where batches of others are computed again, every gradient counts as in its round of the
        plan, in the end once; where they are dropped, what is in counts for all of the round.
        """
        share = sum((Fraction(meta.samples, meta.total) for meta in metas), Fraction())
        parts = [ready for ready in current.ready() if ready.part not in before]
        if parts and share != 1:
            is_all = shard.spec.consistency.late is Late.DROP
            factor = float(1 / share)
            self._out.append(ScaleParts(shard.table, shard.number, parts, factor, is_all))
