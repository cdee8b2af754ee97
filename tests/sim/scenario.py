"""What one seed simulates: a job, a cluster, its limits, and the faults that happen to it.

Each seed draws its own mix. Limits of patience are drawn so that no fault can end the job
rightfully: whatever happens before `Scenario.heal_ns`, every script has to finish afterwards. Seeds
that a server does not survive (`Scenario.is_doomed`) are the exception, and there every script has
to end with an error.
"""

from dataclasses import dataclass, field, replace
from enum import Enum, auto

from tests.sim.network import Weather
from tests.sim.world import MS, SECOND
from treefold.common.plan import LoopPlan, PlanKind
from treefold.common.spec import (
    Dtype,
    OptimizerSpec,
    Placement,
    Rule,
    TableSpec,
    TensorSpec,
)


class Kind(Enum):
    """What can happen to a process or a pair of them."""

    CRASH = auto()  # the process dies; with a duration, another one is started that much later
    FREEZE = auto()  # it does nothing for a while, then everything at once
    SUSPEND = auto()  # the same, and its clock stands still meanwhile
    PARTITION = auto()  # nothing passes from one host to another, in this direction
    RECONNECT = auto()  # a worker's connections are made again
    DRAIN = auto()  # a worker is asked to stop


class Early(Enum):
    """When servers hear of a round's hyper-parameters."""

    BACKWARD = auto()  # before the first part of slot 0
    STEP = auto()  # before the last ones
    NEVER = auto()  # with all the rest of what slot 0 brings


