"""Jobs with keys: the same bits as without, strangers hear why not, keys change meanwhile."""

import json
import shutil
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.integration.test_trouble import LAST, begin_round
from tests.support.processes import JOBS, Bits, Cluster, Gate, Process
from treefold.cli.drain import ask
from treefold.cli.keys import main as keys
from treefold.common.config import environment_of
from treefold.common.spec import Hyper
from treefold.launch.link import fetch
from treefold.transport.access import Access
from treefold.transport.request import Requester
from treefold.wire import codec
from treefold.wire.chain import ChainRound
from treefold.wire.messages import (
    Accepted,
    AnyMessage,
    Pull,
    Push,
    Refused,
    RoundHyper,
    RoundMeta,
)
from treefold.wire.permissions import KeyRole, claimed
from treefold.wire.words import Code

JOB = "three_tables.py"
REPEATS, REPEAT_MS, ANSWER_MS = 20, 1_000, 10_000
STEP: Hyper = {
    "lr": 5.0, "momentum": 0.9, "dampening": 0, "weight_decay": 0, "nesterov": True,
    "maximize": False, "foreach": False, "fused": False,
}  # fmt: skip
MakeCluster = Callable[..., Cluster]
Alone = Callable[..., Bits]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    keys(["init", str(tmp_path / "keys")])
    return tmp_path / "keys"


@pytest.fixture
def others(folder: Path, tmp_path: Path) -> Path:
    """A folder for a worker and a server with keys of their own."""
    made = tmp_path / "others"
    made.mkdir()
    for name, role in (("other", "worker"), ("second", "server")):
        keys(["add", str(folder), name, "--role", role])
        (folder / f"{name}.key").rename(made / f"{name}.key")
    shutil.copy(folder / "allowed", made)
    return made


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


def ask_server(address: str, message: AnyMessage, who: Access) -> AnyMessage:
    """What a server answers to a message."""
    with closing(Requester(address, who, KeyRole.SERVER)) as link:
        for _ in range(REPEATS):
            link.send(codec.encode(message))
            answer = link.receive(REPEAT_MS)
            if answer is not None:
                return codec.decode(answer)
    raise AssertionError(f"no answer to {message}")


def test_what_is_said_in_anothers_name_is_refused_and_changes_no_bit(
    cluster: MakeCluster, alone: Alone, gate: Gate, folder: Path, others: Path
) -> None:
    """Two workers and the two servers that are left of a chain, each with a key of its own."""
    audit, told = folder.parent / "audit", {}
    with cluster(2, 2, replicas=2, keys=str(folder), audit=str(audit), lane="socket") as job:
        workers = [job.worker(JOB, f"--gate=2:{gate.path}")]
        job.scheduler.line("worker-0 joined")
        job.settings["keys"] = str(others)
        workers.append(job.worker(JOB, f"--gate=2:{gate.path}"))
        gone, servers = job.servers[1], [job.servers[0], job.server()]
        for worker in workers:
            worker.line("^at the gate in round 2")
        job.scheduler.line("server-2 joined")
        gone.signal(signal.SIGKILL)
        job.scheduler.line("copied to server-2, which is in sync")
        observer = Access(str(folder), [KeyRole.OBSERVER])
        status = json.loads(fetch(job.address, ANSWER_MS, observer))
        number = {member["name"]: member["incarnation"] for member in status["members"]}
        place = status["view"], 1, 0
        by_worker = status["job"], number["worker-0"], *place
        by_server = status["job"], number["server-0"], *place
        forged: dict[KeyRole, list[AnyMessage]] = {
            KeyRole.WORKER: [
                RoundHyper(*by_worker, 2, 8, [STEP], 0.0),
                RoundMeta(*by_worker, 2, 8, [STEP], 0.0, b""),
                Push(*by_worker, 0, 1, 2, 8, 0, 0, [b"\xff"], None),
                Pull(*by_worker, 2, 0, []),
            ],
            KeyRole.SERVER: [
                RoundHyper(*by_server, 2, 8, [STEP], 0.0),
                ChainRound(*by_server, 2, 8, [STEP], 0.0, 0.0, b"", None, []),
            ],
        }
        for role, messages in forged.items():
            forger = Access(str(others), [role])
            for message in messages:
                text = f"incarnation {claimed(message)} belongs to another key"
                told[forger.key.name, type(message).__name__] = text
                for server in servers:
                    address = server.line(r"(tcp://\S+)$")[1]
                    answer = ask_server(address, message, forger)
                    assert answer == Refused(0, Code.NOT_ALLOWED, text)
        gate.open()
        assert job.bits(gone) == alone(JOB, "slots=8")
    deeds = [json.loads(line) for line in audit.read_text().splitlines()]
    refused = [deed for deed in deeds if not deed["is_allowed"]]
    assert {(deed["who"], deed["what"]): deed["text"] for deed in refused} == told


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
