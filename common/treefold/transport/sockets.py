"""Sockets of one process: a listener, links to others, and a bell that other threads may ring.

One thread owns a `Hub` and everything in it. Only `Bell.ring` may be called from elsewhere. Nothing
here understands messages: what goes in and out is an address, a header and a payload.
"""

import errno
import os
import time
from collections.abc import Hashable, Iterator

import msgspec
import zmq

from treefold.common.address import is_ipv6, is_named
from treefold.common.audit import Audit
from treefold.common.errors import AuthError, ConfigError, LocalProtocolError
from treefold.common.log import logger
from treefold.transport.access import Access
from treefold.transport.bell import Bell
from treefold.transport.links import Link, Step
from treefold.transport.meters import (
    FRAMES_MAX,
    LARGEST_BYTES,
    QUEUE_MAX,
    Meter,
    PeerBudget,
    queue_max,
)
from treefold.transport.reach import bind_text, check_reach, is_reachable
from treefold.transport.traffic import Traffic
from treefold.transport.zap import DOMAIN, Doorman
from treefold.wire.permissions import KeyRole

CONTROL_FRAME_BYTES_MAX = 64 << 20  # specs and views of very large jobs
DATA_FRAME_BYTES_MAX = (4 << 20) + (64 << 10)  # the largest payload frame, or a header
IN_FLIGHT_MAX = 1_024  # messages remembered before those that have left are forgotten
PEER_BUDGET = PeerBudget()
FLUSH_MS = 2_000  # how long a closing process waits for its last messages to leave
HANDSHAKE_MS = 3_000
RECONNECT_MS = 50
RECONNECT_MAX_MS = 500
CONNECT_MS = 1_000  # an attempt that is not answered by then is made again, not waited for
UNACKNOWLEDGED_MAX_MS = 3_000  # what the kernel could not deliver for so long: connect anew
MS = 1_000_000  # nanoseconds
WARNING_S = 300  # between two warnings that nothing is encrypted
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT = 30, 10, 3
Context = zmq.Context[zmq.Socket[bytes]]
"""What sockets live in; roles in one process share one to reach each other over `inproc://`."""
# As plain numbers: to combine pyzmq's enums takes as long as what they are for.
DONTWAIT, READABLE = int(zmq.DONTWAIT), int(zmq.POLLIN)
MORE_FOLLOWS = int(zmq.DONTWAIT | zmq.SNDMORE)
NUMBERS_THREAD, NAMES_THREAD = 1, 2  # bits: ZeroMQ's first and second thread


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """One message as it came.

    ``socket`` is the name of the socket that it came by, ``sender`` the routing identity (listener)
    or that name again (link). ``public`` is the sender's key, which its connection has proven;
    ``where`` its address, known of peers with keys.
    """

    socket: Hashable
    sender: Hashable
    header: bytes
    payloads: list[memoryview]
    public: str = ""
    where: str = ""


