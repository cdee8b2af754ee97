"""What one slow worker costs, in simulated time; ``bench`` measures it with processes."""

from tests.sim.stragglers import figure


def test_one_of_four_workers_slowed_four_times_costs_at_most_two_fifths_of_a_round() -> None:
    assert 1.2 <= figure(is_elastic=True).ratio <= 1.4


def test_leases_that_never_move_make_every_round_as_slow_as_the_slowest_worker() -> None:
    assert figure(is_elastic=False).ratio > 3.5
