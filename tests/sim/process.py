"""A simulated process around a core, with its timer, its payloads and its connections.

Subclasses carry out the effects of one role and check what they see.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from tests.sim.memory import NOTHING, Cargo, Origin, Payloads
from tests.sim.network import Connection, End, Network
from tests.sim.world import Violation, World
from treefold.common.errors import InvariantError, RemoteProtocolError
from treefold.wire import codec
from treefold.wire.exchange import Halt, Note, Received, Tick
from treefold.wire.messages import AnyMessage, Heartbeat, HeartbeatSeen, Pulled, Push

STUCK_TICKS_MAX = 3  # ticks at one time after which a core that still asks for one is in a loop


class Core(Protocol):
    """What the simulator uses of a core."""

    def handle(self, now_ns: int, event: Any, /) -> Iterable[object]:  # each its own events
        """Take in one event and say what is to be done."""

    def next_deadline_ns(self) -> int | None:
        """When a `Tick` is needed at the latest."""

    def check_invariants(self) -> None:
        """Raise `InvariantError` if the state contradicts itself."""


class Process:
    """One process of the simulated cluster.

    Parameters
    ----------
    name : str
        Its host, which stays the same over restarts.
    core : Core
        Decides.
    network : Network
        Carries its messages.

    Attributes
    ----------
    is_alive : bool
        Whether it runs; a dead one never runs again.
    halt : Halt or None
        How it ended, if it ended itself.
    """

    def __init__(self, name: str, core: Core, network: Network) -> None:
        self.name = name
        self.core = core
        self.network = network
        self.world: World = network.world
        self.payloads = Payloads()
        self.is_alive = True
        self.halt: Halt | None = None
        self.frozen_until_ns = 0
        self.acts: dict[type, Callable[..., Iterable[object] | None]] = {
            Note: self._note,
            Halt: self._halt,
        }
        self._armed_ns: int | None = None
        self._ticks = (0, 0)
        self._checked = (-1, -1)

    def start(self) -> None:
        """Let the core begin."""
        self.feed(Tick(), b"start")

    def die(self) -> None:
        """Stop at once, without a word."""
        self.is_alive = False

    # ---- what comes in ---------------------------------------------------------------------------

    def receive(self, peer: object, header: bytes, cargo: Cargo) -> None:
        """A message arrives from the network."""
        if not self.is_alive:
            return
        if self.world.now_ns < self.frozen_until_ns:
            self.world.at(self.frozen_until_ns, self._receive_later, (peer, header, cargo))
            return
        message = codec.decode(header)
        check_cargo(message, cargo)
        handles = tuple(self.payloads.add(part, Origin.FOREIGN) for part in cargo.parts)
        self.feed(Received(peer, message, handles), header)

    def _receive_later(self, argument: object) -> None:
        assert isinstance(argument, tuple)
        self.receive(*argument)

    def feed(self, event: object, mark: bytes) -> None:
        """Give the core an event, carry out what it says, and check that all is well."""
        self.world.see(self.name, mark)
        if not is_dull(event):
            self.world.note(self.name, event)
        events: deque[object] = deque([event])
        try:
            while events and self.is_alive:
                for effect in self.core.handle(self.world.now_ns, events.popleft()):
                    events.extend(self.acts[type(effect)](effect) or ())
            self.core.check_invariants()
        except (InvariantError, LookupError) as error:
            raise Violation(f"{self.name} fails: {error!r}") from error
        if self.is_alive:
            self._check_payloads()
            self.check()
            self._arm()

    def later(self, delay_ns: int, act: Callable[[object], None], argument: object = None) -> None:
        """Let this process do something later: not if it is dead by then, and not while frozen."""

        def run(_: object) -> None:
            if not self.is_alive:
                return
            if self.world.now_ns < self.frozen_until_ns:
                self.world.at(self.frozen_until_ns, run)
                return
            act(argument)

        self.world.at(self.world.now_ns + delay_ns, run)

    # ---- what goes out ---------------------------------------------------------------------------

    def send(
        self, connection: Connection, end: End, message: AnyMessage, cargo: Cargo = NOTHING
    ) -> None:
        """Send a message to one end of a connection."""
        check_cargo(message, cargo)
        self.network.count(type(message).__name__)
        if len(cargo.parts) > 1:
            self.network.count("run")
        if cargo.is_shared:
            self.network.count("shared")
        self.network.send(connection, end, codec.encode(message), cargo)

    def _note(self, effect: Note) -> None:
        self.world.note(self.name, effect)

    def _halt(self, effect: Halt) -> None:
        self.halt = effect
        self.world.note(self.name, effect)
        self.is_alive = False

    # ---- checks ----------------------------------------------------------------------------------

    def check(self) -> None:
        """Check what a role promises after every event."""

    def handles(self) -> int:
        """How many payloads the core says that it holds."""
        return 0

    def _check_payloads(self) -> None:
        state = (self.payloads.added, len(self.payloads.held))
        if state == self._checked:
            return
        self._checked = state
        if self.handles() != len(self.payloads.held):
            raise Violation(
                f"{len(self.payloads.held)} payloads are held, {self.handles()} are known"
            )

    def _arm(self) -> None:
        """See to it that the core gets its `Tick` in time."""
        deadline_ns = self.core.next_deadline_ns()
        if deadline_ns is None:
            return
        now_ns = self.world.now_ns
        if deadline_ns <= now_ns:
            last_ns, count = self._ticks
            self._ticks = (now_ns, count + 1 if last_ns == now_ns else 1)
            if self._ticks[1] > STUCK_TICKS_MAX:
                raise Violation(
                    f"{self.name} asks for a deadline {now_ns - deadline_ns} ns ago, again"
                )
        if self._armed_ns is None or deadline_ns < self._armed_ns:
            self._armed_ns = max(deadline_ns, now_ns)
            self.world.at(self._armed_ns, self._on_timer, self._armed_ns)

    def _on_timer(self, armed_ns: object) -> None:
        if not self.is_alive or armed_ns != self._armed_ns:
            return
        if self.world.now_ns < self.frozen_until_ns:
            self.world.at(self.frozen_until_ns + 1, self._on_timer, armed_ns)  # messages come first
            return
        self._armed_ns = None
        deadline_ns = self.core.next_deadline_ns()
        if deadline_ns is not None and deadline_ns <= self.world.now_ns:
            self.feed(Tick(), b"tick")
        else:
            self._arm()


def check_cargo(message: AnyMessage, cargo: Cargo) -> None:
    """Compare payloads with what their header announces."""
    sizes = [part.elements for part in cargo.parts]
    frame = message.frame if isinstance(message, Push | Pulled) else None
    try:
        codec.check_payload(message, [] if cargo.is_shared else [4 * size for size in sizes])
    except RemoteProtocolError as error:
        raise Violation(f"{message}: {error}") from error
    if cargo.is_shared and (frame is None or not frame.segment or sum(sizes) != frame.elements):
        raise Violation(f"{message} with parts of {sizes} elements in shared memory")


def is_dull(event: object) -> bool:
    """Whether an event happens all the time and tells a reader of a story nothing."""
    if isinstance(event, Received):
        return isinstance(event.message, Heartbeat | HeartbeatSeen)
    return isinstance(event, Tick)
