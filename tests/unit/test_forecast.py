"""What a worker is thought to need for its next slot."""

from treefold.worker.forecast import HUNG_FACTOR, REMEMBERED, MedianForecast


def told(times: list[int]) -> list[int]:
    """The predictions after each slot."""
    forecast = MedianForecast()
    return [forecast.add(took) for took in times]


def test_nothing_is_predicted_before_the_first_slot() -> None:
    assert MedianForecast().slot_time_ns == 0


def test_a_slot_that_was_held_up_changes_nothing() -> None:
    assert told([100, 5_000, 100, 100, 5_000, 100]) == [100] * 6


def test_a_change_of_pace_is_known_when_most_of_the_remembered_slots_have_it() -> None:
    needed = REMEMBERED // 2 + 1
    assert told([100] * REMEMBERED + [400] * needed)[-2:] == [100, 400]


def test_a_slot_that_may_never_end_counts_while_it_lasts() -> None:
    forecast = MedianForecast()
    forecast.add(100)
    assert forecast.while_in_hand(HUNG_FACTOR * 100) == 100
    assert forecast.while_in_hand(HUNG_FACTOR * 100 + 1) == HUNG_FACTOR * 100 + 1
    assert forecast.slot_time_ns == 100
