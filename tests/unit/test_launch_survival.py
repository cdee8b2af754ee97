"""With several replicas whatever dies is started again: what the launcher decides."""

from pathlib import Path

import pytest

from tests.unit.launch_driver import Launch
from treefold.common.config import Settings
from treefold.launch.commands import Attempt, LaunchPlan
from treefold.launch.core import (
    CRASHED_MAX,
    KILLED_MAX,
    SETTLE_MS,
    SHORT_LIFE_MS,
    LaunchCore,
    LaunchLimits,
    Stage,
)
from treefold.launch.effects import (
    AddressKnown,
    BeginAttempt,
    ProcessExited,
    StartProcess,
    StatusSeen,
    StopAsked,
    Tick,
)

SIGINT, SIGKILL, SIGSEGV, SIGTERM = 2, 9, 11, 15


ALL = ["scheduler", "server-0", "server-1", "worker-0", "worker-1"]


def safe(max_restarts: int = 0) -> Launch:
    """A launch with several replicas, that runs."""
    launch = Launch(servers=2, max_restarts=max_restarts, is_safe=True)
    launch.status()
    return launch


@pytest.mark.parametrize("name", ALL)
def test_with_replicas_whoever_is_killed_is_started_again_at_once(name: str) -> None:
    launch = safe()
    effects = launch.exited(name, -SIGKILL)
    assert StartProcess(name) in effects
    assert launch.core.stage is Stage.RUNNING
    assert f"{name} was killed by SIGKILL: started again" in launch.said
    assert launch.effects.count(BeginAttempt()) == 1
    launch.end_everybody()
    assert launch.code == 0


@pytest.mark.parametrize("name", ALL)
def test_with_replicas_a_thousand_kills_are_survived_while_the_job_comes_further(name: str) -> None:
    launch = safe()
    for round_ in range(1, 1_001):
        launch.later(500)
        launch.worked(round_, *ALL[1:])
        launch.exited(name, -SIGKILL)
    assert launch.started(name) == 1_001
    launch.end_everybody()
    assert launch.code == 0


@pytest.mark.parametrize("name", ["scheduler", "server-1", "worker-1"])
@pytest.mark.parametrize(("code", "most"), [(-SIGSEGV, CRASHED_MAX), (-SIGKILL, KILLED_MAX)])
def test_with_replicas_who_never_gets_to_work_is_given_up(name: str, code: int, most: int) -> None:
    launch = safe()
    for _ in range(most):
        launch.exited(name, code)
    assert launch.started(name) == most + 1
    launch.exited(name, code)
    launch.status()
    launch.later(SETTLE_MS)
    assert launch.started(name) == most + 1
    launch.end_everybody()
    assert launch.code == (0 if name == "worker-1" else 1)


def test_who_was_killed_by_others_may_still_fail_by_itself() -> None:
    launch = safe()
    for code in (*[-SIGKILL] * (CRASHED_MAX + 1), *[1] * CRASHED_MAX):
        assert StartProcess("server-0") in launch.exited("server-0", code)
    assert StartProcess("server-0") not in launch.exited("server-0", 1)


def test_a_member_without_which_the_job_came_further_has_not_worked() -> None:
    launch = safe()
    for round_ in range(CRASHED_MAX + 1):
        launch.worked(round_, "server-0", "worker-0", "worker-1")
        launch.exited("server-1", -SIGSEGV)
    assert launch.started("server-1") == CRASHED_MAX + 1


def test_a_member_with_which_the_job_came_no_further_has_not_worked() -> None:
    launch = safe()
    launch.worked(7, *ALL[1:])
    for _ in range(CRASHED_MAX + 1):
        launch.exited("worker-1", -SIGSEGV)
        launch.worked(7, *ALL[1:])
    assert launch.started("worker-1") == CRASHED_MAX + 1


def test_a_life_that_was_long_is_none_without_work() -> None:
    launch = safe()
    for _ in range(3 * CRASHED_MAX):
        launch.later(SHORT_LIFE_MS)
        launch.exited("server-1", -SIGSEGV)
    assert launch.started("server-1") == 3 * CRASHED_MAX + 1


def test_with_replicas_a_failing_script_still_ends_the_run_with_its_code() -> None:
    launch = safe()
    launch.exited("worker-1", 7)
    launch.status()
    launch.later(SETTLE_MS)
    launch.end_everybody()
    assert launch.started("worker-1") == 1
    assert launch.code == 7


