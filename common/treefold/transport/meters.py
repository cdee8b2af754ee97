"""What the connections of a listener have brought and nobody has taken yet; too much ends them.

ZeroMQ gathers the frames of a message until the last one is there, however many they are, and
counts none of it. But the kernel knows how many bytes a TCP connection has brought, and what was
handed over is counted here. The difference, less what the kernel has still, waits in ZeroMQ.

Needs Linux. Elsewhere nothing is known, and nothing is ended.
"""

import fcntl
import os
import socket
import struct
import sys
import termios
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import zmq

from treefold.common.audit import Audit
from treefold.common.log import logger
from treefold.transport.budgets import Allowance, Budget
from treefold.transport.traffic import Traffic

LOOK_NS = 200_000_000  # a fast connection brings some 100 MB meanwhile
QUEUE_MIN, QUEUE_MAX = 16, 256  # messages per peer that ZeroMQ takes from the kernel ahead of us
LARGEST_BYTES = (4 << 20) + (64 << 10)  # of messages that come in numbers: those with tensors
SPARE_MESSAGES = 16  # of the budget: for the message that is gathered, and for small ones
FRAMES_MAX = 64  # of one message, of those in earnest two: it is kept no further
ROUNDS_MIN = 3  # of ZeroMQ's turns among peers, after which every one has had its turn
SAID_PER_S_MAX = 10  # lines; a flood must not fill the log
DESCRIPTORS = "/proc/self/fd"
AT_ONCE = struct.pack("ii", 1, 0)  # a peer that does not read hears of it, too
SO_COOKIE = 57  # a number that no other socket has had since the machine started
TCP_INFO = getattr(socket, "TCP_INFO", -1)
RECEIVED_AT = 128  # of tcpi_bytes_received in struct tcp_info
SAYS_SOURCE = (4, 2, 0)  # the first ZeroMQ that says by which socket a message came
SOURCE, READABLE = int(zmq.SRCFD), int(zmq.POLLIN)
SOL_SOCKET, IPPROTO_TCP = int(socket.SOL_SOCKET), int(socket.IPPROTO_TCP)
T = TypeVar("T")
CURVE_BYTES = 33  # that encryption adds to each frame


@dataclass(frozen=True, slots=True)
class PeerBudget:
    """What a peer may bring.

    Attributes
    ----------
    bytes_max : int
        That may wait of one connection.
    bytes_per_s : int
        That one host may bring in the mean, after as many as may wait; 0: any number.
    """

    bytes_max: int = 512 << 20
    bytes_per_s: int = 0


@dataclass(slots=True)
class Connection:
    """One connection.

    Attributes
    ----------
    cookie : int
        The kernel's name for it; 0 if it was gone before it was met, or is not known.
    descriptor : int
        Of its socket. The number may be another one's by now, the cookie is not.
    host : str
        Whose it is.
    received : int
        Bytes that it has brought up to the last look.
    taken : int
        Bytes, as they came by the wire, of messages that were handed over.
    messages, before : int
        Messages that were handed over, and those of them that were at the last look.
    is_suspect : bool
        Whether at the last look more waited than one message can have.
    is_cut : bool
        Whether it was ended here.
    """

    cookie: int = 0
    descriptor: int = -1
    host: str = ""
    received: int = 0
    taken: int = 0
    messages: int = 0
    before: int = 0
    is_suspect: bool = False
    is_cut: bool = False


