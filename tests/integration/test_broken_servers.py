"""Servers that were broken on purpose are found out by what the storm's job checks.

Each test puts a real cluster into trouble that a sound server gets over. With one safeguard taken
out of the servers the parameters are wrong, or the ledger says that a version which workers had
been told of was made again of something else; with all safeguards nothing is found.
"""

import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.test_failover import names, reach, status
from tests.support.exactness import complaints
from tests.support.faults import SMALL_BLOCK_ELEMENTS
from tests.support.processes import Cluster, Process
from treefold.cli.drain import ask
from treefold.common import ledger
from treefold.launch.link import Status
from treefold.wire.messages import Accepted

JOB = "whole_numbers.py"
ONE_SHARD, SEVERAL_PARTS = 1_000, SMALL_BLOCK_ELEMENTS * 32
LOST_MIN = 40  # of a few shards, over several retries
SOUND = ""
MakeCluster = Callable[..., Cluster]


class Case:
    """A cluster whose servers have one defect, or none, and the trouble that it gets into.

    Parameters
    ----------
    folder : Path
        For what the processes are told by files.
    defect : str
        In `tests.support.broken_servers`; empty for none.
    rounds : int
        How long the job is.
    """

    def __init__(self, folder: Path, defect: str, rounds: int = 24) -> None:
        self.rounds = rounds
        self.slow, self.trouble = folder / "slow", folder / "trouble"
        self.slow.touch()
        self.trouble.mkdir()
        self.defects = [f"broken_servers.{defect}"] if defect else []
        self.settings = {"test_trouble": str(self.trouble)}

    def command(self, elements: int, pause_ms: int = 20) -> list[str]:
        """What workers run."""
        sizes = [f"--rounds={self.rounds}", f"--elements={elements}"]
        return [JOB, *sizes, f"--slow={self.slow}", f"--pause-ms={pause_ms}"]

    def begin(self, what: str, process: Process) -> Path:
        """Let a process be in trouble, until the file is removed."""
        file = self.trouble / f"{what}-{process.pid}"
        file.touch()
        return file

    def findings(self, job: Cluster, *excused: Process) -> list[str]:
        """Let the job end, and say what is wrong."""
        self.slow.unlink()
        job.until(lambda: all(process.is_over for process in job.processes), "everybody's end")
        ended = [process for process in job.processes if process not in excused]
        found = [f"{one.name} ended with {one.status}" for one in ended if one.status]
        finals = [line for one in ended for (line,) in one.all("^final (.*)$")]
        found += [f"parameters: {line}" for line in finals if line != "exact"]
        found += [] if finals else ["nobody came to the end"]
        folder = str(job.settings["ledger"])
        try:
            ledger.state_digest(folder)
        except ValueError as error:
            found.append(f"servers: {error}")
        return found + complaints(folder, self.rounds)


def pair(found: Status) -> list[str]:
    """The primary and the backup of the only shard."""
    [shard] = found.tables[0].shards
    return [shard.server, *shard.backups]


def server_of(job: Cluster, name: str) -> Process:
    """The process of a server."""
    return next(server for server in job.servers if f"({server.pid})" in names(job)[name])


@pytest.mark.parametrize(
    ("defect", "finding"), [(SOUND, ""), ("no_duplicate_check", "parameters: .*-are-wrong")]
)
def test_a_server_without_a_duplicate_check_is_found_out(
    cluster: MakeCluster, tmp_path: Path, defect: str, finding: str
) -> None:
    case = Case(tmp_path, defect)
    with cluster(1, 2, {"server": case.defects}, **case.settings) as job:
        for _ in range(2):
            job.worker(*case.command(ONE_SHARD), faults=("broken_servers.every_push_twice",))
        job.workers[0].line("^body")
        check(case.findings(job), finding)


