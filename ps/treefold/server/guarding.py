"""Rounds whose contributions are looked at before they are applied.

Part of `treefold.server.core` in a file of its own; just as pure. Effects are appended to the
core's list.

Every shard measures what each slot has sent of it, and tells the scheduler, which decides once for
all shards what counts. What is left out takes part in the fold as if it had no gradient; if nothing
is in, the round changes nothing, and is a version all the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import msgspec

from treefold.common import blocks
from treefold.common.round_state import Watched, decode_watched
from treefold.common.spec import Guard, HealthPolicy
from treefold.common.tree import Node, span
from treefold.server.effects import (
    CombinePayloads,
    ComputeProducts,
    Effect,
    ProductsComputed,
    ScaleParts,
    ScalePayload,
)
from treefold.server.gathering import Gathering, whole
from treefold.server.holding import Shard
from treefold.server.rounds import Arrived, Held, HyperOf, Leaf, Round
from treefold.wire.decisions import HealthDecision, HealthReport, QuorumDecision
from treefold.wire.exchange import SCHEDULER, Send
from treefold.wire.membership import MS, Membership
from treefold.wire.messages import RoundMeta
from treefold.wire.words import INITIAL_ROUND

RETRY_MS = 500  # a report that is not answered with a decision is sent again


@dataclass(slots=True)
class _Watch:
    """What was measured of a round in which everything counts as it is, by part and slot."""

    active: int
    senders: dict[int, int] = field(default_factory=dict)
    rows: dict[tuple[int, int], list[blocks.Row]] = field(default_factory=dict)


class Guarding(Gathering):
    """Contributions to tables that look at them."""

    def __init__(self, membership: Membership, out: list[Effect]) -> None:
        super().__init__(membership, out)
        self._watches: dict[tuple[int, int], dict[int, _Watch]] = {}

    # ---- where everything counts as it is -----------------------------------------------------

    def watch(self, shard: Shard, arrived: Arrived, number: int) -> None:
        """Measure a part of a run, before it is folded with others."""
        push, part = arrived.push, arrived.push.part + number
        current, node = shard.round, Node(push.level, push.index)
        low, high = span(node, push.active)
        is_known = current is None or current.folds[part].fold.covers(node)
        if push.round == INITIAL_ROUND or is_known or high - low != 1:
            return
        rounds = self._watches.setdefault((shard.table, shard.number), {})
        if push.round not in rounds:
            for older in [one for one in rounds if one < push.round - 1]:
                del rounds[older]
            rounds[push.round] = _Watch(push.active)
        rounds[push.round].senders[low] = push.sender
        held = arrived.held(number).payload
        of = shard.table, shard.number, push.round
        self._out.append(ComputeProducts(*of, part, (low,), (held,)))

    def _watched(self, shard: Shard, event: ProductsComputed) -> None:
        """Tell the scheduler once all of a round is measured; nothing waits for it."""
        rounds = self._watches.get((shard.table, shard.number), {})
        watch = rounds.get(event.round)
        if watch is None:
            return
        watch.rows[event.part, event.slots[0]] = event.rows
        if len(watch.rows) < shard.parts_count * watch.active:
            return
        del rounds[event.round]
        slots = range(watch.active)
        report = HealthReport(
            self._membership.incarnation, shard.table, shard.number, event.round,
            [watch.senders[slot] for slot in slots], [], 0,
            _sums(shard, [[watch.rows[part, slot] for slot in slots] for part in _parts(shard)]),
            [],
        )  # fmt: skip
        self._out.append(Send(SCHEDULER, report))

    # ---- what is here -------------------------------------------------------------------------

    def _taken(self, shard: Shard, slot: int, part: int) -> None:
        """Measure a part at once, while it is in the processor's cache."""
        if not shard.spec.guard.aggregation.is_paired:
            self._measure(shard, part, (slot,))

    def _measure(self, shard: Shard, part: int, slots: tuple[int, ...]) -> None:
        current = shard.round
        if current is None or (part, slots) in current.products:
            return
        current.products[part, slots] = []
        payloads = tuple(current.leaves[slot].parts[part].payload for slot in slots)
        of = shard.table, shard.number, current.number
        self._out.append(ComputeProducts(*of, part, slots, payloads))

    def on_products(self, shard: Shard, event: ProductsComputed) -> None:
        """The sums of a part are known."""
        if shard.spec.is_watched:
            self._watched(shard, event)
            return
        current = shard.round
        if current is not None and current.number == event.round and current.is_by_leaves:
            current.products[event.part, event.slots] = event.rows

    # ---- what counts --------------------------------------------------------------------------

    def begin(self, now_ns: int, shard: Shard) -> None:
        """Tell the scheduler what is here, or fold what counts."""
        current = shard.round
        if current is None or not current.is_by_leaves or not current.leaves:
            return
        if not (shard.chain.is_primary and shard.chain.is_started) or not current.due:
            return
        if len(whole(shard, current)) < current.due:
            return
        if shard.spec.guard.aggregation.is_paired:
            for part in _parts(shard):
                self._measure(shard, part, tuple(range(current.due)))
        if current.decision is not None:
            self._fold(shard, current, current.decision)
        elif not current.reported and all(current.products.values()):
            self._report(now_ns, shard, current)

    def report_again(self, now_ns: int, shard: Shard) -> bool:
        """Ask for the decision once more; False if it is known, or is not asked for."""
        current = shard.round
        if current is None or not current.is_by_leaves or not current.reported:
            return False
        self._report(now_ns, shard, current)
        return True

    def _report(self, now_ns: int, shard: Shard, current: Round) -> None:
        current.reported = current.due
        shard.stuck_ns = now_ns if shard.stuck_ns is None else shard.stuck_ns
        shard.decision_retry_ns = now_ns + RETRY_MS * MS
        slots = range(current.due)
        is_paired = shard.spec.guard.aggregation.is_paired
        groups = [tuple(slots)] if is_paired else [(slot,) for slot in slots]
        columns = [[current.products[part, group] for group in groups] for part in _parts(shard)]
        metas = _metas(current.leaves)
        report = HealthReport(
            self._membership.incarnation, shard.table, shard.number, current.number,
            [current.leaves[slot].sender for slot in slots], [meta.samples for meta in metas],
            metas[0].total, _sums(shard, columns),
            decode_watched(shard.kept[shard.version].state).norms,
        )  # fmt: skip
        self._out.append(Send(SCHEDULER, report))

    def on_decision(self, shard: Shard, decision: QuorumDecision | HealthDecision) -> bool:
        """The scheduler says what counts; False if this is not about the shard's round."""
        current = shard.round
        if current is None or not isinstance(decision, HealthDecision):
            return False
        is_of_round = (decision.table, decision.round) == (shard.table, current.number)
        if not is_of_round or not current.is_by_leaves:
            return False
        if current.decision is None and len(decision.coefficients) == current.due:
            current.decision = decision
            shard.decision_retry_ns = None
            shard.stuck_ns = None if shard.is_settled else shard.stuck_ns
        return True

    # ---- what it makes ------------------------------------------------------------------------

    def _fold(self, shard: Shard, current: Round, decision: HealthDecision) -> None:
        """Fold what counts, and let the round go its way as any other."""
        metas, leaves, current.leaves = _metas(current.leaves), current.leaves, {}
        current.products.clear()
        first, counts = metas[0], decision.coefficients
        if current.active == 0:
            current.open(first.active, shard.parts_count)
        before = dict.fromkeys([*current.rooted, *current.made])
        for part in _parts(shard):
            if part in before:
                held = [leaf.parts[part].payload for leaf in leaves.values()]
                self._release([payload for payload in held if payload is not None])
            else:
                self._fold_part(shard, current, part, leaves)
        parts = [ready for ready in current.ready() if ready.part not in before]
        if parts and decision.factor != 1.0:
            scale = ScaleParts(shard.table, shard.number, parts, decision.factor, is_all=True)
            self._out.append(scale)
        current.hyper = HyperOf(first.groups, first.norm_max)
        state = msgspec.msgpack.encode(Watched(decision.norms, first.state))
        current.meta = msgspec.structs.replace(first, state=state)
        current.included = [slot for slot, count in enumerate(counts) if count]
        current.contributed = [(0, slot, leaves[slot].sender) for slot in current.included]

    def _fold_part(self, shard: Shard, current: Round, part: int, leaves: dict[int, Leaf]) -> None:
        counts = [] if current.decision is None else current.decision.coefficients
        held = [leaves[slot].parts[part] for slot in range(len(counts))]
        nothing = (1 << shard.pieces[part]) - 1
        out = [one for one, count in zip(held, counts, strict=True) if not count]
        self._release([one.payload for one in out if one.payload is not None])
        guard, of = shard.spec.guard, (shard.table, shard.number, part)
        for one, *factors in zip(held, counts, _of_buffers(guard, counts, leaves), strict=True):
            if one.payload is not None and factors[0] not in (0.0, 1.0):
                self._out.append(ScalePayload(*of, one.payload, *factors))
        if guard.aggregation.is_by_coordinate:
            held = self._combined(guard, leaves, held, counts, nothing)
        for slot, one in enumerate(held):
            is_in = bool(counts[slot])
            who = leaves[slot].sender if is_in else None
            current.take(part, Node(0, slot), who, one if is_in else Held(None, nothing), self._out)

    def _combined(
        self,
        guard: Guard,
        leaves: dict[int, Leaf],
        held: list[Held],
        counts: list[float],
        nothing: int,
    ) -> list[Held]:
        """What the contributions to a part make coordinate by coordinate, as the first one's."""
        made = [Held(None, nothing) for _ in held]
        payloads: list[int] = []
        factors: list[float] = []
        marks, first = nothing, 0
        for slot, count in enumerate(counts):
            payload, meta = held[slot].payload, leaves[slot].meta
            marks &= held[slot].absent if count else nothing
            if count and payload is not None and meta is not None:
                first = first if payloads else slot
                payloads.append(payload)
                factors.append(meta.total / meta.samples)
        known = sum(count > 0 for count in counts)
        if payloads:
            trimmed = guard.trimmed(known)
            combine = CombinePayloads(payloads, factors, known - len(payloads), trimmed)
            self._out.append(combine)
            self._release(payloads[1:])
            made[first] = Held(payloads[0], marks)
        return made


def _of_buffers(guard: Guard, counts: list[float], leaves: dict[int, Leaf]) -> list[float]:
    """What buffers are multiplied with: a gradient is clipped, a statistic beside it is not."""
    if guard.policy is not HealthPolicy.CLIP or not any(counts):
        return counts
    if not guard.aggregation.is_paired:
        return [float(count > 0) for count in counts]
    pairs = zip(counts, _metas(leaves), strict=True)
    whole = math.fsum(count * meta.samples / meta.total for count, meta in pairs)
    return [count / whole for count in counts]


def _parts(shard: Shard) -> range:
    return range(shard.parts_count)


def _sums(shard: Shard, columns: Sequence[Sequence[list[blocks.Row]]]) -> list[blocks.Sums]:
    """The nodes that a shard's blocks make up, from what was measured part by part."""
    rows: list[blocks.Row] = []
    for part in columns:
        rows += [[*chain.from_iterable(row)] for row in zip(*part, strict=True)]
    return blocks.of_shard(shard.span.first_block, rows)


def _metas(leaves: dict[int, Leaf]) -> list[RoundMeta]:
    """What goes with each contribution, slot by slot."""
    return [meta for slot in sorted(leaves) if (meta := leaves[slot].meta) is not None]
