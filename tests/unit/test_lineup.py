"""Which batches a round has, and what it leaves: every batch once, whoever is late."""

import random

from treefold.common.lineup import Lineup, after, lineup
from treefold.common.plan import LoopPlan, PlanKind
from treefold.common.round_state import NO_PROGRESS, Progress


def plan(index: int, first: int, rounds: int, slots: int, last: int) -> LoopPlan:
    """A pass of so many rounds, with ``last`` samples in the last one."""
    samples = (rounds - 1) * slots + last
    return LoopPlan(PlanKind.SLOTS, index, first, rounds, slots, samples, slots, index, True, 0)


def run(
    rng: random.Random, plans: list[LoopPlan], progress: Progress, *, is_requeued: bool
) -> tuple[list[list[tuple[int, int]]], Progress]:
    """Close rounds with slots by chance; the batches that are in, by pass."""
    found: list[list[tuple[int, int]]] = []
    for one in plans:
        found.append([])
        while True:
            tried = lineup(one, progress)
            if not tried.batches:
                break
            due = len(tried.batches)
            slots = sorted(rng.sample(range(due), rng.randint(1, due)))
            found[-1] += [tried.batches[slot] for slot in slots]
            progress = after(progress, tried, slots, b"", is_requeued=is_requeued)
            assert len(progress.again) < 2 * one.slots
    return found, progress


def test_every_batch_of_a_pass_is_in_once_before_the_next_pass_begins() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        slots, first = rng.randint(1, 6), 0
        plans = []
        for index in range(3):
            count = rng.randint(1, 6)
            plans.append(plan(index, first, count, slots, rng.randint(1, slots)))
            first += count
        found, progress = run(rng, plans, NO_PROGRESS, is_requeued=True)
        for one, batches in zip(plans, found, strict=True):
            rounds = range(one.first_round, one.end_round)
            planned = [(r, slot) for r in rounds for slot in range(one.active_slots(r))]
            assert sorted(batches) == planned, seed
        assert (progress.next, progress.again) == (first, [])


def test_what_is_dropped_takes_no_further_rounds() -> None:
    one = plan(0, 0, 5, 4, 2)
    found, progress = run(random.Random(1), [one], NO_PROGRESS, is_requeued=False)
    assert len(found[0]) + progress.missed == 18
    assert (progress.next, progress.again) == (5, [])
    assert progress.missed > 0


def test_late_batches_wait_until_they_are_a_round_or_the_pass_ends() -> None:
    one = plan(0, 0, 3, 4, 4)
    progress = after(NO_PROGRESS, lineup(one, NO_PROGRESS), [0, 1], b"", is_requeued=True)
    assert progress == Progress(1, [(0, 2), (0, 3)], 2, b"")
    tried = lineup(one, progress)
    assert tried == Lineup([(1, 0), (1, 1), (1, 2), (1, 3)], is_again=False)
    progress = after(progress, tried, [2, 3], b"", is_requeued=True)
    tried = lineup(one, progress)
    assert tried == Lineup([(0, 2), (0, 3), (1, 0), (1, 1)], is_again=True)
    progress = after(progress, tried, [0, 1, 2], b"", is_requeued=True)
    assert (progress.next, progress.again) == (2, [(1, 1)])
    progress = after(progress, lineup(one, progress), [0, 1, 2, 3], b"", is_requeued=True)
    assert lineup(one, progress) == Lineup([(1, 1)], is_again=True)


def test_a_pass_that_others_have_left_has_no_rounds() -> None:
    one, two = plan(0, 0, 3, 2, 2), plan(1, 3, 3, 2, 2)
    progress = Progress(4, [(3, 1)], 1, b"")
    assert not lineup(one, progress).batches
    assert lineup(two, progress).batches == [(4, 0), (4, 1)]
