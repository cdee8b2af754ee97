"""Draws seeds whose contributions are applied one by one."""

import random
from dataclasses import replace

import msgspec

from tests.sim.scenario import Scenario, Theme, passes, table
from tests.sim.world import MS
from treefold.common.spec import Compensation, Consistency, ConsistencyKind, Rule

LIKE = (Theme.MIXED, Theme.FENCED, Theme.DYING, Theme.ENDING, Theme.LAGGING, *[Theme.CHAINED] * 3)


def like(seed: int, *, every: bool = False) -> Theme:
    """Of which other theme the rest of such a seed is; of ``every`` one, with checkpoints too."""
    if every and seed % 8 == 0:
        return Theme.SAVED
    return random.Random(f"like {seed}").choice(LIKE)


def apart(job: Scenario) -> Scenario:
    """The same with contributions that are applied one by one."""
    rng = random.Random(f"apart {job.seed}")
    rule = Consistency(ConsistencyKind.ASYNC)
    if rng.random() < 0.5 and not job.loader_rounds:
        rule = Consistency(ConsistencyKind.SSP, rng.choice((0, 0, 1, 2, 5)))
    if rng.random() < 0.3:
        rule = msgspec.structs.replace(rule, compensation=Compensation.LR_STALENESS)
    bound = random.Random(f"bound {job.seed}")
    if rule.kind is ConsistencyKind.ASYNC and not job.loader_rounds and bound.random() < 0.3:
        rule = msgspec.structs.replace(rule, staleness_max=bound.randint(1, 4))
    tables = tuple(
        msgspec.structs.replace(spec, consistency=rule) if spec.rule is Rule.OPTIMIZER else spec
        for spec in job.tables
    )
    job = replace(job, tables=tables, clip_every=0, is_streaming=False)
    if job.replicas == 1 or rng.random() < 0.3:
        return job
    # Several workers push to one shard while its servers die, and what those say is lost.
    workers = rng.randint(2, 3)
    large = table("a", [(rng.randint(20, 40), 0), (rng.randint(8, 20), 0)])
    return replace(
        job,
        tables=(msgspec.structs.replace(large, consistency=rule),),
        block_elements=4,
        part_blocks_max=1,
        absent_of=rng.choice((0, 2)),
        replicas=3,
        servers=max(3, job.servers),
        workers=workers,
        slots=workers,
        starts_ns=(0,) * workers,
        factors=(1.0,) * workers,
        plans=passes(workers, [rng.randint(3, 7)], 16, 16),
        weather=replace(job.weather, drop=rng.choice((0.1, 0.3)), is_reliable=False),
        compute_ns=rng.choice((2, 5, 20)) * MS,
        shards_min=1,
    )
