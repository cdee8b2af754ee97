"""How long contributions take in every mode when workers differ, in simulated time."""

from dataclasses import dataclass
from enum import Enum

import msgspec

from tests.sim.cluster import Cluster, Cores, tiny_layout
from tests.sim.network import Weather
from tests.sim.scenario import Patience, Scenario, passes, table
from tests.sim.stragglers import FixedLeases
from tests.sim.trainer import Script, Trainer
from tests.sim.world import MS
from treefold.common.spec import SYNC, Consistency, ConsistencyKind
from treefold.scheduler.core import SchedulerCore

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
MODES = (
    Mode("sync", SYNC, is_elastic=True),
    Mode("ssp 3", _ssp(3), is_elastic=True),
    Mode("async", ASYNC, is_elastic=True),
    Mode("sync, fixed shares", SYNC, is_elastic=False),
    Mode("ssp 0, fixed shares", _ssp(0), is_elastic=False),
    Mode("ssp 3, fixed shares", _ssp(3), is_elastic=False),
    Mode("ssp 10, fixed shares", _ssp(10), is_elastic=False),
    Mode("async, fixed shares", ASYNC, is_elastic=False),
)


class Stalling(Trainer):
    """A script some of whose bodies take much longer, by chance."""

    def _compute(self, task: object) -> Script:
        is_stalled = self.process.world.rng.random() < STALLS_OF
        self.factor = STALL if is_stalled else 1.0
        yield from super()._compute(task)


def time_ns(mode: Mode, trouble: Trouble, rounds: int) -> int:
    """Simulated time of so many rounds' contributions, after those in which leases adapt."""
    factors = (1.0,) * (WORKERS - 1) + (SLOWDOWN if trouble is Trouble.ONE else 1.0,)
    spec = msgspec.structs.replace(table("model", [(8, 0)]), consistency=mode.rule)
    # Fast slots must not run out of rounds while slow ones are at theirs.
    whole = (ADAPTING_ROUNDS + rounds) * (1 if mode.rule == SYNC else 3)
    scenario = Scenario(
        seed=1,
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
    scheduler = SchedulerCore if mode.is_elastic else FixedLeases
    trainer = Stalling if trouble is Trouble.RANDOM else Trainer
    each = 1 if mode.rule == SYNC else SLOTS
    with tiny_layout(scenario.block_elements, scenario.part_blocks_max):
        cluster = Cluster(scenario, Cores(scheduler=scheduler, trainer=trainer))
        cluster.begin()
        reached: list[int] = []
        for number in (ADAPTING_ROUNDS, ADAPTING_ROUNDS + rounds):
            while cluster.checks.versions.get((0, 0), -1) < number * each:
                assert cluster.world.step(), "the job must not end before its last version"
            reached.append(cluster.world.now_ns)
    return reached[1] - reached[0]
