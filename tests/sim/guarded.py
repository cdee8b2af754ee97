"""What must hold where contributions are looked at: what counts follows from them, and is the same.

How large contributions are is made up; some are not finite, and some are huge. What of a round has
to count is computed here from all blocks at once, whoever measures them.
"""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

import msgspec

from tests.sim.checks import Checks
from tests.sim.gathered import with_quorum
from tests.sim.memory import Payloads, fold
from tests.sim.network import Network
from tests.sim.scenario import Fault, Kind, Scenario, Theme
from tests.sim.world import MS, Violation
from treefold.common import blocks
from treefold.common.round_state import decode_watched
from treefold.common.spec import Guard, HealthPolicy, Rule
from treefold.common.tree import Node, root_level, span
from treefold.scheduler.robust import Verdict, judge, logarithms, remembered
from treefold.server.core import ServerCore
from treefold.server.effects import ComputeProducts, ProductsComputed, RecordVersion
from treefold.server.holding import Shard
from treefold.wire.messages import Published

SHARE = 0.08  # of all seeds with leased slots and without a quorum
POLICIES = (HealthPolicy.REJECT, HealthPolicy.REJECT, HealthPolicy.SKIP_ROUND, HealthPolicy.WARN)


def with_guard(job: Scenario, *, is_wanted: bool = False) -> Scenario:
    """The same job, for some seeds with tables that look at contributions."""
    rng = random.Random(f"guard {job.seed}")
    is_able = not (job.loader_rounds or job.is_asynchronous or job.is_quorum)
    if not is_able or not (is_wanted or rng.random() < SHARE):
        return job
    policies = POLICIES[: 3 if is_wanted else 4]
    tables = tuple(
        msgspec.structs.replace(
            spec, guard=Guard(rng.choice(policies), band=2.0, window=rng.randint(4, 20), warmup=4)
        )
        if spec.rule is Rule.OPTIMIZER
        else spec
        for spec in job.tables
    )
    job = replace(job, tables=tables)
    if not is_wanted or job.replicas == 1 or rng.random() < 0.5:
        return job
    # What the scheduler has decided, some servers know and others do not when it dies.
    crashes = [
        Fault(rng.randint(0, job.heal_ns), Kind.CRASH, "scheduler", rng.randint(20, 80) * MS)
        for _ in range(6)
    ]
    faults = sorted([*job.faults, *crashes], key=lambda fault: fault.at_ns)
    weather = replace(job.weather, drop=rng.choice((0.1, 0.3)), is_reliable=False)
    return replace(job, faults=tuple(faults), weather=weather)


def varied(job: Scenario, theme: Theme | None) -> Scenario:
    """The same job, for some seeds with a quorum, or with tables that look at contributions."""
    if theme is not Theme.GUARDED:
        job = with_quorum(job, is_wanted=theme is Theme.QUORUM)
    return with_guard(job, is_wanted=theme is Theme.GUARDED)


class Measuring(Protocol):
    """What measuring needs of a server."""

    server: ServerCore
    checks: Checks
    payloads: Payloads
    network: Network


def measured(process: Measuring, effect: ComputeProducts) -> Iterable[object]:
    """A server measures what slots have sent of a part, which must be that and nothing else."""
    process.network.count("measured")
    key = effect.table, effect.shard
    shard = process.server.shards[key]
    start, stop = shard.parts[effect.part]
    for slot, payload in zip(effect.slots, effect.payloads, strict=True):
        expected, _ = process.checks.reference.leaf((key[0], start, stop), effect.round, slot)
        value = None if payload is None else process.payloads.get(payload).value
        if value != expected:
            raise Violation(f"{effect} of {value}, which should be {expected}")
    rows = process.checks.on_products(shard, effect.slots, effect.part)
    return (ProductsComputed(*key, effect.round, effect.part, effect.slots, rows),)


