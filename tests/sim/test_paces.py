"""What stragglers cost in every mode, in simulated time; `bench.stragglers` has the table."""

from functools import cache

import pytest
import torch

from tests.sim.paces import MODES, SLOTS, STALLS_OF, Schedule, Trouble, is_stalled, schedule
from tests.sim.training import Lesson, replay

ROUNDS = 40
LOSS = 1.0  # reached after 25 rounds or so
NAMES = [mode.name for mode in MODES]


@cache
def made(name: str, trouble: Trouble) -> Schedule:
    """What was applied in a mode."""
    (mode,) = [one for one in MODES if one.name == name]
    return schedule(mode, trouble, ROUNDS)


@cache
def taught(name: str, trouble: Trouble) -> Lesson:
    """What came of it."""
    return replay(made(name, trouble).steps, SLOTS, seed=1)


def times(name: str, trouble: Trouble) -> int:
    """Time of a mode."""
    return made(name, trouble).took_ns


def slowed(name: str, trouble: Trouble) -> float:
    """How many times longer a mode takes than with workers that are all alike."""
    return times(name, trouble) / times(name, Trouble.NONE)


def delayed(name: str, trouble: Trouble) -> float:
    """How many times longer a mode takes to a loss than with workers that are all alike."""
    found = [taught(name, one).reached_ns(LOSS) for one in (trouble, Trouble.NONE)]
    assert None not in found, f"{name} never reaches the loss"
    return (found[0] or 0) / (found[1] or 1)


def test_with_fixed_shares_one_slow_worker_costs_rounds_its_slowness_and_contributions_little() -> (
    None
):
    assert slowed("sync, fixed shares", Trouble.ONE) > 3.5
    assert slowed("async, fixed shares", Trouble.ONE) < 1.2


def test_a_bound_does_not_cure_a_worker_that_stays_slow() -> None:
    assert slowed("ssp 10, fixed shares", Trouble.ONE) > 3.0


def test_a_quorum_goes_on_without_a_worker_that_stays_slow() -> None:
    assert slowed("quorum 28, fixed shares", Trouble.ONE) < 1.6
    assert times("quorum 28, fixed shares", Trouble.RANDOM) < times(
        "sync, fixed shares", Trouble.RANDOM
    )


def test_slots_that_move_cure_it_in_every_mode() -> None:
    for name in ("sync", "quorum 28", "ssp 3", "async"):
        assert slowed(name, Trouble.ONE) < 1.35, name


def test_a_bound_absorbs_stalls_that_pass() -> None:
    bounded = times("ssp 10, fixed shares", Trouble.RANDOM)
    assert bounded < times("sync, fixed shares", Trouble.RANDOM) / 1.7


def test_slots_do_not_run_away_from_stalls_that_pass() -> None:
    moving = times("async", Trouble.RANDOM)
    assert moving < 1.35 * times("async, fixed shares", Trouble.RANDOM)


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("sync", 1.0, 1.35),
        ("async", 1.0, 1.35),
        ("sync, fixed shares", 3.5, 4.2),
        ("async, fixed shares", 0.9, 1.2),
    ],
)
def test_a_loss_is_delayed_by_a_slow_worker_as_contributions_are(
    name: str, least: float, most: float
) -> None:
    assert least <= delayed(name, Trouble.ONE) <= most


@pytest.mark.parametrize("name", NAMES)
def test_every_mode_learns_as_much_from_as_many_contributions(name: str) -> None:
    usual = taught("sync", Trouble.NONE)
    found = taught(name, Trouble.ONE)
    assert abs(found.accuracy - usual.accuracy) < 0.04
    assert abs(found.losses[-1] - usual.losses[-1]) < 0.1 * usual.losses[-1]


def test_rounds_come_to_the_same_bits_whoever_is_slow_and_asynchronous_steps_do_not() -> None:
    usual = taught("sync", Trouble.NONE).values
    assert torch.equal(taught("sync, fixed shares", Trouble.ONE).values, usual)
    assert not torch.equal(
        taught("async", Trouble.ONE).values, taught("async", Trouble.NONE).values
    )


def test_contributions_are_as_stale_as_there_are_other_workers() -> None:
    for name in ("ssp 3", "async", "async, fixed shares"):
        assert 5.0 < made(name, Trouble.ONE).staleness < 9.0, name


def test_a_body_stalls_in_every_mode_or_in_none_and_may_do_better_when_computed_again() -> None:
    first = [is_stalled(1, round_, 3, 0) for round_ in range(2_000)]
    again = [is_stalled(1, round_, 3, 1) for round_ in range(2_000)]
    other = [is_stalled(2, round_, 3, 0) for round_ in range(2_000)]
    assert sum(first) == pytest.approx(2_000 * STALLS_OF, rel=0.3)
    assert first not in (again, other)
    assert first == [is_stalled(1, round_, 3, 0) for round_ in range(2_000)]
