"""A process is killed at every named point in turn, in the middle of training: the bits stay.

When hits begin to count, training is under way. Then one thing after the other happens until
somebody has come to the point and died: rounds go on, a worker joins, a server is drained, a worker
is drained, the scheduler is started again, the job ends. Whoever died is started again.
"""

import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.integration.test_failover import names
from tests.support.exactness import complaints
from tests.support.faults import SMALL_BLOCK_ELEMENTS
from tests.support.processes import Bits, Cluster, Process
from treefold.cli.drain import ask
from treefold.common.failpoints import POINTS

JOB = "whole_numbers.py"
ROUNDS, ELEMENTS = 32, SMALL_BLOCK_ELEMENTS * 30  # shards of several parts
LENGTH = (f"--rounds={ROUNDS}", f"--elements={ELEMENTS}")
FAULTS = ["small_blocks", "few_records"]
SERVERS, WORKERS = 3, 2
SETTINGS: dict[str, object] = {"replicas": 2, "heartbeat_ms": 50}
ELSEWHERE = ("checkpoint.",)  # points with tests of their own
BODIES = 2  # lines of output that make a stage of training long enough
ROLES = {"journal": "scheduler"}
MINE = [point for point in POINTS if not point.startswith(ELSEWHERE)]
MakeCluster = Callable[..., Cluster]


class Plot:
    """A job in which somebody dies at a point.

    Parameters
    ----------
    job : Cluster
        The cluster.
    command : list of str
        What workers run.
    slow : Path
        Training takes its time as long as this is there.
    """

    def __init__(self, job: Cluster, command: list[str], slow: Path) -> None:
        self.job, self.command, self.slow = job, command, slow
        self.excused: list[Process] = []

    def stages(self) -> Iterator[Callable[[], bool]]:
        """One thing after the other; each yields how to tell that it is over."""
        yield self._trained()
        worker = self.job.worker(*self.command)
        yield lambda: worker.found("^body") is not None
        assert not isinstance(ask(self.job.address, "server-0"), str)
        drained = self._process_of("server-0")
        yield lambda: drained.is_over
        worker.signal(signal.SIGTERM)
        yield lambda: worker.is_over
        assert worker.status == 0, worker.transcript()
        self.excused.append(worker)  # from having a final version
        self.job.scheduler.signal(signal.SIGKILL)
        self.job.scheduler.end()
        self.excused.append(self.job.scheduler)
        self.job.restart_scheduler(is_awaited=False)
        goes_on, trained = self.job.scheduler, self._trained()
        yield lambda: goes_on.found("goes on with view") is not None and trained()
        self.slow.unlink()
        yield lambda: all(process.is_over for process in self.job.processes)

    def run(self) -> Process:
        """Go through the stages until somebody was killed; returns who."""
        for is_over in self.stages():
            self.job.until(self._or_killed(is_over), "the end of a stage")
            if self.killed():
                return self.killed()[0]
        raise AssertionError("nobody came to this point")

    def killed(self) -> list[Process]:
        """Who was killed, but not by this test."""
        over = [process for process in self.job.processes if process.is_over]
        died = [process for process in over if process.status == -signal.SIGKILL]
        return [process for process in died if process not in self.excused]

    def replace(self, victim: Process) -> None:
        """Start what was killed again, and wait until it is there."""
        self.excused.append(victim)
        if victim.name.startswith("scheduler"):
            self.job.restart_scheduler()
            return
        if victim.name.startswith("server"):
            new = self.job.server()
            self.job.servers.append(new)
        else:
            new = self.job.worker(*self.command)
        self.job.until(lambda: self._has_joined(new), f"{new.name} to join")

    def finish(self) -> None:
        """Let training be quick, once nobody could come too late for it any more."""
        for worker in self.job.workers:
            self.job.until(partial(self._has_joined, worker), f"{worker.name} to join")
        self.slow.unlink(missing_ok=True)

    def _has_joined(self, process: Process) -> bool:
        joined = rf"joined from \S+ \(process {process.pid}\)"
        return process.is_over or self._was_said(joined)

    def _or_killed(self, is_over: Callable[[], bool]) -> Callable[[], bool]:
        return lambda: bool(self.killed()) or is_over()

    def _trained(self) -> Callable[[], bool]:
        before = self._bodies()
        return lambda: self._bodies() >= before + BODIES

    def _bodies(self) -> int:
        return sum(len(worker.all("^body")) for worker in self.job.workers)

    def _was_said(self, pattern: str) -> bool:
        return any(process.found(pattern) is not None for process in self.job.processes)

    def _process_of(self, name: str) -> Process:
        return next(one for one in self.job.servers if f"({one.pid})" in names(self.job)[name])


@pytest.mark.parametrize("point", MINE)
def test_a_kill_at_this_point_leaves_no_trace(
    cluster: MakeCluster, alone: Callable[..., Bits], tmp_path: Path, point: str
) -> None:
    slow, start, once = tmp_path / "slow", tmp_path / "start", tmp_path / "once"
    slow.touch()
    once.mkdir()
    kind = point.partition(".")[0]
    settings = {
        "journal": str(tmp_path / "journal"),
        "failpoint": f"{ROLES.get(kind, kind)}/{point}:kill",
        "failpoint_once": str(once),
        "failpoint_from": str(start),
    }
    command = [JOB, *LENGTH, f"--slow={slow}", "--pause-ms=30"]
    with cluster(SERVERS, WORKERS, {"all": FAULTS}, **settings | SETTINGS) as job:
        for _ in range(WORKERS):
            job.worker(*command)
        job.workers[0].line("^body 10")
        plot = Plot(job, command, slow)
        start.touch()
        plot.replace(plot.run())
        assert [mark.name for mark in once.iterdir()], "the kill left no mark"
        plot.finish()
        assert job.bits(*plot.excused) == alone(
            JOB, "fault:small_blocks", *LENGTH, "--slow=/nowhere"
        )
        assert complaints(str(job.settings["ledger"]), ROUNDS) == []
