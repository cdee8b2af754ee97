"""Workers are killed, join late, are slow, hang, stop, are asked to leave: the bits stay the same.

Every test first waits until the trouble has really happened in the middle of training, by what the
processes say, and ends with the bits of the undisturbed job.
"""

import signal
from collections.abc import Callable

import pytest

from tests.support.processes import Bits, Cluster, Gate, Process

JOB = "three_tables.py"
LENGTH = "--epochs=6"  # 30 rounds
LAST = 29
SLEEP = "--sleep-ms=10"
MakeCluster = Callable[..., Cluster]
Alone = Callable[..., Bits]


def slots_of(worker: Process) -> list[tuple[int, int]]:
    """Round and slot of every loop body that a worker has begun."""
    return [(int(a), int(b)) for a, b in worker.all(r"^round (\d+) slot (\d+)$")]


def begin_round(worker: Process, number: int, after: int = 0) -> None:
    """Wait until a worker begins a loop body of a round, or of a later one."""
    numbers = "|".join(map(str, range(number, LAST + 1)))
    worker.line(rf"^round ({numbers}) slot", after)


@pytest.mark.parametrize("where", ["begin", "backward", "step"])
def test_a_worker_killed_in_its_loop_body_leaves_no_trace(
    cluster: MakeCluster, alone: Alone, where: str
) -> None:
    with cluster(2, 3) as job:
        chief = job.worker(JOB, LENGTH, f"--hold=10:{where}")
        job.scheduler.line("worker-0 joined")
        for _ in range(2):
            job.worker(JOB, LENGTH, SLEEP)
        chief.line("^holding in round")
        chief.signal(signal.SIGKILL)
        assert job.bits(chief) == alone(JOB, LENGTH)
    assert chief.status == -signal.SIGKILL


def test_a_worker_that_hangs_for_ever_does_not_stop_the_others(
    cluster: MakeCluster, alone: Alone
) -> None:
    with cluster(2, 2) as job:
        hung = job.worker(JOB, LENGTH, "--hold=10:backward")
        other = job.worker(JOB, LENGTH, SLEEP)
        assert other.end() == 0
        assert job.scheduler.found("has been silent") is None
        hung.signal(signal.SIGKILL)
        assert job.bits(hung) == alone(JOB, LENGTH)
    hung.line("^holding in round")


def test_the_last_of_three_workers_finishes_when_two_are_killed_at_any_moment(
    cluster: MakeCluster, alone: Alone
) -> None:
    with cluster(2, 3) as job:
        first, second, last = (job.worker(JOB, LENGTH, SLEEP) for _ in range(3))
        begin_round(first, 8)
        first.signal(signal.SIGKILL)
        begin_round(second, 16)
        second.signal(signal.SIGKILL)
        assert job.bits(first, second) == alone(JOB, LENGTH)
        assert {slot for number, slot in slots_of(last) if number == LAST - 1} == set(range(8))


def test_a_worker_that_joins_at_round_20_takes_slots(
    cluster: MakeCluster, alone: Alone, gate: Gate
) -> None:
    with cluster(2, 2) as job:
        early = [job.worker(JOB, LENGTH, SLEEP, f"--gate=20:{gate.path}") for _ in range(2)]
        for worker in early:
            worker.line("^at the gate in round 20")
        late = job.worker(JOB, LENGTH, SLEEP)
        begin_round(late, 20)
        gate.open()
        assert job.bits() == alone(JOB, LENGTH)
    assert slots_of(late)[0][0] == 20


def test_a_worker_slowed_four_times_computes_less(cluster: MakeCluster, alone: Alone) -> None:
    with cluster(1, 3) as job:
        quick = [job.worker(JOB, LENGTH, "--sleep-ms=40") for _ in range(2)]
        slow = job.worker(JOB, LENGTH, "--sleep-ms=160")
        assert job.bits() == alone(JOB, LENGTH)
    assert 2 * len(slots_of(slow)) < min(len(slots_of(worker)) for worker in quick)


def test_a_worker_that_is_stopped_for_a_while_comes_back(
    cluster: MakeCluster, alone: Alone, gate: Gate
) -> None:
    with cluster(2, 3) as job:
        quick = [job.worker(JOB, LENGTH, SLEEP, f"--gate=25:{gate.path}") for _ in range(2)]
        stopped = job.worker(JOB, LENGTH, SLEEP)
        begin_round(stopped, 10)
        stopped.signal(signal.SIGSTOP)
        begun = len(stopped.lines)
        name = job.scheduler.line(r"(worker-\d) died in round \d+: it has been silent for")[1]
        for worker in quick:
            worker.line("^at the gate")
        known = len(job.scheduler.lines)
        stopped.signal(signal.SIGCONT)
        job.scheduler.line(f"{name} joined", after=known)
        begin_round(stopped, 25, after=begun)
        gate.open()
        assert job.bits() == alone(JOB, LENGTH)


def test_a_worker_that_is_asked_to_stop_leaves_at_once_and_in_order(
    cluster: MakeCluster, alone: Alone
) -> None:
    with cluster(2, 3) as job:
        asked = job.worker(JOB, LENGTH, SLEEP)
        for _ in range(2):
            job.worker(JOB, LENGTH, SLEEP)
        begin_round(asked, 10)
        asked.signal(signal.SIGTERM)
        assert asked.end() == 0
        job.scheduler.line(r"worker-\d left: drained the worker was asked to stop")
        assert job.bits(asked) == alone(JOB, LENGTH)
    assert slots_of(asked)[-1][0] < LAST
    assert job.scheduler.found("has been silent") is None


def test_workers_beyond_the_slots_stand_by_and_take_over(
    cluster: MakeCluster, alone: Alone
) -> None:
    with cluster(1, 3, slots=2) as job:
        held = job.worker(JOB, LENGTH, "--hold=5:begin")
        job.scheduler.line("worker-0 joined")
        for _ in range(2):
            job.worker(JOB, LENGTH, SLEEP)
        job.scheduler.line("3 workers for 2 slots: 1 stand by and take backup tasks")
        held.line("^holding in round")
        held.signal(signal.SIGKILL)
        assert job.bits(held) == alone(JOB, "slots=2", LENGTH)


def test_what_was_pushed_leaves_although_the_script_goes_on_to_something_else(
    cluster: Callable[..., Cluster], gate: Gate
) -> None:
    # Without heartbeats and retries, which look after what waits as well.
    quiet = {"heartbeat_ms": 200_000, "dead_after_ms": 600_000, "server_dead_after_ms": 600_000}
    with cluster(1, 2, retry_ms=200_000, **quiet) as job:
        workers = [job.worker("elsewhere.py", str(gate.path)) for _ in range(2)]
        job.until(lambda: any(worker.all("^waited") for worker in workers), "a round")
        gate.open()
        found = [worker.line("^waited (.*)$")[1] for worker in workers]
        job.end()
    assert found == [str([-1.0] * 10)] * 2
