"""When contributions are applied in every mode when workers differ, in simulated time."""

import random
from collections import Counter
from dataclasses import dataclass, replace
from enum import Enum

import msgspec

from tests.sim.cluster import Cluster, Cores, tiny_layout
from tests.sim.contributions import Contributions
from tests.sim.gathered import Gathered
from tests.sim.network import Weather
from tests.sim.scenario import Patience, Scenario, passes, table
from tests.sim.stragglers import FixedLeases
from tests.sim.trainer import Script, Trainer
from tests.sim.training import Step
from tests.sim.world import MS
from treefold.common.spec import SYNC, Consistency, ConsistencyKind
from treefold.scheduler.core import SchedulerCore
from treefold.worker.effects import Task

SLOTS, WORKERS = 32, 8
COMPUTE_NS = 200 * MS
SLOWDOWN = 4.0
STALL, STALLS_OF = 10.0, 0.05  # so many times as long take so many of the loop bodies
ADAPTING_ROUNDS = 20


class Trouble(Enum):
    """What makes workers differ."""

    NONE = "all alike"
    ONE = "one worker 4 times slower"
    RANDOM = "5 % of bodies 10 times slower"


@dataclass(frozen=True, slots=True)
class Mode:
    """When contributions are applied, and whether slots move to workers that are faster."""

    name: str
    rule: Consistency
    is_elastic: bool


def _ssp(bound: int) -> Consistency:
    return Consistency(ConsistencyKind.SSP, bound)


ASYNC = Consistency(ConsistencyKind.ASYNC)
QUORUM = Consistency(ConsistencyKind.QUORUM, quorum=28, grace=0.1)
MODES = (
    Mode("sync", SYNC, is_elastic=True),
    Mode("quorum 28", QUORUM, is_elastic=True),
    Mode("ssp 3", _ssp(3), is_elastic=True),
    Mode("async", ASYNC, is_elastic=True),
    Mode("sync, fixed shares", SYNC, is_elastic=False),
    Mode("quorum 28, fixed shares", QUORUM, is_elastic=False),
    Mode("ssp 0, fixed shares", _ssp(0), is_elastic=False),
    Mode("ssp 3, fixed shares", _ssp(3), is_elastic=False),
    Mode("ssp 10, fixed shares", _ssp(10), is_elastic=False),
    Mode("async, fixed shares", ASYNC, is_elastic=False),
)


@dataclass(frozen=True, slots=True)
class Schedule:
    """What was applied after leases had adapted, as if training began there; and how long it took.

    Attributes
    ----------
    steps : tuple of Step
        In the order of versions.
    """

    steps: tuple[Step, ...]

    @property
    def took_ns(self) -> int:
        """Until everything was applied."""
        return self.steps[-1].at_ns

    @property
    def staleness(self) -> float:
        """Mean number of versions between the one that a body began with and the one it made."""
        return sum(number - step.base for number, step in enumerate(self.steps)) / len(self.steps)


def is_stalled(seed: int, round_: int, slot: int, tries: int) -> bool:
    """Whether a loop body stalls: the first time that it is computed, the same in every mode."""
    return random.Random(f"{seed} {round_} {slot} {tries}").random() < STALLS_OF


def stalling(seed: int) -> type[Trainer]:
    """Scripts some of whose bodies take much longer; who computes one again draws again."""
    tries: Counter[tuple[int, int]] = Counter()

    class Stalling(Trainer):
        def _compute(self, task: object) -> Script:
            assert isinstance(task, Task)
            where = (task.round, task.slot)
            self.factor = STALL if is_stalled(seed, *where, tries[where]) else 1.0
            tries[where] += 1
            yield from super()._compute(task)

    return Stalling


def scenario_of(mode: Mode, trouble: Trouble, rounds: int, seed: int) -> Scenario:
    """The job, which has rounds to spare where fast slots would run out of them."""
    factors = (1.0,) * (WORKERS - 1) + (SLOWDOWN if trouble is Trouble.ONE else 1.0,)
    spec = msgspec.structs.replace(table("model", [(8, 0)]), consistency=mode.rule)
    whole = (ADAPTING_ROUNDS + rounds) * (1 if mode.rule == SYNC else 3)
    return Scenario(
        seed=seed,
        slots=SLOTS,
        workers=WORKERS,
        starts_ns=(0,) * WORKERS,
        factors=factors,
        tables=(spec,),
        plans=passes(SLOTS, [whole], SLOTS, SLOTS),
        block_elements=8,
        compute_ns=COMPUTE_NS,
        weather=Weather(MS // 10, MS // 10),
        patience=Patience(),
        is_streaming=False,
    )


def schedule(mode: Mode, trouble: Trouble, rounds: int, seed: int = 1) -> Schedule:
    """Simulate so many rounds' contributions, after those in which leases adapt."""
    scenario = scenario_of(mode, trouble, rounds, seed)
    scheduler = SchedulerCore if mode.is_elastic else FixedLeases
    trainer = stalling(seed) if trouble is Trouble.RANDOM else Trainer
    with tiny_layout(scenario.block_elements, scenario.part_blocks_max):
        cluster = Cluster(scenario, Cores(scheduler=scheduler, trainer=trainer))
        cluster.begin()
        steps = _run(cluster, (ADAPTING_ROUNDS + rounds) * SLOTS)
    assert list(cluster.checks.versions) == [(0, 0)], "there must be one order"
    return _cut(steps, ADAPTING_ROUNDS * SLOTS)


def _run(cluster: Cluster, count: int) -> list[Step]:
    """Run until so many contributions are in; returns the versions that they made."""
    steps: list[Step] = []
    while count > 0:
        assert cluster.world.step(), "the job must not end before its last version"
        newest = cluster.checks.versions.get((0, 0), -1)
        while len(steps) < newest and count > 0:
            steps.append(_step_of(cluster, len(steps) + 1))
            count -= len(steps[-1].batches)
    return steps


def _step_of(cluster: Cluster, version: int) -> Step:
    """How a version was made, just now."""
    checks, round_ = cluster.checks, version - 1
    batches, base = tuple((round_, slot) for slot in range(SLOTS)), round_
    if isinstance(checks, Contributions):
        which = checks.histories[0, 0][round_].which
        batches, base = (which[:2],), checks.begun[which][-1][0, 0]
    elif isinstance(checks, Gathered):
        tried = checks.tried(round_).batches
        batches = tuple(tried[slot] for slot in checks.decisions[round_])
    return Step(cluster.world.now_ns, batches, base)


def _cut(steps: list[Step], count: int) -> Schedule:
    """The steps after so many contributions. What began with an older version began with that."""
    first = 0
    while count > 0:
        count -= len(steps[first].batches)
        first += 1
    began_ns = steps[first - 1].at_ns
    return Schedule(
        tuple(
            replace(step, at_ns=step.at_ns - began_ns, base=max(step.base, first) - first)
            for step in steps[first:]
        )
    )
