"""A live cluster under fire: it neither dies nor hangs nor grows, and training has its bits.

One job without keys, which lets anybody speak: 10,000 connections that bring garbage, and 100,000
messages that are malformed, nested, mistyped or too large, while a worker trains, and then messages
without an end. The figures are printed.
"""

import contextlib
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import msgspec
import psutil
import pytest
import zmq

from tests.integration.test_bad_input import STRANGER, addresses, garbage, status_of
from tests.integration.test_trouble import begin_round
from tests.support.endless import endless
from tests.support.processes import Bits, Cluster, Gate
from treefold.wire import codec
from treefold.wire.messages import Heartbeat, Pull, StatusReply, StatusRequest
from treefold.wire.segments import SegmentAnswer, SegmentOffer

JOB = "three_tables.py"
CONNECTIONS, MESSAGES = 10_000, 100_000
STRANGERS = 25  # for each listener: who sends too much that is refused is not read any more
CORPUS = 2_000  # different messages, sent again and again
OVERSIZED = 10  # for each listener
BIG = (4 << 20) + (65 << 10)  # bytes; more than a server takes
LAST = 1 << 50
PER_BYTE_MAX = 4  # bytes of memory for each hostile byte
BUDGET_BYTES = 192 << 20  # of all processes of the cluster together, whatever comes
ENDLESS_BYTES = 2 << 30  # of each message without an end, if it is let
ANSWER_MS, ANSWERS = 500, 180


