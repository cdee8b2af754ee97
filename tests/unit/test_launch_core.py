"""What the launcher decides when processes end, with no process at all."""

import pytest

from tests.unit.launch_driver import Launch
from treefold.common.errors import InvariantError
from treefold.launch.core import (
    DRAIN_MS,
    FAREWELL_MS,
    NOT_FORMED,
    SETTLE_MS,
    STATUS_PATIENCE_MS,
    LaunchCore,
    LaunchLimits,
    Stage,
)
from treefold.launch.effects import (
    AddressKnown,
    BeginAttempt,
    EndProcess,
    KillProcess,
    StartProcess,
    StatusSeen,
    StopAsked,
    Tick,
)

SIGINT, SIGKILL, SIGSEGV, SIGTERM = 2, 9, 11, 15


def test_members_start_only_when_the_address_of_the_scheduler_is_known() -> None:
    core = LaunchCore(LaunchLimits(1, 1, 0))
    assert core.handle(0, Tick()) == [BeginAttempt(), StartProcess("scheduler")]
    assert core.handle(1, AddressKnown()) == [StartProcess("server-0"), StartProcess("worker-0")]


def test_when_all_workers_are_done_the_scheduler_ends_and_then_the_servers_and_the_code_is_0() -> (
    None
):
    launch = Launch()
    launch.exited("worker-0", 0)
    assert launch.exited("worker-1", 0) == [EndProcess("scheduler")]
    assert launch.exited("scheduler", 0) == [EndProcess("server-0")]
    assert launch.code is None
    launch.exited("server-0", 0)
    assert launch.code == 0


def test_a_failing_script_ends_everybody_and_gives_the_run_its_code() -> None:
    launch = Launch()
    launch.exited("worker-1", 7)
    launch.status()
    assert EndProcess("worker-0") in launch.later(SETTLE_MS)
    launch.end_everybody()
    assert launch.code == 7
    assert "worker-1 exited with code 7" in launch.said


def test_a_failing_script_is_noticed_although_the_scheduler_does_not_answer() -> None:
    launch = Launch()
    launch.exited("worker-1", 7)
    assert EndProcess("worker-0") not in launch.later(SETTLE_MS)
    assert EndProcess("worker-0") in launch.later(STATUS_PATIENCE_MS)


def test_an_answer_to_an_earlier_question_does_not_decide_what_a_failure_means() -> None:
    launch = Launch()
    asked_ns = launch.now_ns
    launch.exited("worker-1", 7)
    launch.feed(StatusSeen(asked_ns, "running"))
    assert EndProcess("worker-0") not in launch.later(SETTLE_MS)


def test_the_worker_that_failed_gives_the_code_and_not_those_whom_it_took_along() -> None:
    launch = Launch()
    launch.exited("worker-0", 1)
    launch.status("ended", "failed", "worker-1, one slot with its own loader, is gone")
    launch.exited("scheduler", 1)
    launch.exited("worker-1", 7)
    launch.later(SETTLE_MS)
    launch.end_everybody()
    assert launch.code == 7


def test_a_killed_worker_is_tolerated_as_long_as_others_complete_the_job() -> None:
    launch = Launch()
    launch.status()
    launch.exited("worker-1", -SIGKILL)
    launch.status()
    launch.later(SETTLE_MS)
    assert "worker-1 was killed by SIGKILL" in launch.said
    assert "training goes on" in launch.said
    launch.end_everybody()
    assert launch.code == 0


def test_a_run_whose_workers_are_all_killed_has_failed() -> None:
    launch = Launch()
    launch.status()
    for name in ("worker-0", "worker-1"):
        launch.exited(name, -SIGKILL)
        launch.status()
        launch.later(SETTLE_MS)
    launch.end_everybody()
    assert launch.code == 1
    assert "no worker is left" in launch.said


def test_a_worker_killed_after_another_one_was_done_changes_nothing() -> None:
    launch = Launch(max_restarts=5)
    launch.status()
    launch.exited("worker-0", 0)
    launch.exited("worker-1", -SIGKILL)
    launch.status()
    launch.later(SETTLE_MS)
    launch.end_everybody()
    assert launch.code == 0
    assert launch.started("worker-1") == 1


def test_a_worker_killed_before_the_cluster_formed_means_that_it_will_not() -> None:
    launch = Launch()
    launch.status("forming")
    launch.exited("worker-1", -SIGKILL)
    launch.status("forming")
    launch.later(SETTLE_MS)
    launch.end_everybody()
    assert launch.code == 3
    assert "worker-1 was killed by SIGKILL before the cluster had formed" in launch.said


def test_a_dead_worker_is_started_again_as_often_as_allowed_and_no_oftener() -> None:
    launch = Launch(max_restarts=2)
    launch.status()
    for code in (-SIGKILL, 7):
        launch.exited("worker-1", code)
        launch.status()
        launch.later(SETTLE_MS)
    assert launch.started("worker-1") == 3
    assert "restart 2 of 2" in launch.said
    launch.exited("worker-1", 7)
    launch.status()
    launch.later(SETTLE_MS)
    launch.end_everybody()
    assert launch.started("worker-1") == 3
    assert launch.code == 7


def test_a_worker_that_is_started_again_when_the_job_is_over_fails_nothing() -> None:
    """It was killed on its way out, before the scheduler could say that the job is done."""
    launch = Launch(max_restarts=1)
    launch.exited("worker-1", -SIGKILL)
    launch.status()
    launch.later(SETTLE_MS)
    assert launch.started("worker-1") == 2
    launch.exited("worker-0", 0)
    launch.exited("scheduler", 0)
    launch.exited("server-0", 0)
    launch.exited("worker-1", NOT_FORMED)
    launch.later(STATUS_PATIENCE_MS)
    assert launch.code == 0
    assert "worker-1 exited with code 3; the job was done already" in launch.said