@pytest.mark.parametrize(
    ("defect", "finding"), [(SOUND, ""), ("hasty_acknowledgment", "version .* was made twice")]
)
def test_a_server_that_acknowledges_before_its_chain_is_found_out(
    cluster: MakeCluster, tmp_path: Path, defect: str, finding: str
) -> None:
    case = Case(tmp_path, defect)
    planted = [*case.defects, "broken_servers.deaf"]
    with cluster(2, 2, {"server": planted}, replicas=2, **case.settings) as job:
        command = case.command(ONE_SHARD)
        killed = [job.worker(*command) for _ in range(2)]
        killed[0].line("^body")
        primary, backup = (server_of(job, name) for name in pair(status(job)))
        deafness = case.begin("deaf", backup)
        job.until(lambda: len(backup.all("^deaf to ChainRound")) > 3, "rounds that are not heard")
        killed.append(primary)
        for process in killed:
            process.signal(signal.SIGKILL)
        deafness.unlink()
        job.server(*case.defects)
        for _ in range(2):
            job.worker(*command)
        check(case.findings(job, *killed), finding)


@pytest.mark.parametrize(
    ("defect", "finding"), [(SOUND, ""), ("forgetful_copy", "servers: .* disagree")]
)
def test_a_copy_that_does_not_know_what_it_holds_is_found_out(
    cluster: MakeCluster, tmp_path: Path, defect: str, finding: str
) -> None:
    case = Case(tmp_path, defect)
    planted = {"all": ["small_blocks"], "server": case.defects}
    with cluster(2, 1, planted, replicas=2, retry_ms=60, **case.settings) as job:
        worker = job.worker(
            *case.command(SEVERAL_PARTS, pause_ms=5), faults=("broken_servers.lost_metas",)
        )
        other = job.server(*case.defects)
        worker.line("^body")
        job.scheduler.line(rf"joined from \S+ \(process {other.pid}\)")
        losses = case.begin("lossy", worker)
        # Metas are lost that were asked for again: everything else of the round is there.
        job.until(lambda: len(worker.all("^lost meta")) > LOST_MIN, "metas that are lost")
        assert isinstance(ask(job.address, "server-0"), Accepted)
        reach(job, is_copying, "copies to another server")
        losses.unlink()
        job.scheduler.line("server-0 left: drained")
        assert worker.found("^final") is None, "training was over before"
        check(case.findings(job), finding)


@pytest.mark.parametrize(
    ("defect", "finding"), [(SOUND, ""), ("no_fence", "version .* was made twice")]
)
def test_a_server_without_a_fence_is_found_out(
    cluster: MakeCluster, tmp_path: Path, defect: str, finding: str
) -> None:
    case = Case(tmp_path, defect, rounds=60)
    planted = [*case.defects, "broken_servers.cut_off"]
    with cluster(2, 1, {"server": planted}, replicas=2, **case.settings) as job:
        left = job.worker(*case.command(ONE_SHARD, 50), faults=("broken_servers.cut_off",))
        left.line("^body")
        name, _ = pair(status(job))
        primary = server_of(job, name)
        cuts = [case.begin("cut", process) for process in (primary, left)]
        job.scheduler.line(rf"{name} died( in round \d+)?: it has been silent")
        # The other server leads by now; a faster worker takes it ahead of the two that are cut off.
        faster = job.worker(*case.command(ONE_SHARD, 20))
        faster.line("^body 40")
        known = len(primary.lines) + len(left.lines)
        # The two are refused again and again, or go on together.
        job.until(lambda: len(primary.lines) + len(left.lines) > known + 3, "the two cut off")
        assert faster.found("^final") is None, "training was over before"
        for cut in cuts:
            cut.unlink()
        reach(job, lambda now: len(pair(now)) == 2, "two servers of the shard")
        check(case.findings(job), finding)


def is_copying(found: Status) -> bool:
    """Whether some shard is being copied."""
    return any(shard.joining for table in found.tables for shard in table.shards)


def check(found: list[str], finding: str) -> None:
    """Nothing was found of a sound server, and this of a broken one."""
    text = "\n".join(found)
    assert bool(found) is bool(finding), text
    assert re.search(finding, text), text