class Meter:
    """Counts for one listener on TCP.

    Parameters
    ----------
    listener : zmq.Socket
        A bound ROUTER socket.
    budget : PeerBudget
        What a peer may bring.
    message_bytes_max : int
        The largest message of a peer in earnest: more of one message is never waited for.
    traffic : Traffic
        Is told how many connections were ended.
    audit : Audit, optional
        Is told of each.

    Attributes
    ----------
    senders : dict of Connection
        By routing identity, of peers that have sent a message.
    due_ns : int
        When to look again.
    """

    def __init__(
        self,
        listener: zmq.Socket[bytes],
        budget: PeerBudget,
        message_bytes_max: int,
        traffic: Traffic,
        audit: Audit | None,
    ) -> None:
        self.senders: dict[Hashable, Connection] = {}
        self.due_ns = 0
        self._listener = listener
        endpoint = listener.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        self._port = int(endpoint.rpartition(":")[2])
        self._extra = CURVE_BYTES if listener.getsockopt(zmq.MECHANISM) == zmq.CURVE else 0
        self._budget, self._message_bytes_max = budget, message_bytes_max
        self._allowance = Allowance(Budget(budget.bytes_max, budget.bytes_per_s))
        self._traffic, self._audit = traffic, audit
        self._connections: dict[int, Connection] = {}
        self._is_able = (
            TCP_INFO >= 0 and Path(DESCRIPTORS).is_dir() and zmq.zmq_version_info() >= SAYS_SOURCE
        )
        self._said = (0, 0)
        self._log = logger("transport")

    def meet(self, sender: Hashable, frame: zmq.Frame) -> Connection:
        """The connection that a peer's first message came by."""
        try:
            descriptor: int | None = int(frame.get(SOURCE))
        except zmq.ZMQError:  # of peers with a protocol before ZMTP 3.0, which ours are not
            descriptor = None
        cookie = None if descriptor is None else _ask(descriptor, self._name)
        if descriptor is None or cookie is None:
            found = Connection()  # so nothing that it sends is taken off what it has brought
        else:
            found = self._connections.get(cookie) or Connection(cookie, descriptor)
            self._connections[cookie] = found
        self.senders[sender] = found
        return found

    def take(self, connection: Connection, sizes: list[int]) -> None:
        """A message with frames of these sizes was handed over."""
        connection.messages += 1
        for size in sizes:
            nbytes = size + self._extra
            connection.taken += nbytes + (2 if nbytes < 256 else 9)
        if len(sizes) > FRAMES_MAX:
            self.end(connection, f"a message of {len(sizes)} frames")

    def look(self) -> None:
        """End the connections of which too much waits, if it is time to look."""
        now_ns = time.monotonic_ns()
        if now_ns < self.due_ns:
            return
        self.due_ns = now_ns + LOOK_NS
        if not self._is_able:
            return
        known, self._connections = self._connections, {}
        measure = partial(self._measure, known)
        suspects = [one for number in _descriptors() if (one := _ask(number, measure)) is not None]
        self._judge(suspects)
        self.senders = {
            sender: one for sender, one in self.senders.items() if one.cookie in self._connections
        }

    def _measure(self, known: dict[int, Connection], sock: socket.socket) -> Connection | None:
        """Look at a socket; a connection of which more waits than one message can have is said."""
        cookie = _cookie(sock)
        one = known.get(cookie)
        if one is None:
            if self._name(sock) is None:
                return None
            one = Connection(cookie, sock.fileno())
        self._connections[cookie] = one
        brought, one.received = one.received, _received(sock)
        if self._budget.bytes_per_s:
            self._charge(one, one.received - brought, sock)
        one.taken = min(one.taken, one.received)
        held = one.received - one.taken
        if held <= self._message_bytes_max:
            return None
        held -= _unread(sock)
        if held > self._budget.bytes_max:
            self.end(one, f"{held} bytes of it wait, peer_bytes_max is {self._budget.bytes_max}")
        return one if held > self._message_bytes_max else None

    def _name(self, sock: socket.socket) -> int | None:
        """The cookie of a connection to this listener; None of all other sockets."""
        name = sock.getsockname()
        if not isinstance(name, tuple) or name[1] != self._port:
            return None
        is_listener = sock.getsockopt(SOL_SOCKET, socket.SO_ACCEPTCONN)
        return None if is_listener else _cookie(sock)

    def _charge(self, one: Connection, nbytes: int, sock: socket.socket) -> None:
        """Count what was brought against what the host may bring."""
        one.host = one.host or sock.getpeername()[0]
        if nbytes and not self._allowance.pay(one.host, nbytes):
            limit = self._budget.bytes_per_s
            self.end(one, f"more bytes from {one.host} than peer_bytes_per_s, {limit}, allows")

    def end(self, connection: Connection, text: str) -> None:
        """Shut a connection down; ZeroMQ then lets go of the message that it gathers for it."""
        if connection.is_cut:
            return
        try:
            with socket.socket(fileno=os.dup(connection.descriptor)) as own:
                if _cookie(own) != connection.cookie:
                    return  # it is gone, and its number is another one's
                host, port = own.getpeername()[:2]
                own.setsockopt(SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
                own.shutdown(socket.SHUT_RDWR)
        except OSError:  # it is gone
            return
        connection.is_cut = True
        self._traffic.cut += 1
        where = f"{host}:{port}"
        if self._audit is not None:
            self._audit.deny("connect", f"closed: {text}", who=("", "", where))
        second = time.monotonic_ns() // 1_000_000_000
        self._said = (second, self._said[1] + 1 if self._said[0] == second else 1)
        if self._said[1] <= SAID_PER_S_MAX:
            self._log.warning(
                "connection from %s closed (%d so far): %s", where, self._traffic.cut, text
            )

    def _judge(self, suspects: list[Connection]) -> None:
        """End those of whom no message is complete, and more waits than one can have.

        ZeroMQ hands out one message of each peer in turn. So a peer has no complete one if there
        is none at all, or if it gave none while another one gave several.
        """
        is_drained = bool(suspects) and not int(self._listener.getsockopt(zmq.EVENTS)) & READABLE
        rounds = max((one.messages - one.before for one in self._connections.values()), default=0)
        for one in suspects:
            is_passed = one.is_suspect and one.messages == one.before and rounds >= ROUNDS_MIN
            if is_drained or is_passed:
                self.end(one, f"a message of more than {self._message_bytes_max} bytes")
        for one in self._connections.values():
            one.before, one.is_suspect = one.messages, False
        for one in suspects:
            one.is_suspect = True


def queue_max(budget_bytes: int) -> int:
    """How many messages of a peer ZeroMQ may take ahead, so that the largest are in the budget."""
    return max(QUEUE_MIN, min(QUEUE_MAX, budget_bytes // LARGEST_BYTES - SPARE_MESSAGES))


def _descriptors() -> list[int]:
    """All open files of this process."""
    with os.scandir(DESCRIPTORS) as entries:
        return [int(entry.name) for entry in entries]


def _ask(descriptor: int, question: Callable[[socket.socket], T | None]) -> T | None:
    """Ask a socket of ZeroMQ's; None if it is none, another kind of one, or gone meanwhile."""
    try:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, 0, descriptor)
    except OSError:
        return None
    try:
        return question(sock)
    except OSError:
        return None
    finally:
        sock.detach()  # it is not ours to close


def _cookie(sock: socket.socket) -> int:
    return int.from_bytes(sock.getsockopt(SOL_SOCKET, SO_COOKIE, 8), sys.byteorder)


def _received(sock: socket.socket) -> int:
    """How many bytes a connection has brought."""
    info = sock.getsockopt(IPPROTO_TCP, TCP_INFO, RECEIVED_AT + 8)
    return int.from_bytes(info[RECEIVED_AT:], sys.byteorder)


def _unread(sock: socket.socket) -> int:
    """How many of them the kernel has still."""
    count = fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4))
    return int.from_bytes(count, sys.byteorder)
