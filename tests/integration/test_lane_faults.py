"""Shared memory when somebody dies or there is no more of it: the same bits or a clear error.

After every one of these the kernel is asked what the survivors still hold of whoever is gone.
"""

import resource
import signal
from collections.abc import Callable

import psutil
import pytest

from tests.support import shared
from tests.support.processes import Bits, Cluster, Gate, Process

JOB = "three_tables.py"
LENGTH = "--epochs=6"  # 30 rounds
SOCKETS = "payloads go through sockets"
MakeCluster = Callable[..., Cluster]
Alone = Callable[..., Bits]


def running(job: Cluster) -> list[Process]:
    """The processes of a job that have not ended."""
    return [process for process in job.processes if process.status is None]


def holders(job: Cluster, inodes: set[int]) -> list[str]:
    """Which processes have mapped or opened any of these."""
    return [
        process.name
        for process in running(job)
        if inodes & (shared.mapped(process.pid).keys() | shared.opened(process.pid))
    ]


def kill(victim: Process) -> set[int]:
    """Kill a process; returns the segments that it had made."""
    inodes = shared.own(victim.pid)
    assert inodes, "it has no shared memory that could be left behind"
    victim.signal(signal.SIGKILL)
    victim.end()
    return inodes


def nobody_in_the_system_holds(inodes: set[int]) -> bool:
    """Whether the kernel has freed these."""
    for pid in psutil.pids():
        try:
            if inodes & shared.mapped(pid).keys():
                return False
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return True


# ---- workers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["middle", "backward"])
def test_a_worker_killed_while_it_writes_its_memory_leaves_no_trace_in_bits_or_in_memory(
    cluster: MakeCluster, alone: Alone, gate: Gate, where: str
) -> None:
    with cluster(2, 3, log_level="debug") as job:
        victim = job.worker(JOB, LENGTH, f"--hold=10:{where}")
        job.scheduler.line("worker-0 joined")
        others = [job.worker(JOB, LENGTH, f"--gate=20:{gate.path}") for _ in range(2)]
        victim.line("^holding in round")
        before = shared.own(victim.pid)
        assert holders(job, before) == [*(s.name for s in job.servers), victim.name]
        known = [len(server.lines) for server in job.servers]
        inodes = kill(victim)
        for other in others:
            other.line("^at the gate in round")
        for server, lines in zip(job.servers, known, strict=True):
            server.line("let go of .* segments of peers that are gone", after=lines)
        assert holders(job, inodes) == []
        assert [shared.in_dev_shm(process.pid) for process in running(job)] == [[]] * 5
        gate.open()
        assert job.bits(victim) == alone(JOB, LENGTH)
    assert nobody_in_the_system_holds(inodes)


# ---- servers -------------------------------------------------------------------------------------


def test_a_server_killed_while_a_worker_reads_ends_the_job_with_its_reason_and_nothing_is_left(
    cluster: MakeCluster,
) -> None:
    with cluster(2, 2, server_dead_after_ms=1_000) as job:
        reader = job.worker(JOB, LENGTH, faults=("slow_reader",))
        job.scheduler.line("worker-0 joined")
        other = job.worker(JOB, LENGTH)
        reader.line("^reading$")
        inodes = kill(job.servers[0])
        assert holders(job, inodes) == [reader.name, other.name]
        reader.signal(signal.SIGUSR1)
        assert reader.line("^read again: (.*)$")[1] == "the same"
        assert [process.end() for process in (job.scheduler, reader, other)] == [1, 1, 1]
        assert job.servers[1].end() == 1
        text = r"server-\d fell silent and its \d+ shards with it"
        for process in (*job.servers[1:], reader, other):
            process.line(text)
    assert nobody_in_the_system_holds(inodes)


def test_a_job_of_which_every_process_is_killed_leaves_nothing(cluster: MakeCluster) -> None:
    with cluster(2, 2) as job:
        workers = [job.worker(JOB, LENGTH, "--hold=10:middle") for _ in range(2)]
        for worker in workers:
            worker.line("^holding in round")
        inodes = {i for process in running(job) for i in shared.mapped(process.pid)}
        assert len(inodes) > 4
        for process in running(job):
            process.signal(signal.SIGKILL)
        for process in job.processes:
            process.end()
    assert nobody_in_the_system_holds(inodes)


# ---- no more memory ------------------------------------------------------------------------------


def test_no_more_shared_memory_in_the_middle_of_a_job_costs_the_lane_and_not_the_bits(
    cluster: MakeCluster, alone: Alone, gate: Gate
) -> None:
    with cluster(2, 2) as job:
        early = [job.worker(JOB, LENGTH, f"--gate=2:{gate.path}") for _ in range(2)]
        for worker in early:
            worker.line("^at the gate in round 2")
        had = [shared.own(worker.pid) for worker in early]
        for process in (*job.servers, *early):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
        late = job.worker(JOB, LENGTH, faults=("small_files",))
        late.line("^ready")
        gate.open()
        late.line("^round")
        assert shared.own(late.pid) == set()
        assert job.bits() == alone(JOB, LENGTH)
    assert all(had)
    for process in (*early, late):
        assert len(process.all(rf"({SOCKETS})")) <= 1
    late.line(f"{SOCKETS}: cannot reserve .* bytes of shared memory: .*File too large")


@pytest.mark.parametrize("role", ["server", "worker"])
def test_a_role_without_shared_memory_from_the_start_says_it_once_and_the_bits_are_the_same(
    cluster: MakeCluster, alone: Alone, role: str
) -> None:
    faults = {"server": ["small_files"]} if role == "server" else {}
    with cluster(2, 2, faults=faults) as job:
        for _ in range(2):
            job.worker(JOB, faults=("small_files",) if role == "worker" else ())
        assert job.bits() == alone(JOB, "slots=8")
        without = job.servers if role == "server" else job.workers
        others = job.workers if role == "server" else job.servers
    counts = [len(process.all(f"({SOCKETS}: cannot reserve .*)")) for process in without]
    assert counts == [1, 1]
    assert [process.found(SOCKETS) for process in others] == [None, None]