@dataclass(slots=True)
class Guarded(Checks):
    """The checks of jobs whose tables look at contributions.

    Attributes
    ----------
    chains : dict of int to list of list of float
        By table, the logarithms of norms that go with each version.
    verdicts : dict of (table, round) to Verdict
        What counts.
    """

    chains: dict[int, list[list[float]]] = field(default_factory=dict)
    verdicts: dict[tuple[int, int], Verdict] = field(default_factory=dict)

    def squares(self, table: int, round_: int, slot: int, block: int) -> float:
        """A made-up sum of squares of what a slot has sent of a block."""
        step = self.reference.scenario.block_elements
        key = table, block * step, min((block + 1) * step, self.reference.layouts[table].elements)
        if self.reference.leaf(key, round_, slot)[0] is None:
            return 0.0
        if (7 * round_ + 5 * slot + 3 * table + block) % 53 == 0:
            return math.nan
        factor = 1e8 if (5 * round_ + 3 * slot + table) % 29 == 0 else 1.0
        return factor / (3 + block % 5 + round_ % 3 + slot + table)

    def verdict(self, table: int, round_: int) -> Verdict:
        """What counts of a round of a table."""
        guard = self.reference.scenario.tables[table].guard
        chain = self.chains.setdefault(table, [[]])
        while len(chain) <= round_ + 1:
            self._judge(guard, table, len(chain) - 1)
        return self.verdicts[table, round_]

    def _judge(self, guard: Guard, table: int, round_: int) -> None:
        plan, count = self.reference.scenario.plan_of(round_), self.reference.layouts[table].blocks
        slots = range(plan.active_slots(round_))
        rows = [[self.squares(table, round_, s, block) for s in slots] for block in range(count)]
        sums = blocks.of_table(count, blocks.of_shard(0, rows))
        assert sums is not None
        shares = [plan.slot_samples(round_, s) / plan.round_samples(round_) for s in slots]
        norms = self.chains[table][round_]
        self.verdicts[table, round_] = judge(guard, norms, sums, shares)
        self.chains[table].append(remembered(guard, norms, logarithms(sums, shares)))

    def on_products(self, shard: Shard, slots: tuple[int, ...], part: int) -> list[list[float]]:
        """What a server measures of a part."""
        assert shard.round is not None
        step, (start, stop) = self.reference.scenario.block_elements, shard.parts[part]
        found = range(start // step, max(start // step + 1, -(-stop // step)))
        (slot,) = slots
        return [[self.squares(shard.table, shard.round.number, slot, block)] for block in found]

    # ---- what versions are made of ---------------------------------------------------------------

    def root(self, key: tuple[int, int, int], round_: int) -> tuple[object, int]:
        """Value and absent marks of the fold of what counts of one part."""
        if not self.reference.scenario.tables[key[0]].is_gathered:
            return self.reference.root(key, round_)
        verdict = self.verdict(key[0], round_)
        active = len(verdict.coefficients)
        value, marks = self._node(key, round_, Node(root_level(active), 0), verdict)
        if value is not None and verdict.factor != 1.0:
            value = ("scaled", value, verdict.factor)
        return value, marks

    def _node(
        self, key: tuple[int, int, int], round_: int, node: Node, verdict: Verdict
    ) -> tuple[object, int]:
        active = len(verdict.coefficients)
        start, stop = span(node, active)
        if stop - start == 1:
            if not verdict.coefficients[start]:
                return None, (1 << len(self.reference.tensors(*key))) - 1
            return self.reference.leaf(key, round_, start)
        left = self._node(key, round_, Node(node.level - 1, 2 * node.index), verdict)
        other = Node(node.level - 1, 2 * node.index + 1)
        if span(other, active)[0] >= stop:
            return left
        right = self._node(key, round_, other, verdict)
        return fold(left[0], right[0]), left[1] & right[1]

    def on_recorded(self, view: int, effect: RecordVersion, shard: Shard) -> None:
        """A version is whole, and has what counts."""
        contributors, round_ = effect.contributors, effect.version - 1
        if shard.spec.is_gathered and round_ >= 0:
            effect = msgspec.structs.replace(effect, contributors=[])
        Checks.on_recorded(self, view, effect, shard)
        if not shard.spec.is_gathered or round_ < 0 or not contributors:
            return
        counts = self.verdict(effect.table, round_).coefficients
        expected = [(0, slot) for slot, count in enumerate(counts) if count]
        where = f"version {effect.version} of table {effect.table} shard {effect.shard}"
        if [one[:2] for one in contributors] != expected:
            raise Violation(f"{where} has {contributors}, and {expected} count")
        for _, slot, sender in contributors:
            if (sender, round_, slot) not in self.computed:
                raise Violation(f"{where} has slot {slot}, which {sender} did not compute")

    def on_word(self, view: int, published: Published) -> None:
        """What goes with a version says what is usual."""
        table, version = published.table, published.version
        is_gathered = self.reference.scenario.tables[table].is_gathered
        if is_gathered and version > 0:
            found = decode_watched(published.state)
            self.verdict(table, version - 1)
            if found.norms != self.chains[table][version]:
                raise Violation(f"version {version} of table {table} comes with {found.norms}")
            published = msgspec.structs.replace(published, state=found.record)
        Checks.on_word(self, view, published)
