"""How a job ends when a worker was given up shortly before: it may only have been busy."""

from tests.unit.scheduler_driver import SERVER, WORKERS, Driver, sent
from treefold.wire.messages import DrainRequest, Leave, Refused, Stop
from treefold.wire.words import Outcome, Phase, Role

DONE = Stop(Outcome.DONE, "the job is done")


def given_up() -> Driver:
    """A job in which one worker has just been given up and the other one is done."""
    driver = Driver()
    driver.train()
    driver.pass_time(2.5, 1, 2)
    assert [state.member.incarnation for state in driver.core.roster.live(Role.WORKER)] == [2]
    driver.say(WORKERS[0], Leave(2, Outcome.DONE, ""))
    return driver


def test_a_job_is_kept_for_a_worker_that_was_given_up_a_moment_ago() -> None:
    driver = given_up()
    assert driver.core.phase is Phase.RUNNING
    driver.register(WORKERS[1], Role.WORKER, 103)
    driver.pass_time(5, 1, 4)
    assert driver.core.phase is Phase.RUNNING
    driver.say(WORKERS[1], Leave(4, Outcome.DONE, ""))
    assert driver.core.ending == DONE


def test_a_job_that_is_done_ends_as_done_when_nobody_comes_back() -> None:
    driver = given_up()
    driver.pass_time(2, 1)
    assert driver.core.ending == DONE


def test_a_worker_that_was_given_up_long_ago_is_not_waited_for() -> None:
    driver = Driver()
    driver.train()
    driver.pass_time(5, 1, 2)
    driver.say(WORKERS[0], Leave(2, Outcome.DONE, ""))
    assert driver.core.ending == DONE


def test_a_member_that_asks_to_be_drained_means_itself() -> None:
    driver = Driver()
    driver.form()
    (refused,) = sent(driver.say(SERVER, DrainRequest(1, "worker-0", 1)), Refused)
    assert isinstance(refused, Refused)
    assert "worker-0 is incarnation 2, and asked for by incarnation 1" in refused.text
