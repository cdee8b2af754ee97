"""Wrong scripts, wrong programs, garbage: a clear error at once, and the job goes on with its bits.

One job of one worker waits at a gate in round 2 while visitors come and go; when all tests are over
the gate opens, and the job must end with the bits of the undisturbed one.
"""

import json
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import zmq

from tests.support.processes import JOBS, Bits, Cluster, Gate, Starter
from treefold.common.plan import LoopPlan, PlanKind
from treefold.common.spec import Dtype
from treefold.launch.link import fetch
from treefold.wire import codec
from treefold.wire.messages import (
    AnyMessage,
    DeclarePlan,
    Heartbeat,
    Pull,
    Push,
    Refused,
    StatusReply,
    StatusRequest,
)
from treefold.wire.words import PROTOCOL_VERSION, Code, Frame

JOB = "three_tables.py"
LOOPBACK = "127.0.0.1"
REPEATS, REPEAT_MS = 120, 500
STRANGER = 1 << 40  # no incarnation is so high
LAST = 77
GARBAGE = 300  # messages for each listener


@pytest.fixture(scope="module")
def patient(
    starter: Starter, alone: Callable[..., Bits], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """A job that waits in round 2; at the end it goes on, and must not have noticed anything."""
    folder = tmp_path_factory.mktemp("patient")
    settings: dict[str, object] = {"servers": 2, "workers": 1, "ledger": str(folder / "ledger")}
    with Gate(folder / "gate") as gate, Cluster(starter, settings) as job:
        worker = job.worker(JOB, f"--gate=2:{gate.path}")
        worker.line("^at the gate in round 2")
        yield job
        gate.open()
        visitors = [visitor for visitor in job.workers if visitor is not worker]
        assert job.bits(*visitors) == alone(JOB, "slots=8")


class Stranger:
    """A ZeroMQ socket that speaks, or does not speak, the protocol."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(address)

    def __enter__(self) -> "Stranger":
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=1_000)

    def send(self, *frames: bytes) -> None:
        """Send a message of any frames."""
        self._socket.send_multipart(frames)

    def ask(self, message: AnyMessage, *payload: bytes) -> AnyMessage:
        """Send a message until it is answered: a server that is behind keeps silent."""
        for _ in range(REPEATS):
            self.send(codec.encode(message), *payload)
            if self._socket.poll(REPEAT_MS):
                return self.answer()
        raise AssertionError(f"no answer to {message}")

    def answer(self) -> AnyMessage:
        """The next answer."""
        return self.answers()[0]

    def answers(self) -> list[AnyMessage]:
        """The next answers, which may come together."""
        assert self._socket.poll(REPEATS * REPEAT_MS), "no answer"
        return list(codec.decode_all(self._socket.recv_multipart()[0]))


def addresses(job: Cluster) -> list[str]:
    """Of the scheduler and of every server."""
    return [process.line(r"(tcp://\S+)$")[1] for process in (job.scheduler, *job.servers)]


# ---- scripts and programs that do not fit --------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--width=512"], ["tensors[0].shape[0]: 1024 here, 512 there"]),
        (["--lr=0.02"], ["optimizer.groups[0].lr: 0.01 here, 0.02 there"]),
        (["--batch-size=33"], ["pass 0 over the data differs", "batch_size: 32 here, 33 there"]),
    ],
)
def test_a_worker_with_another_script_is_told_the_difference(
    patient: Cluster, arguments: list[str], words: list[str]
) -> None:
    visitor = patient.worker(JOB, *arguments)
    assert visitor.end() == 1
    text = visitor.line("SpecMismatchError: .*")[0]
    assert [word for word in words if word not in text] == []


def test_a_worker_of_another_protocol_version_is_told_both(patient: Cluster) -> None:
    visitor = patient.worker(JOB, faults=("other_protocol",))
    assert visitor.end() == 1
    text = visitor.line("RemoteProtocolError: .*")[0]
    assert f"this cluster speaks protocol {PROTOCOL_VERSION}" in text
    assert f"speaks {PROTOCOL_VERSION + 1}: install the same version" in text


def test_a_server_of_another_protocol_version_ends_with_the_reason(patient: Cluster) -> None:
    visitor = patient.server("other_protocol")
    patient.processes.remove(visitor)
    assert visitor.end() == 3
    ours, theirs = PROTOCOL_VERSION, PROTOCOL_VERSION + 1
    visitor.line(f"this cluster speaks protocol {ours}, the server on .* speaks {theirs}")


@pytest.mark.parametrize("when", ["start", "2"])
def test_the_others_go_on_when_a_script_raises(patient: Cluster, when: str) -> None:
    visitor = patient.worker(JOB, f"--fail={when}")
    assert visitor.end() == 1
    text = visitor.line("^RuntimeError: (this script fails .*)")[1]
    patient.scheduler.line(rf"worker-\d+ left: failed RuntimeError: {text}")


@pytest.mark.parametrize("when", ["start", "2"])
def test_the_job_fails_with_its_reason_when_the_only_script_raises(
    cluster: Callable[..., Cluster], when: str
) -> None:
    with cluster(1, 1) as job:
        worker = job.worker(JOB, f"--fail={when}")
        assert [process.end() for process in (worker, job.scheduler, *job.servers)] == [1, 1, 1]
        for process in (job.scheduler, *job.servers):
            process.line("worker-0 failed and no worker is left: RuntimeError: this script fails")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--batch-size=0", "ConfigError: batch_size is 0; it must be a whole number of at least 1"),
        ("--lbfgs", "UnsupportedError: .*LBFGS"),
    ],
)
def test_what_cannot_be_done_is_refused_before_training(
    starter: Starter, argument: str, words: str
) -> None:
    process = starter.start("alone", [str(JOBS / JOB), argument], {})
    assert process.end() == 1
    process.line(words)


def test_a_missing_scheduler_is_told_with_its_address_in_time(starter: Starter) -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))  # not listening, and nobody else can
        address = f"tcp://{LOOPBACK}:{taken.getsockname()[1]}"
        values = {"TREEFOLD_SCHEDULER": address, "TREEFOLD_CONNECT_TIMEOUT_S": "1"}
        process = starter.start("lost", [str(JOBS / JOB)], values)
        assert process.end() == 3
    process.line("no scheduler answered within 1 s")


def test_wrong_calls_of_the_low_level_client_are_refused_and_right_ones_work_afterwards(
    cluster: Callable[..., Cluster],
) -> None:
    with cluster(1, 2) as job:
        wrong = job.worker("direct.py", "--mistakes")
        job.worker("direct.py")
        job.bits()
    told = {name: (kind, text) for name, kind, text in wrong.all(r"^([\w -]+): (\w+): (.*)$")}
    expected = "a gradient for table 'weights': expected torch.float32 [10], got"
    unknown = "there is no table 7; declared are 0 ('weights')"
    assert told == {
        "too short": ("DataError", f"{expected} torch.float32 [9]"),
        "two-dimensional": ("DataError", f"{expected} torch.float32 [2, 5]"),
        "another dtype": ("DataError", f"{expected} torch.float64 [10]"),
        "another number of groups": ("DataError", "table 'weights' has 1 param groups, not 2"),
        "push to an unknown table": ("DataError", unknown),
        "pull of an unknown table": ("DataError", unknown),
        "initial values": (
            "DataError",
            "initial values for table 'other': expected torch.float32 [10], got torch.float16 [10]",
        ),
        "a wait for nothing": ("LocalProtocolError", "wait(3) does not belong to the last push"),
    }


# ---- what comes over the wire --------------------------------------------------------------------


def status_of(job: Cluster) -> dict[str, Any]:  # Any: a JSON document
    """The scheduler's status."""
    found: dict[str, Any] = json.loads(fetch(job.address, REPEATS * REPEAT_MS))
    return found


def push_to(job: Cluster) -> tuple[str, Push]:
    """A server's address, and a push to its shard that is right but for the size of its frame."""
    status = status_of(job)
    [name] = [s["server"] for s in status["tables"][0]["shards"] if s["shard"] == 0]
    [address] = [m["address"] for m in status["members"] if m["name"] == name]
    frame = Frame(Dtype.FLOAT32, 7)
    return address, Push(status["job"], STRANGER, status["view"], 0, 0, 0, 1, 2, 8, 0, 7, [], frame)


WHERE = "table 'model' shard 0 part 0: "


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({}, Code.BAD_PAYLOAD, WHERE + "expected 65536 elements of float32, got 7 of float32"),
        ({"frame": Frame(Dtype.FLOAT16, 14)}, Code.BAD_PAYLOAD, "got 14 of float16"),
        ({"frame": None}, Code.BAD_PAYLOAD, "without payload must mark every tensor absent"),
        ({"absent": [bytes(3)]}, Code.BAD_PAYLOAD, "absent marks of [3] bytes, expected [1]"),
        ({"table": 9}, Code.UNKNOWN_TABLE, "this server has no shard 0 of table 9; it has 0/0"),
        ({"part": 99}, Code.BAD_NODE, "has 1 parts, not part 99"),
        ({"level": 3, "index": 1}, Code.BAD_NODE, r"no node (3, 1) in a fold of 8 slots"),
        (
            {"round": 9, "frame": None, "absent": [b"\1"]},
            Code.FUTURE_ROUND,
            "round 9 of a shard that is at version 2",
        ),
        ({"job": 1}, Code.JOB_MISMATCH, "this server belongs to another job"),
        ({"view": 0}, Code.STALE_VIEW, "view 0 is too old for this shard"),
    ],
)
def test_a_push_that_does_not_fit_is_refused_with_what_was_expected(
    patient: Cluster, changes: dict[str, object], code: Code, words: str
) -> None:
    address, right = push_to(patient)
    push = msgspec.structs.replace(right, **changes)
    payload = [] if push.frame is None else [bytes(push.frame.nbytes)]
    with Stranger(address) as stranger:
        reply = stranger.ask(push, *payload)
    assert isinstance(reply, Refused)
    assert (reply.code, words in reply.text) == (code, True), reply.text


