"""Jobs with keys: the same bits as without, strangers hear why not, keys change meanwhile."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.test_trouble import LAST, begin_round
from tests.support.processes import JOBS, Bits, Cluster, Gate, Process
from treefold.cli.drain import ask
from treefold.cli.keys import main as keys
from treefold.common.config import environment_of
from treefold.transport.access import Access
from treefold.wire.messages import Accepted
from treefold.wire.permissions import KeyRole

JOB = "three_tables.py"
MakeCluster = Callable[..., Cluster]
Alone = Callable[..., Bits]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    keys(["init", str(tmp_path / "keys")])
    return tmp_path / "keys"


def visitor(job: Cluster, *command: str, **settings: object) -> Process:
    """A process that is no part of the job, which nobody waits for."""
    values = job.settings | {"scheduler": job.address} | settings
    return job.starter.start("visitor", list(command), environment_of(values))


def test_a_job_with_keys_has_the_same_bits_and_strangers_hear_why_they_are_refused(
    cluster: MakeCluster, alone: Alone, gate: Gate, folder: Path, tmp_path: Path
) -> None:
    other, audit = tmp_path / "other", tmp_path / "audit"
    keys(["init", str(other)])
    own = (folder / "allowed").read_text()
    (other / "allowed").write_text(own)  # it knows whom to speak to; nobody knows its keys
    fixed = {"keys": str(folder), "audit": str(audit), "lane": "socket"}
    with cluster(2, 1, **fixed) as job:
        worker = job.worker(JOB, f"--gate=2:{gate.path}")
        worker.line("^at the gate in round 2")
        script = str(JOBS / JOB)
        server = ("-m", "treefold.cli", "server")
        strangers = {
            visitor(job, script, keys=""): "AuthError.*takes connections with keys only",
            visitor(job, script, keys=str(other)): "AuthError.*is not on its allow-list",
            visitor(job, *server, keys="", audit=""): "takes connections with keys only",
            visitor(job, *server, keys=str(other), audit=""): "is not on its allow-list",
        }
        for stranger, words in strangers.items():
            assert stranger.end() == 3, stranger.transcript()
            stranger.line(words)
        command = ("-m", "treefold.cli", "worker", "--", "true")
        assert visitor(job, *command).end() == 0
        refused = visitor(job, *command, keys="")
        assert refused.end() == 3
        refused.line("takes connections with keys only")
        gate.open()
        assert job.bits() == alone(JOB, "slots=8")
    told = [json.loads(line) for line in audit.read_text().splitlines()]
    by = {deed["by"].partition(" ")[0] for deed in told if deed["is_allowed"]}
    assert by == {"scheduler", "server"}
    assert [deed for deed in told if deed["what"] == "connect" and not deed["is_allowed"]]


def test_the_keys_of_scheduler_and_server_change_while_the_job_goes_on(
    cluster: MakeCluster, alone: Alone, folder: Path, tmp_path: Path
) -> None:
    journal = str(tmp_path / "journal")
    with cluster(1, 1, keys=str(folder), journal=journal, lane="socket") as job:
        worker = job.worker(JOB, "--epochs=6", "--sleep-ms=40")
        begin_round(worker, 3)
        for name in ("scheduler", "server"):
            keys(["rotate", str(folder), name])
        first, second = job.scheduler, job.servers[0]
        first.signal(signal.SIGKILL)
        first.end()
        job.restart_scheduler()  # with its new key, at the old address
        job.scheduler.line("goes on with view")
        job.server()  # with its new key
        job.scheduler.line("server-1 joined")
        admin = Access(str(folder), [KeyRole.ADMIN])
        assert isinstance(ask(job.address, "server-0", admin), Accepted)
        assert second.end() == 0
        for name in ("scheduler-old", "server-old"):
            keys(["remove", str(folder), name])
        begin_round(worker, len(worker.all(r"^round \d+ slot")) // 8 + 1)
        assert worker.found(rf"^round {LAST} slot") is None, "training was over before"
        assert job.bits(first) == alone(JOB, "--epochs=6")
