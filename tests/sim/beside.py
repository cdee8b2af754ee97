"""Draws seeds in which only some tables have rounds; contributions to others are applied singly."""

import random
from dataclasses import replace

import msgspec

from tests.sim.scenario import Scenario, Theme, table
from treefold.common.spec import Compensation, Consistency, ConsistencyKind, Rule, TableSpec

SHARE = 0.4  # of the seeds with asynchronous tables


def mixed_up(seed: int, drawn: Theme) -> Theme:
    """Seeds with asynchronous tables have others too, some of them."""
    is_both = random.Random(f"is beside {seed}").random() < SHARE
    return Theme.BESIDE if drawn is Theme.APART and is_both else drawn


def beside(job: Scenario) -> Scenario:
    """The same with contributions to some tables applied one by one."""
    rng = random.Random(f"beside {job.seed}")
    rule = Consistency(ConsistencyKind.ASYNC)
    if rng.random() < 0.3 and not job.loader_rounds:
        rule = Consistency(ConsistencyKind.SSP, rng.choice((0, 1, 5)))
    if rng.random() < 0.3:
        rule = msgspec.structs.replace(rule, compensation=Compensation.LR_STALENESS)
    tables = list(job.tables)
    trained = [number for number, spec in enumerate(tables) if spec.rule is Rule.OPTIMIZER]
    if len(trained) < 2:
        size = rng.randint(1, 3) * job.block_elements
        trained.append(len(tables))
        tables.append(_placed(table("beside", [(size, 0)]), tables[trained[0]]))
    rng.shuffle(trained)
    for number in trained[: rng.randint(1, len(trained) - 1)]:
        tables[number] = msgspec.structs.replace(tables[number], consistency=rule)
    return replace(job, tables=tuple(tables))


def _placed(spec: TableSpec, like: TableSpec) -> TableSpec:
    return msgspec.structs.replace(spec, placement=like.placement)