@pytest.mark.parametrize("frames", [[bytes(24)], [], [bytes(28), bytes(28)]])
def test_a_push_with_other_frames_than_announced_is_refused(
    patient: Cluster, frames: list[bytes]
) -> None:
    address, push = push_to(patient)
    with Stranger(address) as stranger:
        reply = stranger.ask(push, *frames)
    sizes = [len(frame) for frame in frames]
    assert isinstance(reply, Refused)
    assert reply.text == f"Push with payload frames of {sizes} bytes, announced [28]"


def garbage(rng: random.Random) -> list[bytes]:
    """Frames of one message: random, or a real message with some bytes changed."""
    plan = LoopPlan(PlanKind.SLOTS, 9, 9, 1, 8, 8, 8, 0, False, 0)
    push = Push(rng.getrandbits(60), STRANGER, 1, 0, 0, 0, 1, 2, 8, 0, 7, [b""], None)
    samples: list[AnyMessage] = [
        Heartbeat(STRANGER, 1, 1, 1, 1, 1, None, "", 1, 0.0),
        DeclarePlan(STRANGER, 1, plan),
        Pull(rng.getrandbits(60), STRANGER, 1, 0, 0, 1, 0, []),
        push,
    ]
    header = bytearray(codec.encode(rng.choice(samples)))
    for _ in range(rng.randrange(4)):
        header[rng.randrange(2, len(header))] = rng.randrange(256)
    first = rng.choice([bytes(header), rng.randbytes(rng.randrange(200))])
    return [first, *(rng.randbytes(rng.randrange(100)) for _ in range(rng.choice([0, 0, 1, 3])))]


