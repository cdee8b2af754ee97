"""Servers are killed in the middle of training, come back, and join: the bits stay the same."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.test_trouble import LAST, begin_round
from tests.support.processes import Bits, Cluster, Process
from treefold.cli.drain import ask
from treefold.launch.link import Status, fetch, parse
from treefold.wire.messages import Accepted, Refused

JOB = "three_tables.py"
LENGTH = "--epochs=6"  # 30 rounds
SLEEP = "--sleep-ms=30"
MakeCluster = Callable[..., Cluster]
Alone = Callable[..., Bits]


def kill(job: Cluster, server: Process) -> None:
    """Kill a server, and wait until the scheduler has given it up."""
    before = len(job.scheduler.all("has been silent"))
    server.signal(signal.SIGKILL)
    server.end()
    job.scheduler.line("has been silent", before)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("lane", ["auto", "socket"])
def test_a_server_killed_in_training_leaves_no_trace(
    cluster: MakeCluster, alone: Alone, victim: int, lane: str
) -> None:
    with cluster(2, 2, replicas=2, lane=lane) as job:
        workers = [job.worker(JOB, LENGTH, SLEEP) for _ in range(2)]
        begin_round(workers[0], 8)
        job.servers[victim].signal(signal.SIGKILL)
        assert job.bits(job.servers[victim]) == alone(JOB, LENGTH)
        assert job.scheduler.found("has been silent") is not None


def test_servers_die_and_come_back_one_after_the_other(cluster: MakeCluster, alone: Alone) -> None:
    with cluster(3, 2, replicas=2) as job:
        workers = [job.worker(JOB, LENGTH, "--sleep-ms=60") for _ in range(2)]
        begin_round(workers[0], 3)
        kill(job, job.servers[0])
        job.servers.append(job.server())
        job.scheduler.line("server-\\d+ joined", len(job.scheduler.all("server-\\d+ joined")) - 1)
        begin_round(workers[0], 12)
        kill(job, job.servers[1])
        assert job.bits(*job.servers[:2]) == alone(JOB, LENGTH)


def test_a_scheduler_killed_in_training_goes_on_from_its_journal(
    cluster: MakeCluster, alone: Alone, tmp_path: Path
) -> None:
    with cluster(2, 2, replicas=2, journal=str(tmp_path / "journal")) as job:
        workers = [job.worker(JOB, LENGTH, SLEEP) for _ in range(2)]
        begin_round(workers[0], 5)
        first = job.scheduler
        first.signal(signal.SIGKILL)
        first.end()
        job.restart_scheduler()
        job.scheduler.line("goes on with view")
        begin_round(workers[0], 14)
        job.servers[0].signal(signal.SIGKILL)  # which only a scheduler can heal
        assert job.bits(first, job.servers[0]) == alone(JOB, LENGTH)


def test_a_second_scheduler_on_one_journal_is_refused(cluster: MakeCluster, tmp_path: Path) -> None:
    with cluster(1, 1, journal=str(tmp_path / "journal")) as job:
        other = job._role("scheduler", [])
        assert other.end() == 2
        assert f"in use by pid {job.scheduler.pid}" in other.transcript()


@pytest.mark.parametrize("servers", [2, 3])
def test_a_server_is_drained_while_training_goes_on(
    cluster: MakeCluster, alone: Alone, servers: int
) -> None:
    with cluster(servers, 2, replicas=servers - 1) as job:
        workers = [job.worker(JOB, LENGTH, "--sleep-ms=60") for _ in range(2)]
        begin_round(workers[0], 4)
        answer = ask(job.address, "server-0")
        assert isinstance(answer, Accepted)
        gone = next(server for server in job.servers if f"({server.pid})" in names(job)["server-0"])
        assert gone.end() == 0
        assert job.scheduler.found("server-0 left: drained") is not None
        assert workers[0].found(rf"^round {LAST} slot") is None, "training was over before"
        assert job.bits() == alone(JOB, LENGTH)


def names(job: Cluster) -> dict[str, str]:
    """The members that joined, with their processes."""
    found = job.scheduler.all(r"(\S+) joined from \S+ \(process (\d+)\)")
    return {name: f"({pid})" for name, pid in found}


def test_a_member_that_is_not_there_cannot_be_drained(cluster: MakeCluster) -> None:
    with cluster(1, 1) as job:
        job.scheduler.line("server-0 joined")
        answer = ask(job.address, "server-7")
        assert isinstance(answer, Refused)
        assert "there are server-0" in answer.text
        answer = ask(job.address, "server-0")
        assert isinstance(answer, Accepted)  # it holds nothing yet


def test_the_only_server_is_not_drained(cluster: MakeCluster, alone: Alone) -> None:
    with cluster(1, 1) as job:
        worker = job.worker(JOB, LENGTH, SLEEP)
        begin_round(worker, 3)
        answer = ask(job.address, "server-0")
        assert isinstance(answer, Refused)
        assert "no other server" in answer.text
        assert job.bits() == alone(JOB, LENGTH)


def test_a_copy_that_lost_a_bit_is_noticed_and_made_again(
    cluster: MakeCluster, alone: Alone
) -> None:
    faults = {"server": ["flipped_bit"]}
    with cluster(2, 2, faults, replicas=2, check_every=4) as job:
        for _ in range(2):
            job.worker(JOB, LENGTH, SLEEP)
        assert job.bits() == alone(JOB, LENGTH)
    said = "\n".join(server.transcript() for server in job.servers)
    assert "copies differ: table" in said
    assert "version 12: server" in said  # the first that is compared after it


def status(job: Cluster) -> Status:
    """What the scheduler says."""
    return parse(fetch(job.address, 4_000))


def reach(job: Cluster, wanted: Callable[[Status], bool], what: str) -> None:
    """Wait until the scheduler says so."""
    deadline_s = time.monotonic() + 60
    while not wanted(status(job)):
        assert time.monotonic() < deadline_s, f"not reached: {what}\n{status(job)}"
        time.sleep(0.1)


def primaries(found: Status) -> set[str]:
    """Servers that lead some shard."""
    return {shard.server for table in found.tables for shard in table.shards}


def test_one_server_becomes_four_and_then_two_while_training_goes_on(
    cluster: MakeCluster, tmp_path: Path
) -> None:
    slow = tmp_path / "slow"
    slow.touch()
    command = ["whole_numbers.py", "--rounds=400", "--elements=2200000", f"--slow={slow}"]
    with cluster(1, 2, ledger="") as job:
        workers = [job.worker(*command) for _ in range(2)]
        workers[0].line("^body")
        job.servers += [job.server() for _ in range(3)]
        reach(job, lambda found: len(primaries(found)) == 4, "shards on four servers")
        for name in ("server-0", "server-2"):
            assert isinstance(ask(job.address, name), Accepted)
        reach(job, lambda found: primaries(found) == {"server-1", "server-3"}, "on two servers")
        assert all(worker.found("^final") is None for worker in workers)
        slow.unlink()
        job.end()
        assert {worker.line("^final (.*)$")[1] for worker in workers} == {"exact"}