class Hub:
    """All sockets of one thread, and the wait for them.

    Parameters
    ----------
    context : Context, optional
        Shared by processes-in-one (`inproc://`); by default the hub's own.
    access : Access, optional
        This process's keys. With them every connection to another process is encrypted, both ends
        prove their keys, and who is not on the allow-list is not let in.
    audit : Audit, optional
        Told who connects.
    budget : PeerBudget
        What a peer may bring to a listener over TCP; more closes its connection.

    Attributes
    ----------
    access, audit : Access, Audit or None
        As given.
    traffic : Traffic
        What went by these sockets.
    """

    def __init__(
        self,
        context: Context | None = None,
        access: Access | None = None,
        audit: Audit | None = None,
        budget: PeerBudget = PEER_BUDGET,
    ) -> None:
        self.access = access
        self.audit = audit
        self._budget = budget
        self._doorman: Doorman | None = None
        self._links: dict[Hashable, Link] = {}
        self._warning = ""
        self._warned_ns = 0
        self._context = Context(io_threads=2) if context is None else context
        self._owns_context = context is None
        self._poller = zmq.Poller()
        self._sockets: dict[Hashable, zmq.Socket[bytes]] = {}
        self._listeners: dict[Hashable, None] = {}
        self._meters: dict[Hashable, Meter] = {}
        self._in_flight: dict[Hashable, zmq.MessageTracker] = {}
        self._pid = os.getpid()
        self.traffic = Traffic()
        self.bell = Bell()
        self._poller.register(self.bell.fileno(), zmq.POLLIN)

    def listen(self, name: Hashable, address: str, *, insecure: bool, frame_bytes_max: int) -> str:
        """Open a ROUTER socket.

        Parameters
        ----------
        name : hashable
            What the socket is called in this hub.
        address : str
            Where to listen; port 0 takes a free one.
        insecure : bool
            Whether an address that other machines can reach is allowed without encryption.
        frame_bytes_max : int
            Larger frames close the connection that sends them.

        Returns
        -------
        str
            The address that was bound.

        Raises
        ------
        ConfigError
            The address is taken, not ours, malformed, or reaches beyond this machine without
            ``insecure``.
        """
        if self.access is None and is_reachable(address):
            check_reach(address, insecure=insecure)
            self._warning = address
        new = self._context.socket(zmq.ROUTER)
        for option, value in self._options(address, frame_bytes_max).items():
            new.setsockopt(option, value)
        new.setsockopt(zmq.ROUTER_MANDATORY, 1)
        new.setsockopt(zmq.RCVHWM, queue_max(self._budget.bytes_max))
        self._guard(new)
        wanted = (
            address[:-2] + ":*"
            if address.startswith("tcp://") and address.endswith(":0")
            else address
        )
        try:
            new.bind(wanted)
        except zmq.ZMQError as error:
            new.close(0)
            raise ConfigError(bind_text(address, error)) from error
        self._poller.register(new, zmq.POLLIN)
        self._sockets[name] = new
        self._listeners[name] = None
        if address.startswith("tcp://"):
            limits = self._budget, frame_bytes_max + LARGEST_BYTES
            self._meters[name] = Meter(new, *limits, self.traffic, self.audit)
        return new.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def connect(
        self,
        name: Hashable,
        address: str,
        frame_bytes_max: int,
        role: KeyRole = KeyRole.SERVER,
    ) -> None:
        """Open a DEALER socket to a listener; replaces a link of the same name.

        Parameters
        ----------
        name : hashable
            What the link is called in this hub.
        address : str
            Of the listener.
        frame_bytes_max : int
            Larger frames close the connection.
        role : KeyRole
            What the listener has to be; it has to prove one of the keys that are allowed as that.

        Raises
        ------
        ConfigError
            The address is malformed, or no key is allowed as such a listener.
        """
        self.disconnect(name)
        options = self._options(address, frame_bytes_max)
        link = Link(self._context, address, options, self.access, role)
        self._links[name] = link
        self._watch(name, link)

    def disconnect(self, name: Hashable) -> None:
        """Close a link or listener, if it exists."""
        old = self._sockets.pop(name, None)
        self._listeners.pop(name, None)
        self._meters.pop(name, None)
        link = self._links.pop(name, None)
        if old is not None:
            self._unwatch(old, link)
            if link is None:
                old.close(0)
            else:
                link.close()

    def wait(self, timeout_ns: int | None, batch_max: int) -> Iterator[Arrival]:
        """Wait until something arrives, the bell rings or the time is over; yield what arrived.

        Parameters
        ----------
        timeout_ns : int or None
            Longest wait; None waits for ever.
        batch_max : int
            Messages taken per socket before the caller gets a turn to look at its clock.

        Raises
        ------
        AuthError
            A listener refuses this process's key, or has not shown a right one itself.
        """
        self._warn()
        ready = self._poll(self._until_reopening_ns(timeout_ns))
        if self.access is not None:
            self.access.refresh()  # before what came meanwhile is looked at
        if self.bell.fileno() in ready:
            self.bell.silence()
        for name, link in list(self._links.items()):
            if link.monitor in ready:
                self._on_monitor(name, link)
        for name, known in list(self._sockets.items()):
            if known in ready and self._sockets.get(name) is known:
                yield from self._receive(name, known, batch_max)

    def send(self, name: Hashable, identity: bytes | None, header: bytes) -> bool:
        """Send a message without a payload; never blocks.

        Parameters
        ----------
        name : hashable
            The socket.
        identity : bytes or None
            The peer, for a listener.
        header : bytes
            The encoded message.

        Returns
        -------
        bool
            False if the peer cannot be reached.
        """
        sock = self._socket(name)
        if sock is None:
            return False
        try:
            if identity is not None:
                sock.send(identity, MORE_FOLLOWS)
            sock.send(header, DONTWAIT)
        except zmq.ZMQError as error:
            return _is_unreachable(error)
        self.traffic.to(name, name if identity is None else identity).add(len(header), 0)
        return True

    def send_frame(
        self, name: Hashable, identity: bytes | None, header: bytes, frame: memoryview
    ) -> list[zmq.MessageTracker] | None:
        """Send a message with a payload, without copying it unless it is small; never blocks.

        Parameters
        ----------
        name, identity, header :
            As for `send`. While an equal message is still on its way, this one is skipped.
        frame : memoryview
            Must not be written to until its tracker is done.

        Returns
        -------
        list of zmq.MessageTracker, or None
            Empty if the payload was copied, or the message skipped; None if the peer cannot be
            reached.
        """
        sock = self._socket(name)
        if sock is None:
            return None
        key = (name, identity, header)
        if key in self._in_flight and not self._in_flight[key].done:
            return []
        is_copied = frame.nbytes < sock.copy_threshold
        try:
            if identity is not None:
                sock.send(identity, MORE_FOLLOWS)
            sock.send(header, MORE_FOLLOWS)
            tracker = sock.send(frame, DONTWAIT, copy=is_copied, track=not is_copied)
        except zmq.ZMQError as error:
            _is_unreachable(error)
            return None
        way = self.traffic.to(name, name if identity is None else identity)
        way.add(len(header), frame.nbytes)
        if tracker is None:
            return []
        if not tracker.done:
            self._remember(key, tracker)
        return [tracker]

    def close(self) -> None:
        """Close every socket, waiting a bounded time for what was sent to leave."""
        self._poller.unregister(self.bell.fileno())
        for name, sock in self._sockets.items():
            if name in self._links:
                self._links[name].close_slowly(FLUSH_MS)
            else:
                sock.close(FLUSH_MS)
        self._sockets.clear()
        self._links.clear()
        self.bell.close()
        if self._doorman is not None:
            self._doorman.close()
        if self._owns_context:
            self._context.term()

    def _socket(self, name: Hashable) -> zmq.Socket[bytes] | None:
        if os.getpid() != self._pid:
            msg = "this process was forked from the one that owns the sockets; open your own"
            raise LocalProtocolError(msg)
        return self._sockets.get(name)

    def _remember(self, key: Hashable, tracker: zmq.MessageTracker) -> None:
        if len(self._in_flight) > IN_FLIGHT_MAX:
            self._in_flight = {k: t for k, t in self._in_flight.items() if not t.done}
        self._in_flight[key] = tracker

    # ---- keys ---------------------------------------------------------------------------------

    def _guard(self, listener: zmq.Socket[bytes]) -> None:
        """Let in only whose key is allowed."""
        if self.access is None:
            return
        if self._doorman is None:
            self._doorman = Doorman(self._context, self.access, self.audit)
        listener.setsockopt(zmq.CURVE_SERVER, 1)
        listener.setsockopt(zmq.CURVE_SECRETKEY, self.access.key.secret.encode())
        listener.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        listener.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def _watch(self, name: Hashable, link: Link) -> None:
        self._sockets[name] = link.socket
        self._poller.register(link.socket, zmq.POLLIN)
        if link.monitor is not None:
            self._poller.register(link.monitor, zmq.POLLIN)

    def _unwatch(self, sock: zmq.Socket[bytes], link: Link | None) -> None:
        self._poller.unregister(sock)
        if link is not None and link.monitor is not None:
            self._poller.unregister(link.monitor)

    def _on_monitor(self, name: Hashable, link: Link) -> None:
        step = link.look()
        if step is Step.REFUSED:
            raise AuthError(link.refusal)
        if step is Step.REOPEN:
            self._reopen(name, link)

    def _reopen(self, name: Hashable, link: Link) -> None:
        self._unwatch(link.socket, link)
        link.reopen()
        self._watch(name, link)

    def _until_reopening_ns(self, timeout_ns: int | None) -> int | None:
        """How long may be waited until a link has to be opened again; opens what is due."""
        due = [(link.due_ns, name) for name, link in self._links.items() if link.due_ns]
        for due_ns, name in due:
            left_ns = max(0, due_ns - time.monotonic_ns())
            if not left_ns:
                self._reopen(name, self._links[name])
            timeout_ns = left_ns if timeout_ns is None else min(timeout_ns, left_ns)
        return timeout_ns

    def _poll(self, timeout_ns: int | None) -> dict[object, int]:
        """Wait for sockets; look now and then at what connections have brought."""
        ends_ns = None if timeout_ns is None else time.monotonic_ns() + timeout_ns
        while True:
            until_ns = ends_ns
            for meter in self._meters.values():
                meter.look()
                until_ns = meter.due_ns if until_ns is None else min(until_ns, meter.due_ns)
            left_ns = None if until_ns is None else until_ns - time.monotonic_ns()
            ready = dict(self._poller.poll(None if left_ns is None else max(0, -(-left_ns // MS))))
            if ready or until_ns == ends_ns:
                return ready

    def _warn(self) -> None:
        """Say now and then that nothing is encrypted."""
        now_ns = time.monotonic_ns()
        if self._warning and (not self._warned_ns or now_ns - self._warned_ns >= WARNING_S * 10**9):
            self._warned_ns = now_ns
            logger("transport").warning(
                "--insecure: %s can be reached from other machines, nothing is encrypted, and "
                "whoever connects can do anything; make keys with `treefold keys init DIR` and "
                "pass --keys DIR to every process",
                self._warning,
            )

    def _options(self, address: str, frame_bytes_max: int) -> dict[int, int]:
        """What a socket is set to.

        ZeroMQ looks a name up before each attempt to connect, in the thread that carries all
        messages. A name that nobody answers for any more, as of a container that died, would hold
        up everybody; so names have a thread of their own.
        """
        options = _options(frame_bytes_max) | {zmq.IPV6: int(is_ipv6(address))}
        if self._owns_context:
            options[zmq.AFFINITY] = NAMES_THREAD if is_named(address) else NUMBERS_THREAD
        return options

    def _receive(
        self, name: Hashable, sock: zmq.Socket[bytes], batch_max: int
    ) -> Iterator[Arrival]:
        is_listener, meter = name in self._listeners, self._meters.get(name)
        link, connection = self._links.get(name), None
        public, where = ("", "") if link is None else (link.public, link.address)
        is_guarded = is_listener and self.access is not None
        for _ in range(batch_max):
            if not int(sock.getsockopt(zmq.EVENTS)) & READABLE:  # cheaper than an exception
                return
            sender = sock.recv(DONTWAIT) if is_listener else name
            if meter is not None:
                connection = meter.senders.get(sender)
            if is_guarded or (meter is not None and connection is None):
                frame = sock.recv(DONTWAIT, copy=False)
                header = frame.bytes
                if is_guarded:
                    public, where = str(frame.get("User-Id")), str(frame.get("Peer-Address"))
                if meter is not None and connection is None:
                    connection = meter.meet(sender, frame)
            else:
                header = sock.recv(DONTWAIT)
            payloads, sizes = _rest(sock)
            self.traffic.of(name, sender).add(len(header), sum(sizes))
            if meter is not None and connection is not None:
                sizes.append(len(header))
                meter.take(connection, sizes)
            yield Arrival(name, sender, header, payloads, public, where)
            if self._sockets.get(name) is not sock:  # closed for what it brought
                return


def _options(frame_bytes_max: int) -> dict[int, int]:
    """What every socket is set to."""
    return {
        zmq.LINGER: 0,
        zmq.SNDHWM: 0,  # bounded by the protocol: one push per node and one reply per pull
        zmq.RCVHWM: QUEUE_MAX,
        zmq.MAXMSGSIZE: frame_bytes_max,
        zmq.HANDSHAKE_IVL: HANDSHAKE_MS,
        zmq.RECONNECT_IVL: RECONNECT_MS,
        zmq.RECONNECT_IVL_MAX: RECONNECT_MAX_MS,
        zmq.CONNECT_TIMEOUT: CONNECT_MS,
        zmq.TCP_MAXRT: UNACKNOWLEDGED_MAX_MS,
        zmq.TCP_KEEPALIVE: 1,
        zmq.TCP_KEEPALIVE_IDLE: KEEPALIVE_IDLE_S,
        zmq.TCP_KEEPALIVE_INTVL: KEEPALIVE_INTERVAL_S,
        zmq.TCP_KEEPALIVE_CNT: KEEPALIVE_COUNT,
    }


def _rest(sock: zmq.Socket[bytes]) -> tuple[list[memoryview], list[int]]:
    """The frames of a message after its first, and their sizes; of very many only some are kept."""
    kept: list[memoryview] = []
    sizes: list[int] = []
    while sock.getsockopt(zmq.RCVMORE):
        payload = memoryview(sock.recv(DONTWAIT, copy=False).buffer)
        sizes.append(payload.nbytes)
        if len(kept) < FRAMES_MAX:
            kept.append(payload)
    return kept, sizes


def _is_unreachable(error: zmq.ZMQError) -> bool:
    """False for a peer that cannot be reached, as senders return it; anything else is raised."""
    if error.errno in (errno.EHOSTUNREACH, zmq.EAGAIN):
        return False
    raise error