def corpus(rng: random.Random) -> list[list[bytes]]:
    """Messages that nobody should send: frames of each."""
    beat = Heartbeat(STRANGER, 1, 1, 1, 1, 1, None, "", 1, 0.0)
    found: list[list[bytes]] = [garbage(rng) for _ in range(CORPUS // 2)]
    while len(found) < CORPUS:
        found += [
            [rng.randbytes(rng.randrange(300))],
            [b"\x91" * rng.randrange(1_000, 50_000)],  # arrays in arrays
            [b"\x81\xa1a" * rng.randrange(1_000, 10_000)],  # maps in maps
            [b"\xdd\xff\xff\xff\xff" + rng.randbytes(50)],  # an array of 2**32 - 1
            [b"\xc6\xff\xff\xff\xff" + rng.randbytes(50)],  # bytes of as many
            [mistyped(rng, msgspec.to_builtins(beat))],
            [mistyped(rng, [34, *msgspec.to_builtins(Pull(1, STRANGER, 1, 0, 0, 1, 0, []))[1:]])],
            [codec.encode(beat)[: rng.randrange(1, 10)]],
            [codec.encode(beat), *(rng.randbytes(9) for _ in range(rng.randrange(40)))],
            [b""] * rng.randrange(1, 50),
        ]
    return found


def mistyped(rng: random.Random, fields: list[object]) -> bytes:
    """A message one of whose fields is of another type, or out of range."""
    wrong: list[object] = [True, "x", 1.5, -1, 1 << 63, None, [[]], {"a": 1}, b"\0" * 99]
    changed = [*fields]
    changed[rng.randrange(1, len(changed))] = rng.choice(wrong)
    return msgspec.msgpack.encode(changed)


class Attack:
    """What was tried."""

    def __init__(self) -> None:
        self.connections = self.messages = self.oversized = self.nbytes = self.answered = 0
        self._lock = threading.Lock()

    def add(self, **counts: int) -> None:
        """Count, from any thread."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)


def knock(address: str, count: int, rng: random.Random, attack: Attack) -> None:
    """Connections that bring garbage, or nothing, and are closed or reset."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    heads = [b"GET / HTTP/1.1\r\n\r\n", b"\xff\0\0\0\0\0\0\0\x01\x7f\x03", b"\x16\x03\x01", b""]
    heads.append(b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\0NULL" + bytes(48))  # as ZeroMQ greets
    reset = struct.pack("ii", 1, 0)
    for number in range(count):
        body = rng.choice(heads) + rng.randbytes(rng.randrange(200))
        with contextlib.suppress(OSError), socket.create_connection((host, int(port))) as raw:
            if number % 3 == 0:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            raw.sendall(body)
            attack.add(nbytes=len(body))
        attack.add(connections=1)


def flood(address: str, messages: list[list[bytes]], count: int, attack: Attack) -> None:
    """Send messages to one listener from some peers; wait until all of them were looked at."""
    context = zmq.Context()
    peers = [context.socket(zmq.DEALER) for _ in range(STRANGERS)]
    for peer in peers:
        peer.connect(address)
    for number in range(count):
        frames = messages[number % len(messages)]
        peers[number % STRANGERS].send_multipart(frames)
        attack.add(nbytes=sum(map(len, frames)), messages=1)
    for peer in peers:
        attack.add(answered=drain(peer))
    for _ in range(OVERSIZED):
        with contextlib.closing(context.socket(zmq.DEALER)) as peer:
            peer.setsockopt(zmq.LINGER, 2_000)
            peer.connect(address)
            peer.send(bytes(BIG))
        attack.add(nbytes=BIG, messages=1, oversized=1)
    context.destroy(linger=2_000)


def drain(peer: zmq.Socket[bytes]) -> int:
    """Ask one question more until it is answered; how many answers came before."""
    answers = 0
    for _ in range(ANSWERS):
        peer.send(codec.encode(SegmentOffer(LAST, 1, 1, 8, bytes(16))))
        peer.send(codec.encode(StatusRequest(LAST)))
        while peer.poll(ANSWER_MS):
            for answer in codec.decode_all(peer.recv_multipart()[0]):
                answers += 1
                if isinstance(answer, SegmentAnswer) and answer.segment == LAST:
                    return answers
                if isinstance(answer, StatusReply) and answer.call == LAST:
                    return answers
    raise AssertionError("no answer to an honest question after the flood")


@contextlib.contextmanager
def peak_of(pids: list[int]) -> Iterator[Callable[[], int]]:
    """How far the memory of processes went up, in bytes."""
    before = sum(psutil.Process(pid).memory_info().rss for pid in pids)
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # forget the peak so far
    yield lambda: sum(high_water(pid) for pid in pids) - before


def high_water(pid: int) -> int:
    """The most memory that a process has had, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def attack_all(job: Cluster, messages: list[list[bytes]], attack: Attack) -> None:
    """Everything, on every listener at once."""
    places = addresses(job)
    threads = []
    for number, address in enumerate(places):
        rng = random.Random(number)
        knocks, floods = CONNECTIONS // len(places) + 1, MESSAGES // len(places) + 1
        threads += [
            threading.Thread(target=knock, args=(address, knocks, rng, attack)),
            threading.Thread(target=flood, args=(address, messages, floods, attack)),
        ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def go_on_for_ever(places: list[str]) -> list[int]:
    """A message without an end for each listener; how much of it was sent until it was closed."""
    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(endless, places, repeat("large"), repeat(ENDLESS_BYTES)))


@pytest.mark.slow
def test_a_cluster_under_fire_stays_up_stays_small_and_trains_to_the_same_bits(
    cluster: Callable[..., Cluster],
    alone: Callable[..., Bits],
    gate: Gate,
    capfd: pytest.CaptureFixture[str],
) -> None:
    messages, attack, begun = corpus(random.Random(6)), Attack(), time.monotonic()
    with cluster(2, 1) as job:
        worker = job.worker(JOB, f"--gate=9:{gate.path}", "--sleep-ms=20")
        begin_round(worker, 1)
        pids = [process.pid for process in (job.scheduler, *job.servers)]
        with peak_of(pids) as peak:
            attack_all(job, messages, attack)
            grown = peak()
        with peak_of(pids) as peak:
            sent = go_on_for_ever(addresses(job))
            swollen = peak()
        worker.line("^at the gate in round 9")  # it has trained meanwhile, and waits for the end
        assert status_of(job)["phase"] == "running"
        gate.open()
        assert job.bits() == alone(JOB, "slots=8")
    assert attack.connections >= CONNECTIONS
    assert attack.messages >= MESSAGES
    with capfd.disabled():
        sys.stdout.write(
            f"\nhostile input: {attack.connections:,} connections and {attack.messages:,} messages "
            f"({attack.oversized} too large), {attack.nbytes / 2**20:.0f} MiB in "
            f"{time.monotonic() - begun:.0f} s; none taken, {attack.answered:,} answered; memory "
            f"of 3 processes grew by {grown / 2**20:.0f} MiB; messages without an end closed after "
            f"{', '.join(f'{one / 2**20:.0f}' for one in sent)} MiB, memory grew by "
            f"{swollen / 2**20:.0f} MiB\n"
        )
    assert max(sent) < ENDLESS_BYTES
    assert swollen < sum(sent) + BUDGET_BYTES
    assert grown <= min(PER_BYTE_MAX * attack.nbytes, BUDGET_BYTES)
