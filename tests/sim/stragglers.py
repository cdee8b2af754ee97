"""What one slow worker costs, in simulated time, where leases move and where they never do."""

from dataclasses import dataclass

from tests.sim.cluster import Cluster, Cores, tiny_layout
from tests.sim.network import Weather
from tests.sim.scenario import Patience, Scenario, passes, table
from tests.sim.world import MS
from treefold.scheduler.core import SchedulerCore
from treefold.wire.messages import RoundLate

SLOTS = 16
WORKERS = 4
SLOWDOWN = 4.0
COMPUTE_NS = 20 * MS
ADAPTING_ROUNDS = 60  # several checks of the leases, whatever the pace


class FixedLeases(SchedulerCore):
    """A scheduler that leases slots once, equally, and gives no backup tasks."""

    def _check_leases(self, now_ns: int) -> None:
        self._lease_check_ns = now_ns + (1 << 60)

    def _on_round_late(self, now_ns: int, late: RoundLate) -> None:
        del now_ns, late


@dataclass(frozen=True, slots=True)
class Figure:
    """Nanoseconds of a round, with every worker alike and with one of them slowed."""

    even_ns: float
    slowed_ns: float

    @property
    def ratio(self) -> float:
        """How many times longer a round takes because of the slow worker."""
        return self.slowed_ns / self.even_ns


def figure(is_elastic: bool, rounds: int = 40) -> Figure:
    """What a worker slowed four times costs among four workers of 16 slots.

    Parameters
    ----------
    is_elastic : bool
        Whether leases move, as they do in every job, or stay as they were at the start.
    rounds : int
        Rounds to measure, after those in which leases adapt.
    """
    cores = Cores() if is_elastic else Cores(scheduler=FixedLeases)
    return Figure(*(round_time_ns(factor, cores, rounds) for factor in (1.0, SLOWDOWN)))


def round_time_ns(factor: float, cores: Cores, rounds: int) -> float:
    """Mean time of a round once leases have adapted; one worker is slower by ``factor``."""
    total = ADAPTING_ROUNDS + rounds
    scenario = Scenario(
        seed=1,
        slots=SLOTS,
        workers=WORKERS,
        starts_ns=(0,) * WORKERS,
        factors=(1.0,) * (WORKERS - 1) + (factor,),
        tables=(table("model", [(8, 0)]),),
        plans=passes(SLOTS, [total], SLOTS, SLOTS),
        block_elements=8,
        compute_ns=COMPUTE_NS,
        weather=Weather(MS // 10, MS // 10),
        patience=Patience(),
    )
    with tiny_layout(scenario.block_elements, scenario.part_blocks_max):
        cluster = Cluster(scenario, cores)
        cluster.begin()
        reached: list[int] = []
        for version in (ADAPTING_ROUNDS, total):
            while cluster.checks.versions.get((0, 0), -1) < version:
                assert cluster.world.step(), "the job must not end before its last version"
            reached.append(cluster.world.now_ns)
    return (reached[1] - reached[0]) / rounds