class Theme(Enum):
    """What a seed has more of than others, so that rare meetings of faults become common."""

    MIXED = auto()
    FENCED = auto()  # heartbeats are lost and members given up although they live
    DYING = auto()  # workers die and are started again, several times
    ENDING = auto()  # the job is short: most of it is joining, leaving, and coming too late
    LAGGING = auto()  # rounds are fast, few are needed for them, and the others fall far behind
    STREAMING = auto()  # versions have many parts, some of which are lost, and workers die
    CHAINED = auto()  # shards have several servers, which die, are cut off and come back
    APART = auto()  # contributions are applied one by one
    BESIDE = auto()  # contributions to some tables are, beside others with rounds
    QUORUM = auto()  # rounds go on without the last slots
    GUARDED = auto()  # contributions are looked at, and some do not count
    SAVED = auto()  # the last copies of shards are lost, and the job goes back to checkpoints


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that happens at a time. ``other`` is the receiving end of a partition."""

    at_ns: int
    kind: Kind
    target: str
    for_ns: int = 0
    other: str = ""


@dataclass(frozen=True, slots=True)
class Patience:
    """Limits of all members, in nanoseconds."""

    heartbeat_ns: int = 500 * MS
    dead_after_ns: int = 2 * SECOND
    server_dead_after_ns: int = 30 * SECOND
    form_timeout_ns: int = 120 * SECOND
    rejoin_grace_ns: int = 60 * SECOND
    connect_timeout_ns: int = 60 * SECOND
    unreachable_ns: int = 60 * SECOND
    orphan_after_ns: int = 60 * SECOND
    retry_ns: int = 1 * SECOND


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything that a run depends on, beside the seed of its own chance.

    Attributes
    ----------
    starts_ns : tuple of int
        When each worker starts; the first ``workers`` of them form the cluster.
    factors : tuple of float
        How slow each worker is.
    block_elements, part_blocks_max : int
        In the place of the layout's constants, so that small tables have many parts.
    absent_of : int
        In how many of 16 cases a tensor has no gradient in a slot.
    clip_every : int
        Every so many rounds have a limit for the gradient norm; 0 for none.
    loader_rounds : int
        Rounds of a job in which every worker has its own loader; 0 for a job with slots.
    is_joining : bool
        Whether scripts wait until the cluster has formed before they declare anything.
    shared : float
        Chance that payloads go through shared memory, message by message.
    busy : float
        Chance that a version's buffer is still being sent when another version needs it.
    copy_ns : int
        How long it takes to copy half of a version at most, on a fast worker.
    is_lending : bool
        Whether scripts lend their gradients where they can.
    early : Early
        When servers hear of the hyper-parameters.
    is_streaming : bool
        Whether loop bodies may begin before all parts of their version are here.
    replicas : int
        Servers that hold each shard.
    late_ns : tuple of int
        When further servers come.
    shards_min : int
        In the place of the constant of `treefold.scheduler.placement`.
    checkpoint_every : int
        Versions from one checkpoint to the next; 0 for none.
    damaged : float
        Chance that a file cannot be written, and that a checkpoint is found to be damaged.
    skew_ppm : int
        By how many millionths clocks of processes go wrong at most; each has a zero of its own
        then. With 0 all show true time.
    """

    seed: int
    slots: int = 4
    servers: int = 1
    workers: int = 2
    starts_ns: tuple[int, ...] = (0, 0)
    factors: tuple[float, ...] = (1.0, 1.0)
    tables: tuple[TableSpec, ...] = ()
    plans: tuple[LoopPlan, ...] = ()
    block_elements: int = 4
    part_blocks_max: int = 1
    compute_ns: int = 10 * MS
    is_overlapped: bool = False
    absent_of: int = 0
    clip_every: int = 0
    weather: Weather = field(default_factory=lambda: Weather(MS // 4, MS // 4))
    patience: Patience = field(default_factory=Patience)
    faults: tuple[Fault, ...] = ()
    heal_ns: int = 0
    is_doomed: bool = False
    loader_rounds: int = 0
    is_joining: bool = True
    shared: float = 1.0
    busy: float = 0.0
    copy_ns: int = 0
    is_lending: bool = True
    early: Early = Early.BACKWARD
    is_streaming: bool = True
    replicas: int = 1
    late_ns: tuple[int, ...] = ()
    shards_min: int = 1
    checkpoint_every: int = 0
    damaged: float = 0.0
    skew_ppm: int = 0

    @property
    def is_asynchronous(self) -> bool:
        """Whether contributions to any table are applied one by one."""
        return any(spec.is_asynchronous for spec in self.tables)

    @property
    def may_be_too_stale(self) -> bool:
        """Whether contributions may have to be made again."""
        return any(spec.consistency.staleness_max for spec in self.tables)

    @property
    def is_guarded(self) -> bool:
        """Whether contributions are looked at."""
        return any(spec.is_guarded for spec in self.tables)

    @property
    def is_quorum(self) -> bool:
        """Whether rounds go on without the last slots."""
        return any(spec.is_quorum for spec in self.tables)

    @property
    def rounds(self) -> int:
        """Rounds of the whole job."""
        return self.loader_rounds or self.plans[-1].end_round

    @property
    def job_deadline_ns(self) -> int:
        """When the job has to be done: after the faults, and time to do all the work thrice alone.

        The seconds on top are many times what seeds were seen to need.
        """
        slot_ns = self.compute_ns + 2 * self.copy_ns * len(self.tables)
        work_ns = int(slot_ns * max(self.factors) * self.slots * (self.rounds + 2) * 3)
        wait_ns = 20 * SECOND
        if self.is_doomed or self.checkpoint_every:
            wait_ns += self.patience.server_dead_after_ns + self.patience.form_timeout_ns
        return max(self.heal_ns, *self.starts_ns) + work_ns + self.by_any_clock_ns(wait_ns)

    def by_any_clock_ns(self, wait_ns: int) -> int:
        """How long a wait takes by the slowest clock."""
        return wait_ns + wait_ns * self.skew_ppm // (1_000_000 - self.skew_ppm)

    @property
    def deadline_ns(self) -> int:
        """When every process has to be gone: after that, and after the longest waits."""
        patience = self.patience
        longest = max(
            patience.unreachable_ns, patience.connect_timeout_ns, patience.orphan_after_ns
        )
        return self.job_deadline_ns + self.by_any_clock_ns(4 * longest)

    def plan_of(self, round_: int) -> LoopPlan:
        """The pass that a round belongs to."""
        if self.loader_rounds:
            return self.plans[0]
        return next(plan for plan in self.plans if round_ < plan.end_round)

    def without_faults(self) -> "Scenario":
        """The same job in a world without faults."""
        return replace(self, faults=(), heal_ns=0, is_doomed=False, weather=self.weather.healed())


def table(name: str, sizes: list[tuple[int, int]], rule: Rule = Rule.OPTIMIZER) -> TableSpec:
    """A table of tensors given as ``(elements, group)``, in the order of groups."""
    tensors = [
        TensorSpec(f"{name}.{number}", [size], Dtype.FLOAT32, group)
        for number, (size, group) in enumerate(sizes)
    ]
    groups = max((group for _, group in sizes), default=0) + 1
    optimizer = OptimizerSpec("SGD", [{"lr": 0.5} for _ in range(max(1, groups))])
    return TableSpec(
        name, rule, Placement.ELEMENTWISE, tensors, None if rule is Rule.CONSTANT else optimizer
    )


def passes(slots: int, rounds: list[int], batch: int, last: int) -> tuple[LoopPlan, ...]:
    """Passes of so many rounds each, ``batch`` samples to a round and ``last`` to the last one."""
    found: list[LoopPlan] = []
    first = 0
    for index, count in enumerate(rounds):
        samples = (count - 1) * batch + last
        found.append(
            LoopPlan(PlanKind.SLOTS, index, first, count, slots, samples, batch, index, True, 0)
        )
        first += count
    return tuple(found)


def loader(workers: int) -> tuple[LoopPlan, ...]:
    """The one pass of workers with loaders of their own."""
    return (LoopPlan(PlanKind.LOADER, 0, 0, 0, workers, 0, workers, 0, False, 0),)
