"""What must hold where rounds go on without the last slots: what is in is decided once, for all.

What the scheduler decides is chance. Everything else follows from it: which batches a round has,
what every version is made of, and what goes with it.
"""

import math
import random
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import msgspec

from tests.sim.checks import Checks, same
from tests.sim.memory import fold
from tests.sim.scenario import Fault, Kind, Scenario
from tests.sim.world import MS, Violation
from treefold.common.lineup import Batch, Lineup, after, lineup
from treefold.common.round_state import NO_PROGRESS, Progress, decode_progress
from treefold.common.spec import Consistency, ConsistencyKind, Late, Rule
from treefold.common.tree import Node, root_level, span
from treefold.server.effects import MakeParts, ReadyPart, RecordVersion
from treefold.server.holding import Shard
from treefold.wire.decisions import QuorumDecision
from treefold.wire.messages import Published
from treefold.worker.effects import LoopEnd, Task

SHARE = 0.12  # of all seeds with leased slots


def with_quorum(job: Scenario, *, is_wanted: bool = False) -> Scenario:
    """The same job, for some seeds with rounds that go on without the last slots."""
    rng = random.Random(f"quorum {job.seed}")
    is_able = not (job.loader_rounds or job.is_asynchronous)
    if not is_able or not (is_wanted or rng.random() < SHARE):
        return job
    rule = Consistency(
        ConsistencyKind.QUORUM,
        quorum=rng.randint(1, job.slots),
        grace=rng.choice((0.0, 0.0, 0.1, 0.5, 2.0)),
        late=Late.DROP if rng.random() < 0.3 else Late.REQUEUE,
    )
    tables = tuple(
        msgspec.structs.replace(spec, consistency=rule) if spec.rule is Rule.OPTIMIZER else spec
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


@dataclass(slots=True)
class Book:
    """Decisions, and what follows from them.

    Attributes
    ----------
    decisions : dict of int to list of int
        The slots that are in each round.
    chain : list of Progress
        What goes with each version, but for what the first slot left.
    """

    decisions: dict[int, list[int]] = field(default_factory=dict)
    chain: list[Progress] = field(default_factory=lambda: [NO_PROGRESS])

    def until(self, version: int) -> "Book":
        """The same up to a version."""
        decisions = {round_: slots for round_, slots in self.decisions.items() if round_ < version}
        return Book(decisions, self.chain[: version + 1])


@dataclass(slots=True)
class Gathered(Checks):
    """The checks of jobs whose tables have a quorum.

    Attributes
    ----------
    books : list of Book
        What was decided, anew each time the job goes back to a checkpoint.
    era : int
        Which of them counts for who is being checked.
    bases : dict of (int, Batch) to None
        Batches that workers have begun to compute, and the version that they did it with, by
        incarnation.
    """

    books: list[Book] = field(default_factory=lambda: [Book()])
    era: int = 0
    bases: dict[tuple[int, int, Batch], None] = field(default_factory=dict)

    # ---- what follows from decisions -------------------------------------------------------------

    @property
    def rule(self) -> Consistency:
        """Of all tables."""
        return self.reference.scenario.tables[self.reference.trained[0]].consistency

    @property
    def decisions(self) -> dict[int, list[int]]:
        """The slots that are in each round."""
        return self.books[self.era].decisions

    def enter(self, view: int) -> None:
        """What is checked next is about somebody with this view."""
        self.era = bisect_right(self.rollbacks, view)

    def roll_back(self, view: int) -> None:
        """The job goes back to a checkpoint with this view."""
        Checks.roll_back(self, view)
        self.books.append(Book())

    def on_restored(self, view: int, key: tuple[int, int], version: int) -> None:
        """A shard begins with a version of a checkpoint, of which all was decided before."""
        Checks.on_restored(self, view, key, version)
        self.enter(view)
        if key[0] in self.reference.trained and self.era and len(self.chain) == 1:
            own, self.era = self.era, self.era - 1
            while self.era and len(self.chain) == 1:  # it went back once more before this was there
                self.era -= 1
            self.progress(version)
            self.books[own] = self.books[self.era].until(version)

    @property
    def chain(self) -> list[Progress]:
        """What goes with each version, but for what the first slot left."""
        return self.books[self.era].chain

    def progress(self, version: int) -> Progress:
        """What goes with a version."""
        while len(self.chain) <= version:
            round_ = len(self.chain) - 1
            if round_ not in self.decisions:
                raise Violation(f"version {version}, and round {round_} is not decided")
            slots, is_requeued = self.decisions[round_], self.rule.late is Late.REQUEUE
            tried = self.tried(round_)
            self.chain.append(after(self.chain[round_], tried, slots, b"", is_requeued=is_requeued))
        return self.chain[version]

    def tried(self, version: int) -> Lineup:
        """The batches of the round that begins with a version; none if the job is over."""
        progress = self.progress(version)
        found = [lineup(plan, progress) for plan in self.reference.scenario.plans]
        return next((one for one in found if one.batches), Lineup([], is_again=False))

    def _first(self, round_: int) -> Batch:
        """Whose word counts for a round."""
        self.progress(round_ + 1)
        return self.tried(round_).batches[self.decisions[round_][0]]

    def last_version(self, table: int) -> int:
        """The version that every shard of a table with rounds ends with."""
        del table
        version, self.era = 0, len(self.books) - 1
        while self.tried(version).batches:
            version += 1
        return version

    def on_decided(self, decision: QuorumDecision) -> None:
        """The scheduler says what is in, once and for all, and enough of it."""
        round_, slots, self.era = decision.round, decision.slots, len(self.books) - 1
        if self.decisions.setdefault(round_, slots) != slots:
            raise Violation(f"{decision}, and {self.decisions[round_]} were in it before")
        due = len(self.tried(round_).batches)
        enough = max(1, min(self.rule.quorum, due))
        if len(slots) < enough or sorted(set(slots)) != slots or slots[-1] >= due:
            raise Violation(f"{decision} of {due} slots, with a quorum of {enough}")

    # ---- servers ---------------------------------------------------------------------------------

    def on_roots(
        self, shard: Shard, round_: int, parts: Sequence[ReadyPart], values: Sequence[object]
    ) -> None:
        """Every part's root is the fold of what is in, in the tree's order, and counts for all."""
        if round_ < 0:
            Checks.on_roots(self, shard, round_, parts, values)
            return
        for ready, value in zip(parts, values, strict=True):
            key = (shard.table, *shard.parts[ready.part])
            expected, marks = self.root(key, round_)
            where = f"table {shard.table} shard {shard.number} part {ready.part} round {round_}"
            if value != expected:
                raise Violation(f"{where} is folded to\n  {value}\nand should be\n  {expected}")
            if int.from_bytes(ready.absent, "little") != marks:
                raise Violation(f"{where} has absent marks {ready.absent!r}, not {marks:b}")

    def root(self, key: tuple[int, int, int], round_: int) -> tuple[object, int]:
        """Value and absent marks of the fold of one part."""
        self.progress(round_ + 1)
        batches, slots = self.tried(round_).batches, self.decisions[round_]
        count = self.reference.scenario.slots
        value, marks = self._node(key, round_, Node(root_level(count), 0), slots)
        plan_of = self.reference.scenario.plan_of
        included = [batches[slot] for slot in slots]
        shares = [
            Fraction(plan_of(u).slot_samples(u, slot), plan_of(u).round_samples(u))
            for u, slot in included
        ]
        is_changed = self.rule.late is Late.DROP or self.reference.has_buffers(*key)
        if value is not None and is_changed and sum(shares) != 1:
            value = ("scaled", value, float(1 / sum(shares)))
        return value, marks

    def _node(
        self, key: tuple[int, int, int], round_: int, node: Node, slots: Collection[int]
    ) -> tuple[object, int]:
        count = self.reference.scenario.slots
        start, stop = span(node, count)
        if stop - start == 1:
            if start not in slots:
                return None, (1 << len(self.reference.tensors(*key))) - 1
            value, marks = self.reference.leaf(key, *self.tried(round_).batches[start])
            assert value is None or isinstance(value, tuple)
            return None if value is None else (*value, round_), marks
        left = self._node(key, round_, Node(node.level - 1, 2 * node.index), slots)
        other = Node(node.level - 1, 2 * node.index + 1)
        if span(other, count)[0] >= stop:
            return left
        right = self._node(key, round_, other, slots)
        return fold(left[0], right[0]), left[1] & right[1]

    def _check_hyper(self, effect: MakeParts, where: str) -> None:
        expected = self.reference.meta(effect.table, *self._first(effect.version - 1))
        if (effect.groups, effect.norm_max) != (expected.groups, expected.norm_max):
            given = f"{effect.groups} and limit {effect.norm_max}"
            raise Violation(f"{where} is made with {given}, and should be with {expected}")
        norm = self._norm(effect.table, effect.version)
        if not same(effect.norm, norm):
            raise Violation(f"{where} is made with norm {effect.norm}, and should be with {norm}")

    def _norm(self, table: int, version: int) -> float:
        if version == 0 or not self.reference.meta(table, *self._first(version - 1)).norm_max:
            return math.nan
        total = 0.0
        for value in self.reference.sums(
            table, version - 1, 0, self.reference.layouts[table].blocks
        ):
            total += value
        return math.sqrt(total)

    def on_recorded(self, view: int, effect: RecordVersion, shard: Shard) -> None:
        """A version is whole, and has what was decided, as computed with the version before."""
        self.enter(view)
        is_trained = effect.table in self.reference.trained
        contributors = effect.contributors
        if is_trained and effect.version > 0:
            effect = msgspec.structs.replace(effect, contributors=[])
        Checks.on_recorded(self, view, effect, shard)
        if not is_trained or effect.version == 0 or not contributors:
            return
        round_ = effect.version - 1
        where = f"version {effect.version} of table {effect.table} shard {effect.shard}"
        self.progress(effect.version)
        batches = self.tried(round_).batches
        expected = [batches[slot] for slot in self.decisions[round_]]
        if [batch[:2] for batch in contributors] != expected:
            raise Violation(f"{where} has {contributors}, and {expected} were decided")
        for *batch, sender in contributors:
            if (sender, round_, tuple(batch)) not in self.bases:
                raise Violation(f"{where} has {batch}, which {sender} did not compute with it")

    # ---- what is said of versions ----------------------------------------------------------------

    def on_word(self, view: int, published: Published) -> None:
        """What goes with a version says which batches come next."""
        self.enter(view)
        table, version = published.table, published.version
        if table in self.reference.trained and version > 0:
            found, expected = decode_progress(published.state), self.progress(version)
            if msgspec.structs.replace(found, record=b"") != expected:
                raise Violation(f"version {version} comes with {found}, not {expected}")
            published = msgspec.structs.replace(published, state=found.record)
        Checks.on_word(self, view, published)

    def _check_word(self, table: int, version: int, state: bytes, norm: float, where: str) -> None:
        if table not in self.reference.trained or version == 0:
            Checks._check_word(self, table, version, state, norm, where)
            return
        round_, slot = self._first(version - 1)
        expected = self.reference.state(table, round_ + 1, slot)
        if state != expected:
            raise Violation(f"{where} comes with state {state!r}, not {expected!r}")
        if not same(norm, self._norm(table, version)):
            raise Violation(f"{where} comes with norm {norm}")

    # ---- workers ---------------------------------------------------------------------------------

    def on_computed(self, who: int, task: Task) -> None:
        """A worker begins with a batch; it is one of the round that begins with its version."""
        Checks.on_computed(self, who, task)
        batch, tried = (task.round, task.slot), self.tried(task.base)
        if batch not in tried.batches or task.is_again != tried.is_again:
            raise Violation(f"{task}, and the round has {tried}")
        self.bases[who, task.base, batch] = None

    def check_over(self, end: LoopEnd, version: int, end_round: int) -> None:
        """A pass over the data ends with everything in, or left out."""
        progress = self.progress(version)
        if progress.next < end_round or (progress.next == end_round and progress.again):
            raise Violation(f"{end} of a pass to {end_round}, with {progress}")
