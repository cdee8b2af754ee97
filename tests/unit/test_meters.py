"""What connections bring and nobody takes is bounded; what is taken is not."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from tests.integration.test_hostile import peak_of
from tests.support.endless import OLD_GREETING, endless
from treefold.cli.keys import main as keys
from treefold.common.audit import Audit
from treefold.common.config import Settings
from treefold.scheduler.shell import SchedulerShell
from treefold.server.shell import ServerShell
from treefold.transport import budgets, meters
from treefold.transport.access import access_of
from treefold.transport.budgets import Allowance, Budget
from treefold.transport.meters import LARGEST_BYTES, Connection, Meter, PeerBudget, queue_max
from treefold.transport.sockets import DATA_FRAME_BYTES_MAX, Arrival, Hub
from treefold.wire.permissions import KeyRole

MIB = 1 << 20
PATIENCE_S = 20.0
TURN_NS = 10_000_000
DOOR = "door"
SIZES = [0, 1, 221, 222, 223, 254, 255, 256, 257, 65_535, 65_536, MIB, 4 * MIB]


class Place:
    """A listener, and peers that are honest."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        limit = DATA_FRAME_BYTES_MAX
        self.address = hub.listen(DOOR, "tcp://127.0.0.1:0", insecure=False, frame_bytes_max=limit)
        self.context = zmq.Context()
        self.arrived: list[Arrival] = []

    @property
    def meter(self) -> Meter:
        return self.hub._meters[DOOR]

    @property
    def where(self) -> tuple[str, int]:
        host, _, port = self.address.removeprefix("tcp://").rpartition(":")
        return host, int(port)

    def peer(self) -> zmq.Socket[bytes]:
        made = self.context.socket(zmq.DEALER)
        made.setsockopt(zmq.RECONNECT_IVL, 10)
        made.connect(self.address)
        return made

    def serve(self, is_over: Callable[[], bool], batch_max: int = 64) -> None:
        """Take what comes until something is so."""
        deadline = time.monotonic() + PATIENCE_S
        while not is_over():
            assert time.monotonic() < deadline
            self.arrived += self.hub.wait(TURN_NS, batch_max)

    def take(self, count: int) -> None:
        """Take what comes until so many messages have come in all."""
        self.serve(lambda: len(self.arrived) >= count)

    def look(self) -> None:
        """Look now."""
        self.meter.due_ns = 0
        self.meter.look()

    def held(self) -> list[int]:
        """What is thought to wait of each connection."""
        self.look()
        return [one.received - one.taken for one in self.meter._connections.values()]

    def close(self) -> None:
        self.context.destroy(linger=0)
        self.hub.close()


@contextlib.contextmanager
def place(hub: Hub | None = None, budget: PeerBudget | None = None) -> Iterator[Place]:
    made = Place(hub or Hub(budget=budget or PeerBudget(64 * MIB)))
    try:
        yield made
    finally:
        made.close()


class Hostile:
    """Brings a message without an end, in a thread of its own.

    Attributes
    ----------
    sent : list of int
        Bytes, once its connection is closed.
    is_done : Event
        All of it was sent.
    """

    def __init__(self, address: str, kind: str, nbytes: int) -> None:
        self.sent: list[int] = []
        self.is_done = threading.Event()
        self._what = address, kind, nbytes
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        self.sent.append(endless(*self._what, self.is_done.set))


