"""Sockets of one process: a listener, links to others, and a bell that other threads may ring.

One thread owns a `Hub` and everything in it. Only `Bell.ring` may be called from elsewhere. Nothing
here understands messages: what goes in and out is an address, a header and payload frames.
"""

import errno
import os
import socket
from collections.abc import Hashable, Iterator, Sequence
from urllib.parse import urlsplit

import msgspec
import zmq

from treefold.common.address import is_ipv6, is_named
from treefold.common.errors import ConfigError, LocalProtocolError
from treefold.transport.traffic import Traffic

CONTROL_FRAME_BYTES_MAX = 64 << 20  # specs and views of very large jobs
DATA_FRAME_BYTES_MAX = (4 << 20) + (64 << 10)  # the largest payload frame, or a header
IN_FLIGHT_MAX = 1_024  # messages remembered before those that have left are forgotten
RECEIVE_QUEUE_MAX = 256  # messages per peer that ZeroMQ takes from the kernel ahead of us
FLUSH_MS = 2_000  # how long a closing process waits for its last messages to leave
HANDSHAKE_MS = 3_000
RECONNECT_MS = 50
RECONNECT_MAX_MS = 500
CONNECT_MS = 1_000  # an attempt that is not answered by then is made again, not waited for
UNACKNOWLEDGED_MAX_MS = 3_000  # what the kernel could not deliver for so long: connect anew
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT = 30, 10, 3
Context = zmq.Context[zmq.Socket[bytes]]
"""What sockets live in; roles in one process share one to reach each other over `inproc://`."""
NUMBERS_THREAD, NAMES_THREAD = 1, 2  # bits: ZeroMQ's first and second thread
LOOPBACK_HOSTS = ("localhost", "[::1]", "::1")


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """One message as it came.

    ``socket`` is the name of the socket that it came by, ``sender`` the routing identity (listener)
    or that name again (link).
    """

    socket: Hashable
    sender: Hashable
    header: bytes
    payloads: list[memoryview]


