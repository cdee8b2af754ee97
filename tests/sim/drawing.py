"""Draws what a seed simulates.

Each seed draws its own mix, most often a small one: a few rounds with many faults in them find more
in a second than many rounds with a few. Faults fall into the time that the job takes. Limits of
patience are drawn so that no fault can end the job rightfully: whatever happens before
`Scenario.heal_ns`, every script has to finish afterwards. Seeds that a server does not survive
(`Scenario.is_doomed`) are the exception, and there every script has to end with an error.
"""

import random
from dataclasses import replace

import msgspec

from tests.sim.apart import apart, like
from tests.sim.beside import beside, mixed_up
from tests.sim.dealing import dealt, few
from tests.sim.guarded import varied
from tests.sim.network import Weather
from tests.sim.scenario import Early, Fault, Kind, Patience, Scenario, Theme, loader, passes, table
from tests.sim.world import MS, SECOND
from treefold.common.spec import BUFFER_GROUP, Placement, Rule, TableSpec

WEIGHTS = {
    Theme.MIXED: 11,
    Theme.FENCED: 2,
    Theme.DYING: 2,
    Theme.ENDING: 2,
    Theme.LAGGING: 2,
    Theme.STREAMING: 1,  # each takes as long as three others
    Theme.CHAINED: 5,
    Theme.APART: 4,
    Theme.SAVED: 4,
}
COPY_TIMES = {False: (0, 1, 20), True: (0, 20, 100)}
"""Twentieths of a slot's time that it takes to copy half of a version, and where workers lag."""

FORMING_NS = 400 * MS  # until the first round begins, about
SAVED_NS = 900 * MS  # until the initial values are in a checkpoint, about
WORK_MAX = 40  # parts, times workers, times rounds of most seeds
RICH = 0.1  # of the seeds may have more
SKEWS_PPM = (0, 200, 200, 200, 200, 200, 2_000, 50_000)


def draw(seed: int, theme: Theme | None = None) -> Scenario:
    """The scenario of a seed, of the theme that it draws itself unless one is given."""
    is_wanted = theme in (Theme.QUORUM, Theme.GUARDED)
    job = _draw(seed, like(seed, every=True) if is_wanted else theme)
    return dealt(varied(job, theme))


def _draw(seed: int, theme: Theme | None) -> Scenario:
    rng = random.Random(f"scenario {seed}")
    drawn = rng.choices(list(WEIGHTS), weights=list(WEIGHTS.values()))[0]
    theme = mixed_up(seed, drawn) if theme is None else theme
    if theme in (Theme.APART, Theme.BESIDE):
        change = beside if theme is Theme.BESIDE else apart
        return change(_draw(seed, like(seed, every=True)))
    workers = rng.choice((1, 2, 2, 2, 2, 3, 3, 4))
    is_loader = theme is Theme.MIXED and rng.random() < 0.1
    base = Scenario(
        seed=seed,
        slots=workers if is_loader else few(rng, 1, 16),
        servers=rng.choice((1, 1, 2, 2, 3)),
        workers=workers,
        block_elements=rng.choice((2, 4, 8)),
        part_blocks_max=rng.choice((1, 1, 2)),
        compute_ns=int(MS * 10 ** rng.uniform(0.0, 2.2)),
        is_overlapped=rng.random() < 0.3,
        absent_of=rng.choice((0, 0, 2, 8, 15)),
        clip_every=rng.choice((0, 0, 1, 2)),
        is_joining=rng.random() < 0.7,
        skew_ppm=rng.choice(SKEWS_PPM),
    )
    job = replace(base, tables=_tables(rng, base.block_elements))
    job = _with_loader(rng, job) if is_loader else _with_slots(rng, job)
    job = _with_times(rng, job, is_mixed=theme is Theme.MIXED)
    if is_loader:
        job = _with_patient_scheduler(job)
    job = _with_lanes(_with_theme(rng, _with_faults(rng, job), theme), theme)
    if theme is Theme.CHAINED:
        return _chained(job)
    if theme is Theme.SAVED:
        return _saved(_chained(job))
    return _streaming(job) if theme is Theme.STREAMING else job


