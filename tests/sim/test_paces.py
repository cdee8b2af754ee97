"""What stragglers cost in every mode, in simulated time; `bench.stragglers` has the table."""

from functools import cache

from tests.sim.paces import MODES, Trouble, time_ns

ROUNDS = 15


@cache
def times(name: str, trouble: Trouble) -> int:
    """Time of a mode."""
    (mode,) = [one for one in MODES if one.name == name]
    return time_ns(mode, trouble, ROUNDS)


def slowed(name: str, trouble: Trouble) -> float:
    """How many times longer a mode takes than with workers that are all alike."""
    return times(name, trouble) / times(name, Trouble.NONE)


def test_with_fixed_shares_one_slow_worker_costs_rounds_its_slowness_and_contributions_little() -> (
    None
):
    assert slowed("sync, fixed shares", Trouble.ONE) > 3.5
    assert slowed("async, fixed shares", Trouble.ONE) < 1.2


def test_a_bound_does_not_cure_a_worker_that_stays_slow() -> None:
    assert slowed("ssp 10, fixed shares", Trouble.ONE) > 3.0


def test_slots_that_move_cure_it_in_every_mode() -> None:
    for name in ("sync", "ssp 3", "async"):
        assert slowed(name, Trouble.ONE) < 1.35, name


def test_a_bound_absorbs_stalls_that_pass() -> None:
    bounded = times("ssp 10, fixed shares", Trouble.RANDOM)
    assert bounded < times("sync, fixed shares", Trouble.RANDOM) / 1.7


def test_slots_do_not_run_away_from_stalls_that_pass() -> None:
    moving = times("async", Trouble.RANDOM)
    assert moving < 1.35 * times("async, fixed shares", Trouble.RANDOM)
