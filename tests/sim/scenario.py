"""What one seed simulates: a job, a cluster, its limits, and the faults that happen to it.

Each seed draws its own mix. Limits of patience are drawn so that no fault can end the job
rightfully: whatever happens before `Scenario.heal_ns`, every script has to finish afterwards. Seeds
that a server does not survive (`Scenario.is_doomed`) are the exception, and there every script has
to end with an error.
"""

import random
from dataclasses import dataclass, field, replace
from enum import Enum, auto

import msgspec

from tests.sim.network import Weather
from tests.sim.world import MS, SECOND
from treefold.common.plan import LoopPlan, PlanKind
from treefold.common.spec import (
    BUFFER_GROUP,
    Dtype,
    OptimizerSpec,
    Placement,
    Rule,
    TableSpec,
    TensorSpec,
)

COPY_TIMES = {False: (0, 1, 20), True: (0, 20, 100)}
"""Twentieths of a slot's time that it takes to copy half of a version, and where workers lag."""


class Kind(Enum):
    """What can happen to a process or a pair of them."""

    CRASH = auto()  # the process dies; with a duration, another one is started that much later
    FREEZE = auto()  # it does nothing for a while, then everything at once
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
        if self.is_doomed:
            work_ns += self.patience.server_dead_after_ns + self.patience.form_timeout_ns
        return max(self.heal_ns, *self.starts_ns) + work_ns + 20 * SECOND

    @property
    def deadline_ns(self) -> int:
        """When every process has to be gone: after that, and after the longest waits."""
        patience = self.patience
        longest = max(
            patience.unreachable_ns, patience.connect_timeout_ns, patience.orphan_after_ns
        )
        return self.job_deadline_ns + 4 * longest

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


# ---- drawing -------------------------------------------------------------------------------------


def draw(seed: int, theme: Theme | None = None) -> Scenario:
    """The scenario of a seed, of the theme that it draws itself unless one is given."""
    rng = random.Random(f"scenario {seed}")
    drawn = rng.choices(list(Theme), weights=(5, 1, 1, 1, 1))[0]
    theme = drawn if theme is None else theme
    slots = min(rng.randint(1, 16), rng.randint(1, 16))
    workers, servers = rng.randint(1, 4), rng.randint(1, 3)
    is_loader = theme is Theme.MIXED and rng.random() < 0.1
    heal_ms = rng.choice((0, rng.randint(500, 2_000), rng.randint(1_000, 6_000)))
    heal_ns = (heal_ms if theme is Theme.MIXED else 500 + rng.randint(500, 4_000)) * MS
    base = Scenario(
        seed=seed,
        slots=workers if is_loader else slots,
        servers=servers,
        workers=workers,
        block_elements=rng.choice((2, 4, 8)),
        part_blocks_max=rng.choice((1, 1, 2)),
        compute_ns=int(MS * 10 ** rng.uniform(0.0, 2.2)),
        is_overlapped=rng.random() < 0.3,
        absent_of=rng.choice((0, 0, 2, 8, 15)),
        clip_every=rng.choice((0, 0, 1, 2)),
        weather=_weather(rng, heal_ns),
        patience=_patience(rng, heal_ns, is_loader),
        heal_ns=heal_ns,
        is_joining=rng.random() < 0.7,
    )
    job = _with_loader(rng, base) if is_loader else _with_slots(rng, base)
    job = replace(job, tables=_tables(rng, job.block_elements))
    return _with_lanes(_with_theme(rng, _with_faults(rng, job), theme), theme)


def _with_lanes(job: Scenario, theme: Theme) -> Scenario:
    """Draw by which lanes payloads go, and what scripts do with their memory."""
    rng = random.Random(f"lanes {job.seed}")
    placement = rng.choice((Placement.ELEMENTWISE, Placement.ELEMENTWISE, Placement.TENSORWISE))
    tables = tuple(
        msgspec.structs.replace(spec, placement=placement) if spec.rule is Rule.OPTIMIZER else spec
        for spec in job.tables
    )
    return replace(
        job,
        tables=tables,
        shared=rng.choice((0.0, 0.5, 1.0, 1.0)),
        busy=rng.choice((0.0, 0.0, 0.3)),
        copy_ns=job.compute_ns * rng.choice(COPY_TIMES[theme is Theme.LAGGING]) // 20,
        is_lending=rng.random() < 0.7,
        early=rng.choice(list(Early)),
    )


