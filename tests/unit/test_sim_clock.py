"""Clocks of the simulator."""

import random

import pytest

from tests.sim.clock import Clock, draw_clock

S = 1_000_000_000


@pytest.mark.parametrize("ppm", [-50_000, -1, 0, 7, 200, 50_000])
def test_a_time_that_a_clock_is_to_show_is_shown_then_and_not_before(ppm: int) -> None:
    clock = Clock(12_345, ppm)
    times = [clock.true_ns(shown_ns) for shown_ns in range(20_000, 20_400)]
    assert [clock.shows(ns) >= shown for shown, ns in enumerate(times, 20_000)] == [True] * 400
    assert [clock.shows(ns - 1) < shown for shown, ns in enumerate(times, 20_000)] == [True] * 400


def test_a_fast_clock_shows_more_time_than_has_passed() -> None:
    clock = Clock(5, 200)
    assert clock.shows(10 * S) == 5 + 10 * S + 2_000_000


def test_a_clock_that_was_stopped_is_behind_by_as_long() -> None:
    clock = Clock(0, 50_000)
    clock.stop(2 * S)
    assert clock.shows(10 * S) == Clock(0, 50_000).shows(8 * S)


def test_without_skew_every_clock_is_true() -> None:
    assert draw_clock(random.Random(1), 0).shows(77) == 77