def test_with_replicas_restarts_are_for_failing_scripts() -> None:
    launch = safe(max_restarts=1)
    for name in ALL:
        launch.exited(name, -SIGKILL)
    launch.exited("worker-1", 7)
    launch.status()
    launch.later(SETTLE_MS)
    assert launch.started("worker-1") == 3
    assert "restart 1 of 1" in launch.said


def test_a_scheduler_that_ends_the_job_itself_is_not_started_again() -> None:
    launch = safe()
    launch.exited("scheduler", 1)
    launch.later(SETTLE_MS)
    launch.end_everybody()
    assert launch.started("scheduler") == 1
    assert launch.code == 1


def test_a_server_that_fails_by_itself_is_started_again() -> None:
    launch = safe()
    launch.exited("server-0", 1)
    assert launch.started("server-0") == 2


@pytest.mark.parametrize("name", ALL)
def test_nobody_is_started_again_when_the_job_is_done(name: str) -> None:
    launch = safe()
    launch.status("ended", "done", "the job is done")
    launch.exited(name, -SIGKILL)
    launch.later(SETTLE_MS)
    launch.end_everybody()
    assert launch.started(name) == 1


def test_with_replicas_a_worker_killed_after_another_one_was_done_stays_dead() -> None:
    launch = safe()
    launch.exited("worker-0", 0)
    launch.exited("worker-1", -SIGKILL)
    launch.status()
    launch.later(SETTLE_MS)
    launch.end_everybody()
    assert launch.started("worker-1") == 1
    assert launch.code == 0


def test_a_worker_that_was_drained_does_not_mean_that_the_others_are_done() -> None:
    launch = safe()
    launch.exited("worker-0", 0)
    launch.feed(StatusSeen(launch.now_ns, "running", drained=frozenset({"worker-0"})))
    launch.exited("worker-1", -SIGKILL)
    assert launch.started("worker-1") == 2
    launch.end_everybody()
    assert launch.started("worker-0") == 1
    assert launch.code == 0


def test_with_replicas_a_worker_with_its_own_loader_ends_the_job_as_ever() -> None:
    launch = safe()
    launch.feed(StatusSeen(launch.now_ns, "running", is_leased=False))
    launch.exited("worker-1", -SIGKILL)
    launch.feed(StatusSeen(launch.now_ns, "running", is_leased=False))
    launch.later(SETTLE_MS)
    launch.end_everybody()
    assert launch.started("worker-1") == 1
    assert launch.code == 1


def test_members_wait_while_a_scheduler_that_was_killed_before_it_listened_starts_again() -> None:
    core = LaunchCore(LaunchLimits(1, 1, 0, is_safe=True))
    core.handle(0, Tick())
    effects = core.handle(1, ProcessExited("scheduler", -SIGKILL))
    assert StartProcess("scheduler") in effects
    assert StartProcess("server-0") not in effects
    assert core.handle(2, AddressKnown()) == [StartProcess("server-0"), StartProcess("worker-0")]


def test_a_signal_ends_a_run_whose_scheduler_has_just_been_started_again() -> None:
    launch = safe()
    launch.exited("scheduler", -SIGKILL)
    launch.feed(StopAsked(SIGTERM))
    launch.exited("server-0", -SIGKILL)
    assert launch.started("server-0") == 1
    launch.end_everybody()
    assert launch.code == 128 + SIGTERM


@pytest.mark.parametrize(("name", "times"), [("scheduler", 2), ("server-0", 1), ("worker-0", 1)])
def test_with_a_journal_alone_only_the_scheduler_is_started_again(name: str, times: int) -> None:
    core = LaunchCore(LaunchLimits(1, 1, 0, is_journaled=True))
    effects = core.handle(0, Tick()) + core.handle(1, AddressKnown())
    effects += core.handle(2, ProcessExited(name, -SIGKILL))
    assert effects.count(StartProcess(name)) == times


def test_every_attempt_of_every_run_has_a_journal_of_its_own(tmp_path: Path) -> None:
    def journal(folder: str, given: str = "", replicas: int = 1) -> str:
        settings = Settings(servers=2, replicas=replicas, journal=given)
        plan = LaunchPlan(settings, ["true"], "tcp")
        return Attempt(plan, folder).environment("scheduler")["TREEFOLD_JOURNAL"]

    folders = [str(tmp_path / run / attempt) for run in "ab" for attempt in "12"]
    given = [journal(folder, given="kept") for folder in folders]
    assert len(set(given)) == 4
    assert all(name.startswith("kept/") for name in given)
    assert journal(folders[0], given="kept") == given[0]
    assert journal(folders[0], replicas=2) == f"{folders[0]}/journal"
    assert journal(folders[0]) == ""
