"""A simulated process around a core, with its timer, its payloads and its connections.

Subclasses carry out the effects of one role and check what they see.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from tests.sim.clock import Clock
from tests.sim.memory import NOTHING, Cargo, Origin, Payloads
from tests.sim.network import Connection, End, Network
from tests.sim.world import Violation, World
from treefold.common.errors import InvariantError, RemoteProtocolError
from treefold.wire import codec
from treefold.wire.chain import UnitCopy
from treefold.wire.exchange import Halt, Note, Received, Tick
from treefold.wire.messages import AnyMessage, Pulled, Push

CHECKED_EVERY = 4  # changes of what is held
STUCK_TICKS_MAX = 3  # ticks at one time after which a core that still asks for one is in a loop


TENSOR_MESSAGES = (Push, Pulled, UnitCopy)


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
    clock : Clock
        What its core takes for the time.
    is_replaced : bool
        Whether what comes after a crash of this process was seen to.
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
        self.clock = Clock()
        self.acts: dict[type, Callable[..., Iterable[object] | None]] = {
            Note: self._note,
            Halt: self._halt,
        }
        self.fuse: int | None = None
        self.is_replaced = False
        self._armed_ns: int | None = None
        self._asked_ns: int | None = None
        self._ticks = (0, 0)
        self._state = (-1, -1)
        self._changes = 0

    def start(self) -> None:
        """Let the core begin."""
        self.feed(Tick(), b"start")

    def die(self) -> None:
        """Stop at once, without a word."""
        self.is_alive = False

    def freeze(self, until_ns: int, *, is_clock_stopped: bool) -> None:
        """Do nothing until then; a machine that is suspended does not count the time either."""
        since_ns = max(self.frozen_until_ns, self.world.now_ns)
        if until_ns <= since_ns:
            return
        self.frozen_until_ns = until_ns
        if is_clock_stopped:
            self.clock.stop(until_ns - since_ns)

    # ---- what comes in ---------------------------------------------------------------------------

    def receive(self, peer: object, header: bytes, cargo: Cargo) -> None:
        """A message arrives from the network."""
        if not self.is_alive:
            return
        if self.world.now_ns < self.frozen_until_ns:
            self.world.at(self.frozen_until_ns, self._receive_later, (peer, header, cargo))
            return
        message = self.network.words.decode(header)
        handles: tuple[int, ...] = ()
        if cargo.parts:
            handles = tuple([self.payloads.add(part, Origin.FOREIGN) for part in cargo.parts])
        self.feed(Received(peer, message, handles), header)

    def _receive_later(self, argument: object) -> None:
        assert isinstance(argument, tuple)
        self.receive(*argument)

    def feed(self, event: object, mark: bytes) -> None:
        """Give the core an event, carry out what it says, and check that all is well."""
        world, handle, acts = self.world, self.core.handle, self.acts
        if world.is_traced:
            world.see(self.name, mark)
        world.recent.append((world.now_ns, self.name, event))
        now_ns = self.clock.shows(world.now_ns)
        events = [event]
        is_busy = False
        try:
            for one in events:  # which grows meanwhile
                for effect in handle(now_ns, one):
                    is_busy = True
                    if self.fuse is not None and self._is_burnt():
                        return
                    follows = acts[type(effect)](effect)
                    if follows:
                        events.extend(follows)
                if not self.is_alive:
                    break
            state = (self.payloads.added, len(self.payloads.held))
            if self.is_to_be_checked(is_busy, state != self._state):
                self.core.check_invariants()
        except (InvariantError, LookupError) as error:
            raise Violation(f"{self.name} fails: {error!r}") from error
        if not self.is_alive:
            return
        if state != self._state:
            self._state = state
            self._check_payloads()
        if is_busy:
            self.check()
        self._arm()

    def _is_burnt(self) -> bool:
        """Whether the process dies now, in the midst of what its core has decided."""
        if self.fuse is None:
            return False
        self.fuse -= 1
        if self.fuse < 0:
            self.network.count("died at work")
            self.die()
        return not self.is_alive

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
        kinds, kind = self.network.kinds, type(message).__name__
        kinds[kind] = kinds.get(kind, 0) + 1
        if isinstance(message, TENSOR_MESSAGES):
            check_cargo(message, cargo)
            if len(cargo.parts) > 1:
                self.network.count("run")
            if cargo.is_shared:
                self.network.count("shared")
        elif cargo.parts:
            raise Violation(f"{message} with payloads")
        self.network.send(connection, end, self.network.words.encode(message), cargo)

    def _note(self, effect: Note) -> None:
        self.world.note(self.name, effect)

    def _halt(self, effect: Halt) -> None:
        self.halt = effect
        self.world.note(self.name, effect)
        self.is_alive = False

    # ---- checks ----------------------------------------------------------------------------------

    def check(self) -> None:
        """Check what a role promises after every event."""

    def is_to_be_checked(self, is_busy: bool, is_holding: bool) -> bool:
        """Whether the core's invariants may be broken by an event, which had effects or none.

        ``is_holding`` says whether it holds other payloads than before.
        """
        return is_busy or is_holding

    def handles(self) -> int:
        """How many payloads the core says that it holds."""
        return 0

    @property
    def is_due(self) -> bool:
        """Whether everything that is held is looked through, which takes a while."""
        return self._changes % CHECKED_EVERY == 0

    def _check_payloads(self) -> None:
        """Compare what is held with what the core knows of, now and then: what leaks stays."""
        is_due = self.is_due
        self._changes += 1
        if is_due and self.handles() != len(self.payloads.held):
            raise Violation(
                f"{len(self.payloads.held)} payloads are held, {self.handles()} are known"
            )

    def _arm(self) -> None:
        """See to it that the core gets its `Tick` in time."""
        deadline_ns = self.core.next_deadline_ns()
        if deadline_ns is None or deadline_ns == self._asked_ns:
            return
        now_ns = self.world.now_ns
        due_ns = self.clock.true_ns(deadline_ns)
        if due_ns <= now_ns:
            last_ns, count = self._ticks
            self._ticks = (now_ns, count + 1 if last_ns == now_ns else 1)
            if self._ticks[1] > STUCK_TICKS_MAX:
                raise Violation(f"{self.name} asks for a deadline {now_ns - due_ns} ns ago, again")
        if self._armed_ns is None or due_ns < self._armed_ns:
            self._armed_ns, self._asked_ns = max(due_ns, now_ns), deadline_ns
            self.world.at(self._armed_ns, self._on_timer, self._armed_ns)

    def _on_timer(self, armed_ns: object) -> None:
        if not self.is_alive or armed_ns != self._armed_ns:
            return
        if self.world.now_ns < self.frozen_until_ns:
            self.world.at(self.frozen_until_ns + 1, self._on_timer, armed_ns)  # messages come first
            return
        self._armed_ns = self._asked_ns = None
        deadline_ns = self.core.next_deadline_ns()
        if deadline_ns is not None and deadline_ns <= self.clock.shows(self.world.now_ns):
            self.feed(Tick(), b"tick")
        else:
            self._arm()


def check_cargo(message: Push | Pulled | UnitCopy, cargo: Cargo) -> None:
    """Compare payloads with what their header announces."""
    sizes = [part.elements for part in cargo.parts]
    frame = message.frame
    try:
        codec.check_payload(message, [4 * sum(sizes)] if sizes and not cargo.is_shared else [])
    except RemoteProtocolError as error:
        raise Violation(f"{message}: {error}") from error
    if cargo.is_shared and (frame is None or not frame.segment or sum(sizes) != frame.elements):
        raise Violation(f"{message} with parts of {sizes} elements in shared memory")
