"""How a job ends: for a worker that was given up shortly before, and for those who watch."""

from tests.unit.scheduler_driver import SECOND, SERVER, WORKERS, Driver, sent
from treefold.scheduler.effects import Effect
from treefold.wire.exchange import Halt, Note, Send
from treefold.wire.messages import DrainRequest, Leave, Refused, StatusRequest, Stop
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


# ---- who watches ---------------------------------------------------------------------------------


def watched(*, is_watching: bool) -> Driver:
    """A job that has ended while somebody asks again and again, or asked once."""
    driver = Driver()
    driver.train()
    driver.say(b"top", StatusRequest(1, is_watching))
    driver.wait(SECOND)
    driver.say(WORKERS[0], Leave(2, Outcome.DONE, ""))
    driver.say(WORKERS[1], Leave(3, Outcome.DONE, ""))
    return driver


def test_a_scheduler_goes_only_when_who_watches_has_heard_of_the_end() -> None:
    driver = watched(is_watching=True)
    assert not halts(driver.say(SERVER, Leave(1, Outcome.DONE, "")))
    effects = driver.say(b"top", StatusRequest(2, is_watching=True))
    assert [type(one) for one in effects if not isinstance(one, Note)] == [Send, Halt]


def test_a_scheduler_does_not_wait_for_ever_for_who_watched() -> None:
    driver = watched(is_watching=True)
    driver.say(SERVER, Leave(1, Outcome.DONE, ""))
    assert halts(driver.wait(3 * SECOND))


def test_a_scheduler_does_not_wait_for_who_asked_once_or_long_ago() -> None:
    assert halts(watched(is_watching=False).say(SERVER, Leave(1, Outcome.DONE, "")))
    driver = Driver()
    driver.train()
    driver.say(b"top", StatusRequest(1, is_watching=True))
    driver.pass_time(4, 1, 2, 3)
    driver.say(WORKERS[0], Leave(2, Outcome.DONE, ""))
    driver.say(WORKERS[1], Leave(3, Outcome.DONE, ""))
    assert halts(driver.say(SERVER, Leave(1, Outcome.DONE, "")))


def halts(effects: list[Effect]) -> bool:
    """Whether the scheduler goes."""
    return any(isinstance(one, Halt) for one in effects)
