"""One connection to a listener, and what comes of its handshakes.

ZeroMQ tells a refused peer nothing through the socket itself; its monitor does. A listener's key is
one of those that the allow-list has for its role: they are tried in turn, so that a listener may
come back with another one while keys are changed.
"""

import itertools
import struct
import time
from enum import Enum, auto
from typing import TYPE_CHECKING

import zmq

from treefold.common.errors import ConfigError
from treefold.transport.access import Access
from treefold.wire.permissions import KeyRole

if TYPE_CHECKING:
    from treefold.transport.sockets import Context

WATCHED = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
EVENT = struct.Struct("=HI")  # of a monitor's message: what happened, and a number with it
NUMBERS = itertools.count()
MISMATCH = 0x11000002  # ZMQ_PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
FAILURES_PER_KEY = 2  # before the next one is tried
PROMPT_NS = 1_000_000_000  # who closes later than that was stopped or busy, and said nothing
GIVE_UP_NS = 1_000_000_000  # with handshakes that nobody says anything about
REOPEN_NS = 500_000_000  # a listener that was right before and is not now is tried again later


class Step(Enum):
    """What the owner of a link has to do."""

    NOTHING = auto()
    REOPEN = auto()
    REFUSED = auto()


class Link:
    """A DEALER socket and its monitor.

    Parameters
    ----------
    context : Context
        Where sockets live.
    address : str
        Of the listener.
    options : dict
        Of the socket.
    access : Access or None
        This process's keys.
    role : KeyRole
        What the listener has to be.

    Attributes
    ----------
    socket, monitor :
        To be polled; both are replaced by `reopen`. No monitor within a process.
    public : str
        The listener's key, once it is proven; empty without keys.
    refusal : str
        Why the listener, or this process, does not go on.

    Raises
    ------
    ConfigError
        The address is malformed, or the allow-list has no listener.
    """

    def __init__(
        self,
        context: "Context",
        address: str,
        options: dict[int, int],
        access: Access | None,
        role: KeyRole,
    ) -> None:
        self.address = address
        self.refusal = ""
        self._context = context
        self._options = options
        self._access = None if address.startswith("inproc:") else access
        self._role = role
        self._tried: list[str] = []
        self._failures = 0
        self._failing_ns: int | None = None
        self._connected_ns = 0
        self._is_proven = False
        self.due_ns: int | None = None
        self.public = ""
        self.monitor: zmq.Socket[bytes] | None = None
        self.socket = self._context.socket(zmq.DEALER)
        self._open(self.socket)

    def reopen(self) -> None:
        """Connect anew, with the next key that the listener may have."""
        self.close()
        self.socket = self._context.socket(zmq.DEALER)
        self._open(self.socket)

    def _open(self, new: "zmq.Socket[bytes]") -> None:
        """Connect a fresh socket."""
        self.due_ns = None
        self._failures = 0
        try:
            for option, value in self._options.items():
                new.setsockopt(option, value)
            self._secure(new)
            if not self.address.startswith("inproc:"):
                self.monitor = _watch(self._context, new)
            new.connect(self.address)
        except (zmq.ZMQError, ConfigError) as error:
            self.close()
            if isinstance(error, ConfigError):
                raise
            text = f"{self.address!r} is not an address that can be connected to: {error}"
            raise ConfigError(text) from error

    def close(self) -> None:
        """Close socket and monitor."""
        self._close_monitor()
        self.socket.close(0)

    def close_slowly(self, linger_ms: int) -> None:
        """Close, but give what was sent some time to leave."""
        self._close_monitor()
        self.socket.close(linger_ms)

    def look(self) -> Step:
        """Take in what the monitor has to say."""
        step = Step.NOTHING
        while step is Step.NOTHING and self.monitor is not None and self.monitor.poll(0):
            event, value = EVENT.unpack(self.monitor.recv_multipart(zmq.DONTWAIT)[0])
            step = self._on_event(event, value)
        return step

    def _on_event(self, event: int, value: int) -> Step:
        if event == zmq.EVENT_CONNECTED:
            self._connected_ns = time.monotonic_ns()
            return Step.NOTHING
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._is_proven = True
            self._failures, self._failing_ns, self._tried = 0, None, []
            if self._access is not None:
                self._access.prove(self._role, self.public)
            return Step.NOTHING
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and self._access is not None:
            key = self._access.key
            self.refusal = (
                f"the {self._role} at {self.address} refuses this process's key: {key.name} "
                f"({key.role}, {key.public}) is not on its allow-list; add it there with "
                f"`treefold keys add DIR {key.name} --role {key.role} --public '{key.public}'`"
            )
            return Step.REFUSED
        if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == MISMATCH:
            self.refusal = self._mismatch()
            return self._later(Step.REFUSED)
        if self._access is not None and event != zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            return self._fail()
        return Step.NOTHING

    def _mismatch(self) -> str:
        where = f"the {self._role} at {self.address}"
        if self._access is None:
            return f"{where} takes connections with keys only; pass --keys DIR (or TREEFOLD_KEYS)"
        return (
            f"{where} does not use keys and this process has some; start it with --keys, or this "
            "process without"
        )

    def _fail(self) -> Step:
        """A handshake came to nothing: most likely the listener has another key."""
        now_ns = time.monotonic_ns()
        if now_ns - self._connected_ns >= PROMPT_NS:
            return Step.NOTHING
        self._failing_ns = self._failing_ns or now_ns
        self._failures += 1
        if self._failures < FAILURES_PER_KEY or self._access is None:
            return Step.NOTHING
        self._access.refresh(is_urgent=True)
        keys = self._access.listeners(self._role)
        self._tried.append(self.public)
        if any(public not in self._tried for public in keys):
            return Step.REOPEN
        if now_ns - self._failing_ns < GIVE_UP_NS:
            self._tried = []
            return Step.REOPEN if len(keys) > 1 else Step.NOTHING
        self.refusal = (
            f"the {self._role} at {self.address} has no key that the "
            f"allow-list in {self._access.folder} has for the role {self._role}: it is another "
            "one, or its new key has to be added there"
        )
        return self._later(Step.REFUSED)

    def _later(self, step: Step) -> Step:
        """Somebody else may have the address of a listener that is gone: that is no refusal."""
        if not self._is_proven:
            return step
        self._tried = []
        self.due_ns = time.monotonic_ns() + REOPEN_NS
        return Step.NOTHING

    def _secure(self, new: "zmq.Socket[bytes]") -> None:
        if self._access is None:
            return
        keys = self._access.listeners(self._role)
        if not keys:
            text = f"the allow-list in {self._access.folder} has no key with the role {self._role}"
            raise ConfigError(f"{text}; add that of the one at {self.address}")
        left = [public for public in keys if public not in self._tried]
        self.public = (left or keys)[0]
        own = self._access.key
        new.setsockopt(zmq.CURVE_PUBLICKEY, own.public.encode())
        new.setsockopt(zmq.CURVE_SECRETKEY, own.secret.encode())
        new.setsockopt(zmq.CURVE_SERVERKEY, self.public.encode())

    def _close_monitor(self) -> None:
        if self.monitor is not None:
            self.socket.monitor(None, 0)
            self.monitor.close(0)
            self.monitor = None


def _watch(context: "Context", watched: "zmq.Socket[bytes]") -> "zmq.Socket[bytes]":
    """A socket that brings what happens to another one's handshakes."""
    place = f"inproc://treefold-monitor-{next(NUMBERS)}"
    watched.monitor(place, WATCHED)
    monitor = context.socket(zmq.PAIR)
    monitor.setsockopt(zmq.LINGER, 0)
    monitor.connect(place)
    return monitor