def _with_times(rng: random.Random, job: Scenario, *, is_mixed: bool) -> Scenario:
    """Draw when the world heals, how the network is until then, and limits of patience."""
    heal_ns = 500 * MS + rng.randint(300, 2_000) * MS
    if is_mixed:
        span_ns = min(3 * SECOND, _span_ns(job))
        heal_ns = 0 if rng.random() < 0.15 else 300 * MS + int(span_ns * rng.uniform(0.3, 2.0))
    joiners = rng.choice((0, 0, 1, 2)) if job.workers < 4 and not job.loader_rounds else 0
    span_ns = max(heal_ns, 500 * MS)
    starts = [rng.randint(0, 200) * MS for _ in range(job.workers)]
    starts += [rng.randint(0, span_ns // MS) * MS for _ in range(joiners)]
    return replace(
        job,
        heal_ns=heal_ns,
        weather=_weather(rng, heal_ns),
        patience=_patience(rng, heal_ns),
        starts_ns=tuple(starts),
        factors=tuple(4.0 if rng.random() < 0.25 else 1.0 for _ in starts),
    )


def _span_ns(job: Scenario) -> int:
    """About how long a job takes if all is well."""
    return FORMING_NS + job.rounds * (-(-job.slots // job.workers) * job.compute_ns + 20 * MS)


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
        is_streaming=rng.random() < 0.7,
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
    if theme in (Theme.STREAMING, Theme.CHAINED, Theme.SAVED):
        return replace(job, weather=lossy)
    few_workers = rng.randint(1, 2)
    starts_ns, factors = job.starts_ns[:few_workers], job.factors[:few_workers]
    job = replace(job, workers=few_workers, starts_ns=starts_ns, factors=factors, weather=lossy)
    if len(job.starts_ns) < few_workers:
        job = replace(job, workers=1)
    if theme is Theme.DYING:
        return replace(job, faults=_crashes(rng, job))
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
    heal_ns = rng.randint(700, 2_500) * MS
    stops = [
        Fault(rng.randint(200 * MS, heal_ns), _stop(rng), name, rng.choice((50, 200, 800)) * MS)
        for name in names
        for _ in range(2)
    ]
    slots, rounds = rng.randint(1, 2), [rng.randint(3, 6) for _ in range(2)]
    rounds = _bounded(rng, replace(job, workers=len(starts)), rounds, 3)
    return replace(
        job,
        slots=slots,
        workers=2,
        plans=passes(slots, rounds, slots, slots),
        starts_ns=starts,
        factors=(1.0,) * len(starts),
        compute_ns=2 * MS,
        heal_ns=heal_ns,
        faults=_in_time(job, heal_ns, stops),
        patience=replace(_until(job.patience, heal_ns - job.heal_ns), retry_ns=200 * MS),
    )


def _streaming(job: Scenario) -> Scenario:
    """Workers that begin with what they have, lose the rest, and die."""
    rng = random.Random(f"streams {job.seed}")
    count = rng.randint(2, 3)
    slots = few(rng, count, 6)
    beat_ns = rng.choice((100, 200)) * MS
    sizes = [(rng.randint(8, 20), 0) for _ in range(rng.randint(1, 3))]
    sizes += [(3, BUFFER_GROUP)] * rng.randint(0, 1)
    tables = (table("a", sizes), *[table("b", [(9, 0)])] * rng.randint(0, 1))
    heal_ns = rng.randint(700, 2_500) * MS
    job = replace(
        job,
        slots=slots,
        workers=count,
        tables=tables,
        block_elements=4,
        plans=passes(slots, [rng.randint(3, 6), rng.randint(2, 4)], slots, slots),
        starts_ns=(0,) * count,
        factors=(1.0, 4.0, 1.0)[:count],
        clip_every=rng.choice((0, 0, 3)),
        absent_of=rng.choice((0, 2)),
        compute_ns=rng.choice((5, 20)) * MS,
        is_overlapped=rng.random() < 0.8,
        weather=replace(job.weather, drop=rng.choice((0.02, 0.1, 0.3))),
        copy_ns=rng.choice((0, MS, 20 * MS)),
        is_doomed=False,
        heal_ns=heal_ns,
        patience=replace(
            _until(job.patience, heal_ns - job.heal_ns),
            heartbeat_ns=beat_ns,
            dead_after_ns=rng.randint(2, 4) * beat_ns,
            retry_ns=200 * MS,
        ),
        faults=(),
    )
    return replace(job, faults=_crashes(rng, job), is_streaming=True)


def _chained(job: Scenario) -> Scenario:
    """Servers that die one after the other, are cut off, and come back."""
    rng = random.Random(f"chains {job.seed}")
    replicas = rng.choice((2, 2, 2, 3))
    servers = rng.randint(replicas, 4)
    workers = rng.choice((1, 1, 2, 2, 3))
    slots = rng.randint(workers, few(rng, workers, 6))
    beat_ns = rng.choice((100, 200, 200)) * MS
    weather = job.weather
    if rng.random() < 0.5:
        weather = replace(weather, is_reliable=True, tail=0.0)
    heal_ns = rng.randint(1_000, rng.choice((2_000, 5_000))) * MS
    rounds = [rng.randint(3, 12) for _ in range(rng.choice((1, 1, 2)))]
    job = replace(job, workers=workers, tables=_tables(rng, job.block_elements))
    rounds = _bounded(rng, job, rounds, 4)
    patience = replace(
        _until(job.patience, heal_ns - job.heal_ns),
        heartbeat_ns=beat_ns,
        dead_after_ns=rng.randint(2, 4) * beat_ns,
        retry_ns=rng.choice((100, 200)) * MS,
    )
    known = [f"worker-{number}" for number in range(workers)]
    faults = _of_servers(rng, servers, heal_ns)
    faults += [
        fault
        for fault in job.faults
        if fault.target in known
        and fault.kind is not Kind.DRAIN
        and not fault.other.startswith("server")
    ]
    return replace(
        job,
        servers=servers,
        slots=slots,
        replicas=replicas,
        late_ns=tuple(rng.randint(0, heal_ns) for _ in range(rng.choice((0, 0, 1, 2)))),
        patience=patience,
        weather=weather,
        starts_ns=(0,) * workers,
        factors=(1.0,) * workers,
        plans=passes(slots, rounds, slots, slots),
        loader_rounds=0,
        compute_ns=rng.choice((5, 20, 60)) * MS,
        copy_ns=rng.choice((0, 0, MS)),
        heal_ns=heal_ns,
        faults=_in_time(replace(job, faults=()), heal_ns, faults),
        is_doomed=False,
        shards_min=rng.choice((1, 2, 8, 8)),
    )


def _saved(job: Scenario) -> Scenario:
    """The same with checkpoints, and most often with one copy of each shard."""
    rng = random.Random(f"saved {job.seed}")
    later_ns = rng.choice((0, SAVED_NS, SAVED_NS, SAVED_NS))
    patience = replace(
        _until(job.patience, later_ns + 20 * SECOND),
        server_dead_after_ns=rng.randint(2, 8) * job.patience.heartbeat_ns,
    )
    return replace(
        job,
        replicas=rng.choice((1, 1, 1, 2)),
        patience=patience,
        compute_ns=rng.choice((5, 20, 40)) * MS,
        heal_ns=job.heal_ns + later_ns,
        faults=tuple(replace(fault, at_ns=fault.at_ns + later_ns) for fault in job.faults),
        checkpoint_every=rng.choice((1, 2, 3, 5)),
        damaged=rng.choice((0.0, 0.0, 0.1, 0.4)),
    )


def _of_servers(rng: random.Random, servers: int, heal_ns: int) -> list[Fault]:
    """What happens to servers and the scheduler, one after the other."""
    faults: list[Fault] = []
    at_ns = rng.randint(0, 600) * MS
    pause_ms = rng.choice((500, 2_000))
    while at_ns < heal_ns:
        server = f"server-{rng.randrange(servers)}"
        for_ns = rng.randint(1, 800) * MS
        kind = rng.choice((Kind.CRASH, Kind.CRASH, _stop(rng), Kind.PARTITION))
        if kind is Kind.PARTITION:
            others = ["scheduler", *(f"server-{number}" for number in range(servers))]
            pair = [server, rng.choice([other for other in others if other != server])]
            rng.shuffle(pair)
            faults.append(Fault(at_ns, kind, pair[0], for_ns, pair[1]))
        elif rng.random() < 0.25:
            faults.append(Fault(at_ns, rng.choice((Kind.CRASH, _stop(rng))), "scheduler", for_ns))
        else:
            faults.append(Fault(at_ns, kind, server, for_ns))
        at_ns += rng.randint(20, pause_ms) * MS
    return faults


def _stop(rng: random.Random) -> Kind:
    return rng.choice((Kind.FREEZE, Kind.FREEZE, Kind.SUSPEND))


def _in_time(job: Scenario, heal_ns: int, more: list[Fault]) -> tuple[Fault, ...]:
    """The faults of a job and more, in order, and none goes on when the world has healed."""
    known = [fault for fault in [*job.faults, *more] if fault.at_ns < heal_ns]
    cut = [
        fault
        if fault.kind is Kind.CRASH
        else replace(fault, for_ns=min(fault.for_ns, heal_ns - fault.at_ns))
        for fault in known
    ]
    return tuple(sorted(cut, key=lambda fault: fault.at_ns))


def _until(patience: Patience, later_ns: int) -> Patience:
    """The same patience in a world that heals so much later."""
    return replace(
        patience,
        server_dead_after_ns=patience.server_dead_after_ns + later_ns,
        form_timeout_ns=patience.form_timeout_ns + later_ns,
        rejoin_grace_ns=patience.rejoin_grace_ns + later_ns,
        connect_timeout_ns=patience.connect_timeout_ns + later_ns,
        unreachable_ns=patience.unreachable_ns + later_ns,
        orphan_after_ns=patience.orphan_after_ns + later_ns,
    )


def _crashes(rng: random.Random, job: Scenario) -> tuple[Fault, ...]:
    """The faults of a job, and each worker dying a few times."""
    names = [f"worker-{number}" for number in range(len(job.starts_ns))]
    crashes = [
        Fault(rng.randint(0, job.heal_ns), Kind.CRASH, name, rng.randint(1, 400) * MS)
        for name in names
        for _ in range(rng.randint(2, 4))
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


def _patience(rng: random.Random, heal_ns: int) -> Patience:
    beat_ns = rng.choice((200, 500, 500)) * MS
    return Patience(
        heartbeat_ns=beat_ns,
        dead_after_ns=beat_ns * rng.randint(2, 6),
        server_dead_after_ns=heal_ns + rng.randint(4, 10) * SECOND,
        form_timeout_ns=heal_ns + 15 * SECOND,
        rejoin_grace_ns=heal_ns + rng.randint(20, 40) * SECOND,
        connect_timeout_ns=heal_ns + rng.randint(20, 40) * SECOND,
        unreachable_ns=heal_ns + rng.randint(20, 40) * SECOND,
        orphan_after_ns=heal_ns + rng.randint(20, 40) * SECOND,
        retry_ns=rng.choice((50, 200, 200, 1_000)) * MS,
    )


def _with_slots(rng: random.Random, job: Scenario) -> Scenario:
    rounds = [few(rng, 1, 5) for _ in range(rng.choice((1, 1, 2, 3)))]
    rounds = _bounded(rng, job, rounds, 1)
    batch = rng.randint(max(1, job.slots // 2), 2 * job.slots)
    last = rng.choice((batch, rng.randint(1, batch)))
    return replace(job, plans=passes(job.slots, rounds, batch, last))


def _bounded(rng: random.Random, job: Scenario, rounds: list[int], least: int) -> list[int]:
    """As many rounds as most seeds may have; the messages of each go with parts and workers."""
    if rng.random() < RICH:
        return rounds
    most = WORK_MAX // (len(rounds) * _parts(job) * job.workers)
    return [min(count, max(least, most)) for count in rounds]


def _parts(job: Scenario) -> int:
    """About how many parts all tables of a job have."""
    elements = sum(tensor.elements for spec in job.tables for tensor in spec.tensors)
    return max(1, elements // (job.block_elements * job.part_blocks_max))


def _with_loader(rng: random.Random, job: Scenario) -> Scenario:
    return replace(job, plans=loader(job.workers), loader_rounds=few(rng, 1, 6))


def _with_patient_scheduler(job: Scenario) -> Scenario:
    """A job with own loaders, which no worker can be given up in.

    There a server's report of a late round may end the job, if the worker that it lacks has left in
    an earlier round. If the worker's last heartbeat is lost and the report comes rounds too late,
    the scheduler cannot know better, so no message is that late.
    """
    patience = replace(job.patience, dead_after_ns=job.heal_ns + 8 * SECOND)
    return replace(job, weather=replace(job.weather, tail=0.0), patience=patience)


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

    found = [table("a", sizes(rng.choice((1, 1, 2, 2, 3, 3, 5, few(rng, 5, 20)))))]
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
    at_ns = rng.randint(0, min(job.heal_ns, _span_ns(job)))
    for_ns = rng.randint(0, job.heal_ns - at_ns)
    if job.loader_rounds:
        kinds = [_stop(rng), Kind.PARTITION, Kind.RECONNECT]
    else:
        kinds = [Kind.CRASH, Kind.CRASH, _stop(rng), Kind.PARTITION, Kind.RECONNECT, Kind.DRAIN]
    kind = rng.choice(kinds)
    worker = rng.choice(workers)
    if kind is Kind.PARTITION:
        pair = [worker, rng.choice(others)]
        if rng.random() < 0.2:
            pair = ["scheduler", rng.choice(others[1:])]
        rng.shuffle(pair)
        return Fault(at_ns, kind, pair[0], for_ns, pair[1])
    if kind in (Kind.FREEZE, Kind.SUSPEND):
        return Fault(at_ns, kind, rng.choice([worker, worker, *others]), for_ns)
    if kind is Kind.CRASH and (worker == workers[0] or rng.random() < 0.6):
        return Fault(at_ns, kind, worker, max(1, min(for_ns, rng.randint(1, 2_000) * MS)))
    if kind is Kind.DRAIN and worker == workers[0]:
        return Fault(at_ns, Kind.RECONNECT, worker)
    return Fault(at_ns, kind, worker)