def test_without_restarts_a_dead_worker_stays_dead() -> None:
    launch = Launch(max_restarts=0)
    launch.status()
    launch.exited("worker-1", -SIGKILL)
    launch.status()
    launch.later(SETTLE_MS)
    assert launch.started("worker-1") == 1


def test_a_worker_with_its_own_loader_cannot_be_replaced_alone() -> None:
    launch = Launch(max_restarts=1)
    launch.exited("worker-1", -SIGKILL)
    launch.feed(StatusSeen(launch.now_ns, "running", is_leased=False))
    launch.later(SETTLE_MS)
    assert launch.core.stage is Stage.RESTARTING
    assert launch.started("worker-1") == 1
    launch.end_everybody()
    launch.feed(AddressKnown())
    launch.exited("worker-0", -SIGKILL)
    launch.feed(StatusSeen(launch.now_ns, "running", is_leased=False))
    launch.later(SETTLE_MS)
    launch.end_everybody()
    assert launch.code == 1


def test_a_worker_is_not_started_again_into_a_job_that_has_ended() -> None:
    launch = Launch(max_restarts=1)
    launch.exited("worker-1", 1)
    launch.status("ended", "done", "the job is done")
    launch.later(SETTLE_MS)
    launch.end_everybody()
    assert launch.started("worker-1") == 1
    assert launch.code == 1


@pytest.mark.parametrize("name", ["server-0", "scheduler"])
def test_a_lost_role_ends_the_run_with_code_1_and_the_reason(name: str) -> None:
    launch = Launch()
    launch.status()
    launch.exited(name, -SIGKILL)
    launch.status()
    launch.later(SETTLE_MS)
    launch.end_everybody()
    assert launch.code == 1
    assert f"{name} was killed by SIGKILL" in launch.said


@pytest.mark.parametrize("name", ["server-0", "scheduler"])
def test_a_lost_role_starts_the_whole_job_again_if_a_restart_is_left(name: str) -> None:
    launch = Launch(max_restarts=1)
    launch.status()
    launch.exited(name, -SIGKILL)
    launch.status()
    launch.later(SETTLE_MS)
    assert "starts again from the beginning (restart 1 of 1)" in launch.said
    assert launch.core.stage is Stage.RESTARTING
    launch.end_everybody()
    assert launch.effects.count(BeginAttempt()) == 2
    launch.feed(AddressKnown())
    assert launch.started("worker-0") == 2
    launch.end_everybody()
    assert launch.code == 0


def test_a_role_that_ends_because_the_job_is_done_is_not_lost() -> None:
    launch = Launch()
    launch.exited("scheduler", 0)
    launch.exited("server-0", 0)
    assert launch.later(DRAIN_MS) == []
    launch.end_everybody()
    assert launch.code == 0


def test_a_cluster_that_did_not_form_gives_code_3_whatever_the_workers_said() -> None:
    launch = Launch()
    launch.exited("worker-0", 1)
    launch.status("ended", "not_formed", "missing: worker-1")
    launch.exited("scheduler", 3)
    launch.later(DRAIN_MS)
    launch.end_everybody()
    assert launch.code == 3
    assert "missing: worker-1" in launch.said


def test_a_cluster_that_did_not_form_is_not_started_again() -> None:
    launch = Launch(max_restarts=3)
    launch.exited("scheduler", 3)
    launch.later(SETTLE_MS)
    launch.end_everybody()
    assert launch.code == 3
    assert launch.effects.count(BeginAttempt()) == 1


def test_a_role_that_cannot_start_gives_code_3() -> None:
    launch = Launch()
    launch.exited("server-0", 2)
    launch.status("forming")
    launch.later(SETTLE_MS)
    launch.end_everybody()
    assert launch.code == 3


def test_the_first_signal_drains_workers_first_and_the_second_kills_everybody() -> None:
    launch = Launch()
    first = launch.feed(StopAsked(SIGINT))
    assert [effect for effect in first if isinstance(effect, EndProcess)] == [
        EndProcess("worker-0"),
        EndProcess("worker-1"),
    ]
    second = launch.feed(StopAsked(SIGINT))
    killed = [effect.name for effect in second if isinstance(effect, KillProcess)]
    assert killed == ["scheduler", "server-0", "worker-0", "worker-1"]
    launch.end_everybody()
    assert launch.code == 128 + SIGINT


def test_who_does_not_end_when_asked_is_killed_after_a_while() -> None:
    launch = Launch(workers=1)
    launch.feed(StopAsked(SIGTERM))
    assert launch.later(DRAIN_MS) == [KillProcess("worker-0")]
    launch.exited("worker-0", -SIGKILL)
    assert launch.later(FAREWELL_MS) == [KillProcess("scheduler")]
    launch.exited("scheduler", -SIGKILL)
    assert KillProcess("server-0") in launch.later(FAREWELL_MS)
    launch.exited("server-0", -SIGKILL)
    assert launch.code == 128 + SIGTERM


def test_a_signal_while_all_is_killed_for_a_restart_ends_the_run_instead() -> None:
    launch = Launch(max_restarts=1)
    launch.exited("server-0", -SIGKILL)
    launch.status()
    launch.later(SETTLE_MS)
    launch.feed(StopAsked(SIGTERM))
    launch.end_everybody()
    assert launch.code == 128 + SIGTERM
    assert launch.effects.count(BeginAttempt()) == 1


def test_a_run_that_ends_while_a_process_is_left_is_a_broken_invariant() -> None:
    launch = Launch()
    launch.core.stage = Stage.OVER
    with pytest.raises(InvariantError, match="are left"):
        launch.core.check_invariants()