# ---- messages without an end ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "nbytes", "per_byte"),
    [
        ("large", 2048 * MIB, 1),
        ("old", 2048 * MIB, 1),
        ("empty", 120 * MIB, 32),
    ],
)
def test_a_message_without_an_end_is_ended_and_others_go_on(
    kind: str, nbytes: int, per_byte: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with place() as at, at.peer() as honest, peak_of([os.getpid()]) as peak:
        hostile = Hostile(at.address, kind, nbytes)
        asked = 0
        while not hostile.sent:
            honest.send(b"%d" % asked)
            asked += 1
            at.take(asked)
        grown = peak()
    assert at.hub.traffic.cut == 1
    assert hostile.sent[0] < nbytes
    assert [one.header for one in at.arrived] == [b"%d" % number for number in range(asked)]
    with capfd.disabled():
        sys.stdout.write(
            f"\na message without an end, {kind} frames: closed after "
            f"{hostile.sent[0] / MIB:.0f} of {nbytes / MIB:.0f} MiB, memory grew by "
            f"{grown / MIB:.0f} MiB; another peer's {asked:,} messages arrived\n"
        )
    assert grown < per_byte * hostile.sent[0] + 64 * MIB


@pytest.mark.parametrize("kind", ["large", "old"])
def test_where_the_kernel_says_nothing_all_of_it_is_held(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meters, "TCP_INFO", -1)
    with place() as at:
        hostile = Hostile(at.address, kind, 600 * MIB)
        at.serve(hostile.is_done.is_set)  # so ZeroMQ has it: the kernel's buffers are smaller
        at.look()
        assert at.hub.traffic.cut == 0
        assert at.arrived == []
        assert not hostile.sent


def test_a_message_without_an_end_is_ended_while_others_keep_the_listener_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with place() as at, at.peer() as honest:
        monkeypatch.setattr(at.meter, "_listener", AlwaysReadable())
        hostile = Hostile(at.address, "large", 2048 * MIB)
        while not hostile.sent:
            honest.send(b"")
            at.arrived += at.hub.wait(TURN_NS, 1)
    assert at.hub.traffic.cut == 1
    assert hostile.sent[0] < 2048 * MIB


class AlwaysReadable:
    """A socket that has a message, whatever is taken."""

    def getsockopt(self, option: int) -> int:
        del option
        return int(zmq.POLLIN)


def test_what_an_old_peer_sends_does_not_switch_the_looks_off() -> None:
    with place() as at, socket.create_connection(at.where) as raw:
        raw.sendall(OLD_GREETING + bytes([4, 0]) + b"old" + bytes([4, 0]) + b"one")
        at.take(2)
        assert [one.header for one in at.arrived] == [b"old", b"one"]
        hostile = Hostile(at.address, "large", 2048 * MIB)
        at.serve(lambda: bool(hostile.sent))
        assert at.hub.traffic.cut == 1
        raw.sendall(bytes([4, 0]) + b"two")
        at.take(3)


def test_a_message_of_very_many_frames_is_not_kept_and_ends_its_connection() -> None:
    with place() as at, at.peer() as peer:
        peer.send_multipart([b""] * 100_000)
        at.serve(lambda: at.hub.traffic.cut == 1)
        assert [len(one.payloads) for one in at.arrived] == [meters.FRAMES_MAX]
        peer.send(b"again")
        at.take(2)
        assert at.arrived[1].header == b"again"


# ---- peers in earnest ----------------------------------------------------------------------------


@pytest.mark.parametrize("is_guarded", [False, True])
def test_bytes_are_counted_as_the_kernel_counts_them(is_guarded: bool, tmp_path: Path) -> None:
    keys(["init", str(tmp_path)])
    who = [
        access_of(Settings(keys=str(tmp_path) if is_guarded else ""), role)
        for role in (KeyRole.SERVER, KeyRole.WORKER)
    ]
    link = Hub(access=who[1])
    with place(Hub(access=who[0])) as at:
        link.connect(DOOR, at.address, DATA_FRAME_BYTES_MAX)
        link.send(DOOR, None, b"")
        at.serve(lambda: list(link.wait(0, 1)) == [] and len(at.arrived) == 1)
        [handshake] = at.held()
        for size in SIZES:
            link.send(DOOR, None, bytes(min(size, MIB)))
            link.send_frame(DOOR, None, b"%d" % size, memoryview(bytes(size)))
        at.take(1 + 2 * len(SIZES))
        assert handshake < 1_000
        assert at.held() == [handshake]
    link.close()


def test_whole_messages_that_are_taken_are_never_too_many() -> None:
    count = 3 * 64  # three times the budget
    with place() as at, at.peer() as peer:
        for _ in range(count):
            peer.send_multipart([b"x", bytes(MIB)], copy=False)
        at.serve(lambda: max(at.held(), default=0) < 64 * MIB and len(at.arrived) == count)
        assert at.hub.traffic.cut == 0


def test_the_largest_messages_that_wait_are_within_the_budget() -> None:
    for bytes_max in (1 << 28, PeerBudget().bytes_max, 1 << 40):
        assert 2 * meters.QUEUE_MIN < queue_max(bytes_max) <= meters.QUEUE_MAX
        assert queue_max(bytes_max) * LARGEST_BYTES + 32 * MIB <= bytes_max  # and the kernel's
    assert queue_max(0) == meters.QUEUE_MIN


def test_whole_messages_that_nobody_takes_are_ended_beyond_the_budget() -> None:
    with place(budget=PeerBudget(9 * MIB)) as at, at.peer() as peer:
        for number in range(40):
            peer.send_multipart([b"%d" % number, bytes(MIB)])
        deadline = time.monotonic() + PATIENCE_S
        while not at.hub.traffic.cut:
            assert time.monotonic() < deadline
            at.look()
        at.serve(lambda: b"39" in [one.header for one in at.arrived])  # by another connection


def test_a_host_that_brings_more_than_it_may_in_a_second_is_cut_off(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with place(budget=PeerBudget(64 * MIB, 1)) as at, at.peer() as peer:
        for count in range(1, 63):
            peer.send(bytes(MIB))
            at.take(count)
        at.look()
        assert at.hub.traffic.cut == 0
        for _ in range(4):
            peer.send(bytes(MIB))
        at.serve(lambda: at.hub.traffic.cut > 0)
    assert "more bytes from 127.0.0.1 than peer_bytes_per_s, 1, allows" in caplog.text


def test_a_host_owes_what_it_had_not_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now_ns = [0]
    monkeypatch.setattr(budgets, "monotonic_ns", lambda: now_ns[0])
    allowance = Allowance(Budget(100, 10))
    assert allowance.pay("one", 100)
    assert not allowance.pay("one", 50)
    now_ns[0] += 4_000_000_000
    assert not allowance.pay("one", 1)
    assert allowance.pay("another", 1)
    now_ns[0] += 2_000_000_000
    assert allowance.pay("one", 1)
    monkeypatch.setattr(budgets, "PEERS_MAX", 1)
    assert allowance.pay("third", 1)
    assert list(allowance._left) == ["one", "third"]


# ---- whom it hits --------------------------------------------------------------------------------


def test_who_is_ended_is_named_and_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    audit = Audit(str(tmp_path / "audit"), "server")
    with place(Hub(audit=audit)) as at, at.peer() as peer:
        peer.send(b"before")
        at.take(1)
        [connection] = at.meter.senders.values()
        at.meter.end(connection, "why")
        at.meter.end(connection, "why")
        peer.send(b"after")
        at.take(2)
        assert [one.header for one in at.arrived] == [b"before", b"after"]
        assert at.arrived[0].sender != at.arrived[1].sender
        assert at.hub.traffic.cut == 1
        at.look()
        assert list(at.meter.senders) == [at.arrived[1].sender]  # the other one is forgotten
    deed = json.loads((tmp_path / "audit").read_text())
    assert (deed["what"], deed["is_allowed"], deed["text"]) == ("connect", False, "closed: why")
    assert deed["where"].startswith("127.0.0.1:")
    assert f"connection from {deed['where']} closed (1 so far): why" in caplog.text
    audit.close()


def test_a_descriptor_that_is_another_connections_by_now_is_left_alone() -> None:
    with place() as at, at.peer() as peer:
        peer.send(b"")
        at.take(1)
        [connection] = at.meter.senders.values()
        at.meter.end(Connection(connection.cookie + 1, connection.descriptor), "gone")
        at.meter.end(Connection(connection.cookie, 1 << 20), "gone")
        peer.send(b"")
        at.take(2)
        assert at.arrived[0].sender == at.arrived[1].sender
        assert at.hub.traffic.cut == 0


def test_a_message_whose_descriptor_is_another_sockets_by_now_is_taken_off_nobody() -> None:
    with place() as at, socket.create_server(("127.0.0.1", 0)) as server:
        others = [socket.create_connection(server.getsockname()), server]
        with others[0]:
            for other in others:
                found = at.meter.meet(b"gone", From(other.fileno()))  # type: ignore[arg-type] # a double
                assert found == Connection()
        assert at.meter.meet(b"gone", From(1 << 20)) == Connection()  # type: ignore[arg-type] # likewise
        assert at.meter._connections == {}


class From:
    """A frame that came by a socket."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def get(self, option: int) -> int:
        del option
        return self._descriptor


def test_only_connections_to_the_listeners_own_port_are_looked_at() -> None:
    with place() as at, place() as other, at.peer() as peer, other.peer() as stranger:
        link = Hub()
        link.connect(DOOR, other.address, DATA_FRAME_BYTES_MAX)
        for one in (peer, stranger):
            one.send(b"")
        link.send(DOOR, None, b"")
        for each, count in ((at, 1), (other, 2)):
            each.take(count)
            each.look()
            assert len(each.meter.senders) == count
            assert len(each.meter._connections) == count
        link.close()


def test_a_flood_of_ended_connections_does_not_fill_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "monotonic_ns", lambda: 5_000_000_000)
    with place() as at, socket.create_server(("127.0.0.1", 0)) as server:
        for _ in range(30):
            with socket.create_connection(server.getsockname()) as raw:
                connection = Connection(meters._cookie(raw), raw.fileno())
                at.meter.end(connection, "why")
        assert at.hub.traffic.cut == 30
    assert caplog.text.count("closed (") == meters.SAID_PER_S_MAX


# ---- settings ------------------------------------------------------------------------------------


def test_scheduler_and_servers_have_the_budget_of_the_settings() -> None:
    bind = "tcp://127.0.0.1:0"
    scheduler = SchedulerShell(
        Settings(bind=bind, peer_bytes_max=1 << 27, peer_bytes_per_s=1 << 20)
    )
    server = ServerShell(
        Settings(bind=bind, scheduler=scheduler.address, peer_bytes_max=1 << 28, peer_bytes_per_s=1)
    )
    assert meter_of(scheduler)._budget == PeerBudget(1 << 27, 1 << 20)
    assert meter_of(server)._budget == PeerBudget(1 << 28, 1)
    for shell in (server, scheduler):
        shell._hub.close()


def meter_of(shell: SchedulerShell | ServerShell) -> Meter:
    [meter] = shell._hub._meters.values()
    return meter
