"""Draws small numbers, and passes over data shards in the place of some others."""

import random
from dataclasses import replace

import msgspec

from tests.sim.scenario import Scenario
from treefold.common.plan import LoopPlan, Policy, batches

SHARE = 0.15  # of all seeds with leased slots


def few(rng: random.Random, low: int, high: int) -> int:
    """A number that is near ``low`` most often, and now and then as high as can be."""
    return min(rng.randint(low, high) for _ in range(rng.choice((1, 4, 8, 8))))


def dealt(job: Scenario) -> Scenario:
    """The same job, for some seeds with slots that have data shards of their own."""
    rng = random.Random(f"dealt {job.seed}")
    if rng.random() >= SHARE or job.loader_rounds:
        return job
    policy = rng.choice(list(Policy))
    return replace(job, plans=tuple(_dealt(rng, plan, policy) for plan in job.plans))


def _dealt(rng: random.Random, plan: LoopPlan, policy: Policy) -> LoopPlan:
    """As many rounds, in which fewer and fewer slots take part."""
    lengths = sorted((rng.randint(0, plan.rounds) for _ in range(plan.slots)), reverse=True)
    size = rng.randint(1, 3)
    shards = [_cut(rng, length, size) for length in [plan.rounds, *lengths[1:]]]
    return msgspec.structs.replace(
        plan,
        samples=sum(map(sum, shards)),
        batch_size=size * plan.slots,
        policy=policy,
        lengths=batches(shards, size * plan.slots),
        shards=shards,
    )


def _cut(rng: random.Random, length: int, size: int) -> list[int]:
    """Shards of so many batches together, the last of each short or not."""
    found: list[int] = []
    while length:
        some = rng.randint(1, length)
        found.append(some * size - rng.randint(0, size - 1))
        length -= some
    return found