class Hub:
    """All sockets of one thread, and the wait for them.

    Parameters
    ----------
    context : Context, optional
        Shared by processes-in-one (`inproc://`); by default the hub's own.

    Attributes
    ----------
    traffic : Traffic
        What went by these sockets.
    """

    def __init__(self, context: Context | None = None) -> None:
        self._context = Context(io_threads=2) if context is None else context
        self._owns_context = context is None
        self._poller = zmq.Poller()
        self._sockets: dict[Hashable, zmq.Socket[bytes]] = {}
        self._listeners: dict[Hashable, None] = {}
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
        check_reach(address, insecure=insecure)
        new = self._open(zmq.ROUTER, frame_bytes_max)
        self._suit(new, address)
        new.setsockopt(zmq.ROUTER_MANDATORY, 1)
        wanted = (
            address[:-2] + ":*"
            if address.startswith("tcp://") and address.endswith(":0")
            else address
        )
        try:
            new.bind(wanted)
        except zmq.ZMQError as error:
            new.close(0)
            raise ConfigError(_bind_text(address, error)) from error
        self._sockets[name] = new
        self._listeners[name] = None
        return new.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def connect(self, name: Hashable, address: str, frame_bytes_max: int) -> None:
        """Open a DEALER socket to a listener; replaces a link of the same name.

        Raises
        ------
        ConfigError
            The address is malformed.
        """
        self.disconnect(name)
        new = self._open(zmq.DEALER, frame_bytes_max)
        self._suit(new, address)
        try:
            new.connect(address)
        except zmq.ZMQError as error:
            new.close(0)
            msg = f"{address!r} is not an address that can be connected to: {error}"
            raise ConfigError(msg) from error
        self._sockets[name] = new

    def disconnect(self, name: Hashable) -> None:
        """Close a link or listener, if it exists."""
        old = self._sockets.pop(name, None)
        self._listeners.pop(name, None)
        if old is not None:
            self._poller.unregister(old)
            old.close(0)

    def wait(self, timeout_ns: int | None, batch_max: int) -> Iterator[Arrival]:
        """Wait until something arrives, the bell rings or the time is over; yield what arrived.

        Parameters
        ----------
        timeout_ns : int or None
            Longest wait; None waits for ever.
        batch_max : int
            Messages taken per socket before the caller gets a turn to look at its clock.
        """
        timeout_ms = None if timeout_ns is None else max(0, -(-timeout_ns // 1_000_000))
        ready = dict(self._poller.poll(timeout_ms))
        if self.bell.fileno() in ready:
            self.bell.silence()
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
            sock.send_multipart([header] if identity is None else [identity, header], zmq.DONTWAIT)
        except zmq.ZMQError as error:
            return _is_unreachable(error)
        self.traffic.to(name, name if identity is None else identity).add(len(header), 0)
        return True

    def send_frames(
        self, name: Hashable, identity: bytes | None, header: bytes, frames: Sequence[memoryview]
    ) -> list[zmq.MessageTracker] | None:
        """Send a message with payload frames, without copying them; never blocks.

        Parameters
        ----------
        name, identity, header :
            As for `send`. While an equal message is still on its way, this one is skipped.
        frames : sequence of memoryview
            Must not be written to until their trackers are done.

        Returns
        -------
        list of zmq.MessageTracker, or None
            Of the last frame that is not copied, if there is one, and none if the message was
            skipped; None if the peer cannot be reached.
        """
        sock = self._socket(name)
        if sock is None:
            return None
        key = (name, identity, header)
        if key in self._in_flight and not self._in_flight[key].done:
            return []
        # Frames leave in order, so that one tracker speaks for all; small ones are copied at once.
        large = [n for n, frame in enumerate(frames) if frame.nbytes >= sock.copy_threshold]
        tracked = large[-1] if large else None
        trackers: list[zmq.MessageTracker] = []
        try:
            sock.send_multipart(
                [header] if identity is None else [identity, header], zmq.DONTWAIT | zmq.SNDMORE
            )
            for number, frame in enumerate(frames):
                flags = zmq.DONTWAIT | (zmq.SNDMORE if number < len(frames) - 1 else 0)
                tracker = sock.send(frame, flags, copy=False, track=number == tracked)
                if number == tracked:
                    trackers.append(tracker)
        except zmq.ZMQError as error:
            _is_unreachable(error)
            return None
        if trackers and not trackers[-1].done:
            self._remember(key, trackers[-1])
        way = self.traffic.to(name, name if identity is None else identity)
        way.add(len(header), sum(frame.nbytes for frame in frames))
        return trackers

    def close(self) -> None:
        """Close every socket, waiting a bounded time for what was sent to leave."""
        self._poller.unregister(self.bell.fileno())
        for sock in self._sockets.values():
            sock.close(FLUSH_MS)
        self._sockets.clear()
        self.bell.close()
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

    def _open(self, kind: int, frame_bytes_max: int) -> zmq.Socket[bytes]:
        new = self._context.socket(kind)
        options = {
            zmq.LINGER: 0,
            zmq.SNDHWM: 0,  # bounded by the protocol: one push per node and one reply per pull
            zmq.RCVHWM: RECEIVE_QUEUE_MAX,
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
        for option, value in options.items():
            new.setsockopt(option, value)
        self._poller.register(new, zmq.POLLIN)
        return new

    def _suit(self, sock: zmq.Socket[bytes], address: str) -> None:
        """Set what depends on the address.

        ZeroMQ looks a name up before each attempt to connect, in the thread that carries all
        messages. A name that nobody answers for any more, as of a container that died, would hold
        up everybody; so names have a thread of their own.
        """
        sock.setsockopt(zmq.IPV6, int(is_ipv6(address)))
        if self._owns_context:
            sock.setsockopt(zmq.AFFINITY, NAMES_THREAD if is_named(address) else NUMBERS_THREAD)

    def _receive(
        self, name: Hashable, sock: zmq.Socket[bytes], batch_max: int
    ) -> Iterator[Arrival]:
        is_listener = name in self._listeners
        for _ in range(batch_max):
            if not int(sock.getsockopt(zmq.EVENTS)) & zmq.POLLIN:  # cheaper than an exception
                return
            sender = sock.recv(zmq.DONTWAIT) if is_listener else name
            header = sock.recv(zmq.DONTWAIT)
            payloads = []
            while sock.getsockopt(zmq.RCVMORE):
                payloads.append(memoryview(sock.recv(zmq.DONTWAIT, copy=False).buffer))
            nbytes = sum(payload.nbytes for payload in payloads)
            self.traffic.of(name, sender).add(len(header), nbytes)
            yield Arrival(name, sender, header, payloads)
            if self._sockets.get(name) is not sock:  # closed for what it brought
                return


class Bell:
    """Wakes the thread that waits in `Hub.wait`. `ring` may be called from any thread."""

    def __init__(self) -> None:
        self._far, self._near = socket.socketpair()
        self._far.setblocking(False)
        self._near.setblocking(False)

    def fileno(self) -> int:
        """Descriptor that becomes readable when the bell rings."""
        return self._near.fileno()

    def ring(self) -> None:
        """Wake the waiting thread; a full pipe means that it is awake anyway."""
        try:
            self._far.send(b"\0")
        except (BlockingIOError, OSError):
            return

    def silence(self) -> None:
        """Forget all rings so far."""
        try:
            while self._near.recv(4096):
                pass
        except BlockingIOError:
            return

    def close(self) -> None:
        """Free the descriptors."""
        self._far.close()
        self._near.close()


def check_reach(address: str, *, insecure: bool) -> None:
    """Refuse to listen beyond this machine without encryption, unless told in so many words.

    Raises
    ------
    ConfigError
        The address is not a loopback one and ``insecure`` is false.
    """
    if insecure or not address.startswith("tcp://"):
        return
    host = urlsplit(address).hostname or ""
    if host.startswith("127.") or host in LOOPBACK_HOSTS:
        return
    msg = (
        f"{address} can be reached from other machines and nothing is encrypted; bind to "
        "127.0.0.1, or set insecure if the network is yours alone"
    )
    raise ConfigError(msg)


def _bind_text(address: str, error: zmq.ZMQError) -> str:
    if error.errno == zmq.EADDRINUSE:
        return f"{address} is in use by another process; choose another port, or 0 for a free one"
    if error.errno == zmq.EADDRNOTAVAIL or error.errno == errno.ENODEV:
        return f"{address} is not an address of this machine"
    return f"cannot listen on {address}: {error}"


def _is_unreachable(error: zmq.ZMQError) -> bool:
    """False for a peer that cannot be reached, as senders return it; anything else is raised."""
    if error.errno in (errno.EHOSTUNREACH, zmq.EAGAIN):
        return False
    raise error
