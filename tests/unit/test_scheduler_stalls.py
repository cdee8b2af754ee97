"""A scheduler that was stopped itself does not take that for silence of others."""

from tests.unit.scheduler_driver import LIMITS, SECOND, Driver


def test_a_scheduler_that_was_stopped_gives_nobody_up() -> None:
    driver = Driver()
    driver.train()
    driver.wait(60 * SECOND)
    assert all(state.is_live for state in driver.core.roster.by_incarnation.values())


def test_a_scheduler_that_was_stopped_for_a_moment_hears_first_what_was_said_meanwhile() -> None:
    driver = Driver()
    driver.form()
    driver.wait(LIMITS.dead_after_ns + SECOND // 2)
    assert all(state.is_live for state in driver.core.roster.by_incarnation.values())


def test_who_says_nothing_after_that_moment_either_is_given_up_a_heartbeat_later() -> None:
    driver = Driver()
    driver.form()
    driver.wait(LIMITS.dead_after_ns + SECOND // 2)
    driver.beat(2)
    driver.wait(LIMITS.heartbeat_ns)
    states = driver.core.roster.by_incarnation
    assert [states[2].is_live, states[3].is_live] == [True, False]