def _with_theme(rng: random.Random, job: Scenario, theme: Theme) -> Scenario:
    if theme is Theme.MIXED:
        return job
    lossy = replace(job.weather, is_reliable=False, drop=rng.choice((0.1, 0.3)))
    beat_ns = 100 * MS
    hasty = replace(job.patience, heartbeat_ns=beat_ns, dead_after_ns=2 * beat_ns)
    if theme is Theme.FENCED:
        weather = replace(lossy, tail=0.05, tail_ns=SECOND)
        return replace(job, patience=hasty, weather=weather)
    if theme is Theme.LAGGING:
        return _lagging(rng, replace(job, weather=replace(lossy, drop=0.1)))
    few = rng.randint(1, 2)
    job = replace(
        job, workers=few, starts_ns=job.starts_ns[:few], factors=job.factors[:few], weather=lossy
    )
    if len(job.starts_ns) < few:
        job = replace(job, workers=1)
    if theme is Theme.DYING:
        return replace(job, faults=_crashes(rng, job), compute_ns=5 * MS)
    plans = passes(job.slots, [1] * rng.randint(1, 2), job.slots, rng.randint(1, job.slots))
    joiners = [rng.randint(0, 600) * MS for _ in range(rng.choice((0, 0, 2)))]
    job = replace(
        job,
        plans=plans,
        starts_ns=(*job.starts_ns, *joiners),
        factors=(*job.factors, *(1.0 for _ in joiners)),
        patience=hasty,
        compute_ns=5 * MS,
    )
    return job if job.is_doomed or rng.random() < 0.8 else _doomed(rng, job)


