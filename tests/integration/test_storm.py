"""A storm of SIGKILLs over a real cluster: every gradient counts exactly once.

Gradients are whole numbers and the parameters their sum, so that one that was lost or counted twice
shows in the last digit. Who dies when is drawn from a seed. No more servers of one shard are killed
than may fail: a server only while every shard has another one in sync.
"""

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.exactness import complaints_one_by_one, of_quorum
from tests.support.processes import Cluster, Process
from treefold.common.errors import UnavailableError
from treefold.launch.link import Status, fetch, parse

JOB = "whole_numbers.py"
SERVERS, WORKERS = 3, 3
PAUSE_S = 0.5
STATUS_MS = 3_000
ROUNDS_PER_KILL = 12
MakeCluster = Callable[..., Cluster]


class Storm:
    """Kills processes of a cluster, and starts others in their place.

    Parameters
    ----------
    job : Cluster
        The cluster.
    command : list of str
        What workers run.
    rng : random.Random
        Says who dies.
    """

    def __init__(self, job: Cluster, command: list[str], rng: random.Random) -> None:
        self.job, self.command, self.rng = job, command, rng
        self.struck: Counter[str] = Counter()
        self.dead: list[Process] = []

    def strike(self) -> None:
        """Kill one process, and start another."""
        role = self.rng.choices(["server", "worker", "scheduler"], weights=(3, 3, 1))[0]
        if role == "server" and not self.is_safe():
            role = "worker"
        victim = self.rng.choice(self.living(role))
        victim.signal(signal.SIGKILL)
        victim.end()
        self.dead.append(victim)
        self.struck[role] += 1
        if role == "server":
            self.job.servers.append(self.job.server())
        elif role == "worker":
            self.job.worker(*self.command)
        else:
            self.job.restart_scheduler()

    def living(self, role: str) -> list[Process]:
        """Processes of a role that run; one worker is never killed, so that the job goes on."""
        if role == "scheduler":
            return [self.job.scheduler]
        known = self.job.servers if role == "server" else self.job.workers[1:]
        return [process for process in known if process.status is None]

    def is_safe(self) -> bool:
        """Whether every shard survives the loss of any one server, by what the scheduler says."""
        status = self.status()
        live = [member.name for member in status.live("server")] if status is not None else []
        shards = [s for table in status.tables for s in table.shards] if status is not None else []
        processes = {str(process.pid) for process in self.living("server")}
        pids = {str(m.pid) for m in status.live("server")} if status is not None else set()
        is_current = pids <= processes  # nobody counts as alive who was killed already
        return is_current and all(
            sum(name in live for name in (shard.server, *shard.backups)) > 1 for shard in shards
        )

    def status(self) -> Status | None:
        """The scheduler's view of things, None if it does not answer."""
        try:
            return parse(fetch(self.job.address, STATUS_MS))
        except UnavailableError:
            return None


@pytest.mark.parametrize("consistency", ["sync", "async", "ssp", "quorum", "beside"])
def test_every_gradient_counts_once_in_a_storm_of_kills(
    consistency: str, cluster: MakeCluster, tmp_path: Path, kills: int
) -> None:
    slow = tmp_path / "slow"
    slow.touch()
    is_sync = consistency == "sync"
    kills = kills if is_sync else max(12, kills // 4)
    ledger = "" if is_sync else str(tmp_path / "ledger")
    command = [JOB, f"--rounds={kills * ROUNDS_PER_KILL}", f"--slow={slow}"]
    settings = {"replicas": 2, "journal": str(tmp_path / "journal"), "dead_after_ms": 500}
    if consistency == "beside":  # half of the parameters are asynchronous, the others are not
        command.append("--beside=async")
        settings["consistency"] = "sync"
    else:
        settings |= {"consistency": consistency, "staleness": 2, "quorum": 5, "grace": 0.1}
        settings["staleness_max"] = 2  # with "async": some are computed again
    with cluster(SERVERS, WORKERS, ledger=ledger, **settings) as job:
        for _ in range(WORKERS):
            job.worker(*command)
        job.workers[0].line("^body")
        storm = Storm(job, command, random.Random(1))
        for _ in range(kills):
            storm.strike()
            time.sleep(PAUSE_S)  # the storm's own rhythm; nothing is waited for
        assert job.workers[0].found("^final") is None, "the job was over before the storm was"
        slow.unlink()
        job.end(*storm.dead)
        done = [worker for worker in job.workers if worker.status == 0]
        finals = {worker.line("^final (.*)$")[1] for worker in done}
    if consistency == "quorum":
        rounds = of_quorum(ledger, kills * ROUNDS_PER_KILL)
        assert rounds.complaints == []
        assert rounds.missed() > 0
    assert finals == {"exact"}
    if consistency in ("async", "ssp"):
        assert complaints_one_by_one(ledger, kills * ROUNDS_PER_KILL) == []
    assert min(storm.struck[role] for role in ("server", "worker", "scheduler")) > 0