def test_garbage_on_every_listener_changes_nothing(patient: Cluster) -> None:
    rng = random.Random(5)
    last = Pull(status_of(patient)["job"], STRANGER, 0, LAST, 0, 0, 0, [])
    for address in addresses(patient):
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        for head in (b"GET / HTTP/1.1\r\n\r\n", b"\xff\0\0\0\0\0\0\0\x01\x7f\x03", b""):
            with socket.create_connection((host, int(port))) as raw:
                raw.sendall(head + rng.randbytes(rng.randrange(5_000)))
        with Stranger(address) as stranger:
            for _ in range(GARBAGE):
                stranger.send(*garbage(rng))
            is_scheduler = address == patient.address
            stranger.send(codec.encode(StatusRequest(LAST) if is_scheduler else last))
            answers = stranger.answers()
            while not is_last(answers[-1]):
                answers += stranger.answers()
        assert sum(isinstance(answer, Refused) for answer in answers) > GARBAGE // 2
        with Stranger(address) as large:
            large.send(bytes(70 << 20))  # above every limit; the connection is closed
    assert status_of(patient)["phase"] == "running"


def is_last(answer: AnyMessage) -> bool:
    """Whether this answers the last message that was sent."""
    is_refused = isinstance(answer, Refused) and f"of table {LAST}" in answer.text
    return is_refused or (isinstance(answer, StatusReply) and answer.call == LAST)