def _lagging(rng: random.Random, job: Scenario) -> Scenario:
    """More workers than slots, and each stopped twice while the others go on."""
    starts = (0, *(rng.randint(0, 100) * MS for _ in range(rng.randint(2, 3))))
    names = [f"worker-{number}" for number in range(len(starts))]
    stops = [
        Fault(rng.randint(0, job.heal_ns // 2), Kind.FREEZE, name, rng.randint(50, 800) * MS)
        for name in names
        for _ in range(2)
    ]
    slots = rng.randint(1, 2)
    return replace(
        job,
        slots=slots,
        workers=2,
        plans=passes(slots, [6, 6], slots, slots),
        starts_ns=starts,
        factors=(1.0,) * len(starts),
        compute_ns=2 * MS,
        faults=tuple(sorted([*job.faults, *stops], key=lambda fault: fault.at_ns)),
        patience=replace(job.patience, retry_ns=200 * MS),
    )


def _crashes(rng: random.Random, job: Scenario) -> tuple[Fault, ...]:
    """The faults of a job, and each worker dying four times."""
    names = [f"worker-{number}" for number in range(len(job.starts_ns))]
    crashes = [
        Fault(rng.randint(0, job.heal_ns), Kind.CRASH, name, rng.randint(1, 400) * MS)
        for name in names
        for _ in range(4)
    ]
    return tuple(sorted([*job.faults, *crashes], key=lambda fault: fault.at_ns))


def _weather(rng: random.Random, heal_ns: int) -> Weather:
    latency_ns, jitter_ns = (
        int(MS * 10 ** rng.uniform(-1.5, 1.0)),
        int(MS * 10 ** rng.uniform(-1, 1)),
    )
    if heal_ns == 0 or rng.random() < 0.25:
        return Weather(latency_ns, jitter_ns, is_close_lossy=rng.random() < 0.5)
    return Weather(
        latency_ns,
        jitter_ns,
        drop=rng.choice((0.0, 0.02, 0.1, 0.3)),
        duplicate=rng.choice((0.0, 0.05, 0.3)),
        tail=rng.choice((0.0, 0.02, 0.1)),
        tail_ns=rng.choice((200, 2_000, 20_000)) * MS,
        is_reliable=False,
        is_close_lossy=rng.random() < 0.5,
    )


def _patience(rng: random.Random, heal_ns: int, is_loader: bool) -> Patience:
    beat_ns = rng.choice((100, 200, 500)) * MS
    dead_ns = heal_ns + 8 * SECOND if is_loader else beat_ns * rng.randint(2, 6)
    return Patience(
        heartbeat_ns=beat_ns,
        dead_after_ns=dead_ns,
        server_dead_after_ns=heal_ns + rng.randint(5, 15) * SECOND,
        form_timeout_ns=heal_ns + 60 * SECOND,
        rejoin_grace_ns=heal_ns + rng.randint(20, 40) * SECOND,
        connect_timeout_ns=heal_ns + rng.randint(20, 40) * SECOND,
        unreachable_ns=heal_ns + rng.randint(20, 40) * SECOND,
        orphan_after_ns=heal_ns + rng.randint(20, 40) * SECOND,
        retry_ns=rng.choice((50, 200, 1_000)) * MS,
    )


def _with_slots(rng: random.Random, job: Scenario) -> Scenario:
    rounds = [rng.randint(1, 4) for _ in range(rng.choice((1, 1, 2, 3)))]
    batch = rng.randint(max(1, job.slots // 2), 2 * job.slots)
    last = rng.choice((batch, rng.randint(1, batch)))
    joiners = rng.choice((0, 0, 1, 2)) if job.workers < 4 else 0
    span_ns = max(job.heal_ns, 500 * MS)
    starts = [rng.randint(0, 200) * MS for _ in range(job.workers)]
    starts += [rng.randint(0, span_ns // MS) * MS for _ in range(joiners)]
    return replace(
        job,
        plans=passes(job.slots, rounds, batch, last),
        starts_ns=tuple(starts),
        factors=tuple(4.0 if rng.random() < 0.25 else 1.0 for _ in starts),
    )


def _with_loader(rng: random.Random, job: Scenario) -> Scenario:
    """A job with own loaders.

    There a server's report of a late round may end the job, if the worker that it lacks has left in
    an earlier round. If the worker's last heartbeat is lost and the report comes rounds too late,
    the scheduler cannot know better, so no message is that late.
    """
    return replace(
        job,
        weather=replace(job.weather, tail=0.0),
        plans=loader(job.workers),
        loader_rounds=rng.randint(1, 6),
        starts_ns=tuple(rng.randint(0, 200) * MS for _ in range(job.workers)),
        factors=tuple(4.0 if rng.random() < 0.25 else 1.0 for _ in range(job.workers)),
    )


def _tables(rng: random.Random, block: int) -> tuple[TableSpec, ...]:
    def sizes(blocks: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        left = max(1, blocks * block - rng.randint(0, block - 1))
        while left > 0 and len(found) < 4:
            size = left if len(found) == 3 else rng.randint(1, left)
            found.append((size, 0))
            left -= size
        second = rng.randint(1, len(found))
        last = [(size, BUFFER_GROUP if rng.random() < 0.4 else 1) for size, _ in found[second:]]
        return found[:second] + sorted(last, key=lambda item: item[1] == BUFFER_GROUP)

    found = [table("a", sizes(rng.choice((1, 2, 3, 5, 8, 20))))]
    if rng.random() < 0.3:
        found.append(table("b", sizes(rng.choice((1, 2)))))
    if rng.random() < 0.2:
        found.insert(rng.randint(0, 1), table("frozen", sizes(1)[:1], Rule.CONSTANT))
    return tuple(found)


# ---- drawing faults ------------------------------------------------------------------------------


def _with_faults(rng: random.Random, job: Scenario) -> Scenario:
    if job.heal_ns == 0:
        return job
    faults = [_fault(rng, job) for _ in range(rng.randint(0, 6))]
    job = replace(job, faults=tuple(sorted(faults, key=lambda fault: fault.at_ns)))
    return _doomed(rng, job) if not job.loader_rounds and rng.random() < 0.06 else job


def _doomed(rng: random.Random, job: Scenario) -> Scenario:
    """A job in which a server dies, most often before the job is done."""
    at_ns = rng.randint(0, max(1, job.heal_ns // rng.choice((1, 8))))
    death = Fault(at_ns, Kind.CRASH, f"server-{rng.randrange(job.servers)}")
    faults = sorted([*job.faults, death], key=lambda fault: fault.at_ns)
    return replace(job, faults=tuple(faults), is_doomed=True)


def _fault(rng: random.Random, job: Scenario) -> Fault:
    """One fault, over before the world heals. The first worker never leaves for good."""
    workers = [f"worker-{number}" for number in range(len(job.starts_ns))]
    others = ["scheduler", *(f"server-{number}" for number in range(job.servers))]
    at_ns = rng.randint(0, job.heal_ns)
    for_ns = rng.randint(0, job.heal_ns - at_ns)
    if job.loader_rounds:
        kinds = [Kind.FREEZE, Kind.PARTITION, Kind.RECONNECT]
    else:
        kinds = [Kind.CRASH, Kind.CRASH, Kind.FREEZE, Kind.PARTITION, Kind.RECONNECT, Kind.DRAIN]
    kind = rng.choice(kinds)
    worker = rng.choice(workers)
    if kind is Kind.PARTITION:
        pair = [worker, rng.choice(others)]
        if rng.random() < 0.2:
            pair = ["scheduler", rng.choice(others[1:])]
        rng.shuffle(pair)
        return Fault(at_ns, kind, pair[0], for_ns, pair[1])
    if kind is Kind.FREEZE:
        return Fault(at_ns, kind, rng.choice([worker, worker, *others]), for_ns)
    if kind is Kind.CRASH and (worker == workers[0] or rng.random() < 0.6):
        return Fault(at_ns, kind, worker, max(1, min(for_ns, rng.randint(1, 2_000) * MS)))
    if kind is Kind.DRAIN and worker == workers[0]:
        return Fault(at_ns, Kind.RECONNECT, worker)
    return Fault(at_ns, kind, worker)
