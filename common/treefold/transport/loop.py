"""The turn of every shell: wait, decode, let the core decide, carry out what it says.

A shell owns a `Loop` and gives it three things: its core, how to carry out an effect, and whom an
arrival is from. A message that does not decode is counted, answered with a coded error and
otherwise ignored.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from treefold.common import failpoints
from treefold.common.errors import RemoteProtocolError
from treefold.common.log import logger
from treefold.transport.budgets import PATIENCE, Purse
from treefold.transport.gate import Gate
from treefold.transport.outbox import Outbox
from treefold.transport.points import NOWHERE, Points
from treefold.transport.request import check_allowed
from treefold.transport.sockets import Arrival, Hub
from treefold.transport.watch import Watch
from treefold.wire import codec
from treefold.wire.chain import UnitCopy
from treefold.wire.exchange import Peer, PeerLost, Received, Tick
from treefold.wire.messages import AnyMessage, Pulled, Push, Refused
from treefold.wire.probes import Probe, ProbeSeen
from treefold.wire.segments import SegmentAnswer, SegmentOffer
from treefold.wire.words import Code

BATCH_MAX = 64  # messages taken from one socket before the clock is looked at
REFUSAL_TEXT_MAX = 500
SAID_PER_S_MAX = 10  # lines about refused messages; a flood of them must not fill the log
TensorMessage = Push | Pulled | UnitCopy
TENSOR_MESSAGES = (Push, Pulled, UnitCopy, SegmentOffer, SegmentAnswer)
EventT = TypeVar("EventT")
EffectT = TypeVar("EffectT")
SeenT = TypeVar("SeenT", contravariant=True)
DoneT = TypeVar("DoneT", covariant=True)


class Core(Protocol[SeenT, DoneT]):
    """What every core offers."""

    def handle(self, now_ns: int, event: SeenT) -> Sequence[DoneT]:
        """Take in one event and say what is to be done."""

    def next_deadline_ns(self) -> int | None:
        """When a `Tick` is needed at the latest."""


class Tensors(Protocol):
    """Takes in the payloads of arrivals; see `treefold.transport.carrier.Carrier`."""

    def receive(self, arrival: Arrival, message: TensorMessage) -> tuple[int, ...] | None:
        """Hold the payloads of a message; None if it is to be ignored."""

    def on_segment(self, arrival: Arrival, message: SegmentOffer | SegmentAnswer) -> None:
        """Deal with an offer of shared memory, or with the answer to ours."""

    def forget(self, peer: Peer) -> None:
        """A peer cannot be reached any more."""

    def pump(self, now_ns: int) -> None:
        """Send what may leave by now."""

    def next_deadline_ns(self) -> int | None:
        """When `pump` has something to do."""


class Loop(Generic[EventT, EffectT]):
    """Turns arrivals and deadlines into events, and effects into deeds.

    Parameters
    ----------
    hub : Hub
        The sockets.
    outbox : Outbox
        Sends by them.
    core : Core
        Decides.
    perform : callable
        Carries out one effect; returns events that came of it.
    tensors : Tensors, optional
        Takes in payloads. A role without tensors refuses messages that have some.

    Attributes
    ----------
    refused, ignored : int
        Messages that were not taken, and those that were not even looked at: a peer that has sent
        too many of the former is not read for a while.
    gate : Gate
        Decides what is taken of whom.
    points : Points
        Where a test may let the process die.
    watch : Watch or None
        Looks on, if anybody wants to know.
    """

    def __init__(
        self,
        hub: Hub,
        outbox: Outbox,
        core: Core[EventT | Received | PeerLost | Tick, EffectT],
        perform: Callable[[EffectT], Iterable[EventT]],
        tensors: Tensors | None = None,
    ) -> None:
        self.hub = hub
        self._outbox = outbox
        self.core = core
        self.points: Points = NOWHERE
        self.watch: Watch | None = None
        self.gate = Gate(hub.access, hub.audit)
        self.refused = 0
        self.ignored = 0
        self._patience = Purse({Refused: PATIENCE})
        self._said = (0, 0)
        self._tensors = tensors
        self._perform = perform
        self._log = logger("transport")

    def turn(self) -> None:
        """Wait for the next arrival or deadline and deal with it."""
        self.flush()
        deadlines_ns = [self.core.next_deadline_ns()]
        if self._tensors is not None:
            deadlines_ns.append(self._tensors.next_deadline_ns())
        deadline_ns = min((one for one in deadlines_ns if one is not None), default=None)
        timeout_ns = None if deadline_ns is None else deadline_ns - time.monotonic_ns()
        arrivals = self.hub.wait(timeout_ns, BATCH_MAX)
        for arrival in arrivals if self.watch is None else self.watch.waiting(arrivals):
            for received in self._decode(arrival):
                self.feed(received)
        if self._tensors is not None:
            self._tensors.pump(time.monotonic_ns())
        deadline_ns = deadlines_ns[0]
        if deadline_ns is not None and time.monotonic_ns() >= deadline_ns:
            self.feed(Tick())
        if self.watch is not None:
            self.watch.turn()

    def feed(self, event: EventT | Received | PeerLost | Tick) -> None:
        """Give the core one event, and those that follow from it, and carry out what it says."""
        events = [event]
        for one in events:  # which grows meanwhile
            if failpoints.armed:
                events.extend(self._pass_points(one))
                continue
            if self.watch is not None:
                events.extend(self._watched(one, self.watch))
                continue
            for effect in self.core.handle(time.monotonic_ns(), one):
                events.extend(self._perform(effect))

    def _watched(self, event: EventT | Received | PeerLost | Tick, watch: Watch) -> list[EventT]:
        """Deal with one event as `feed` does, while somebody looks on."""
        began_ns = time.monotonic_ns()
        effects = self.core.handle(began_ns, event)
        found = [one for effect in effects for one in self._perform(effect)]
        watch.handled(event, effects, began_ns)
        return found

    def _pass_points(self, event: EventT | Received | PeerLost | Tick) -> list[EventT]:
        """Deal with one event as `feed` does, past the points at which a test may end that."""
        found: list[EventT] = []
        self.points.on_event(event)
        effects = self.core.handle(time.monotonic_ns(), event)
        for number, effect in enumerate(effects):
            self.points.on_effect(effect)
            found.extend(self._perform(effect))
            self.points.on_done(effects, number, self._let_out)
        return found

    def _let_out(self) -> None:
        """Let everything that was sent leave; nothing can be sent any more."""
        self._outbox.flush()
        self.hub.close()

    def flush(self) -> None:
        """Send what waits to be sent, and tell the core whom it could not reach."""
        self._outbox.flush()
        while self._outbox.lost:
            lost = self._outbox.lost.pop()
            if self._tensors is not None:
                self._tensors.forget(lost)
            self.feed(PeerLost(lost))

    def end_watch(self) -> None:
        """Nobody looks on any more."""
        if self.watch is not None:
            self.watch.close()

    def _decode(self, arrival: Arrival) -> Iterator[Received]:
        """The messages of an arrival, each decoded when those before it are dealt with."""
        sender = arrival.sender
        if isinstance(sender, bytes) and self._patience.is_empty(sender, Refused):
            self.ignored += 1  # too much of what it sent was refused
            return
        try:
            messages = codec.decode_all(arrival.header)
        except RemoteProtocolError as error:
            self._refuse(arrival, str(error))
            return
        sizes = [payload.nbytes for payload in arrival.payloads]
        for message in messages:
            denial = self.gate.denial(arrival, message)
            if denial:
                self._deny(arrival, message, denial)
                continue
            check_allowed(arrival.where, message)
            try:
                codec.check_payload(message, sizes)
                received = self._received(arrival, message)
            except RemoteProtocolError as error:
                self._refuse(arrival, str(error))
            else:
                if received is not None:
                    yield received

    def _received(self, arrival: Arrival, message: AnyMessage) -> Received | None:
        peer = arrival.sender
        if isinstance(message, Probe) and isinstance(peer, bytes):
            answer = ProbeSeen(message.call, bytes(message.answer_bytes))
            self._outbox.send(arrival.socket, peer, answer)
            return None  # which no core needs to hear of
        if not isinstance(message, TENSOR_MESSAGES):
            return Received(peer, message, (), arrival.public)
        if self._tensors is None:
            raise RemoteProtocolError(f"{type(message).__name__} to a member without tensors")
        if isinstance(message, SegmentOffer | SegmentAnswer):
            self._tensors.on_segment(arrival, message)
            return None
        payloads = self._tensors.receive(arrival, message)
        return None if payloads is None else Received(peer, message, payloads, arrival.public)

    def _deny(self, arrival: Arrival, message: AnyMessage, text: str) -> None:
        self._say_refused(text)
        if isinstance(arrival.sender, bytes):
            refusal = Refused(getattr(message, "call", 0), Code.NOT_ALLOWED, text)
            self._patience.allows(arrival.sender, refusal)
            self._outbox.send(arrival.socket, arrival.sender, refusal)

    def _refuse(self, arrival: Arrival, text: str) -> None:
        self._say_refused(text)
        if isinstance(arrival.sender, bytes):
            refusal = Refused(0, Code.BAD_MESSAGE, text[:REFUSAL_TEXT_MAX])
            self._patience.allows(arrival.sender, refusal)
            self._outbox.send(arrival.socket, arrival.sender, refusal)

    def _say_refused(self, text: str) -> None:
        self.refused += 1
        if self.watch is not None:
            self.watch.tally.malformed += 1
        second = time.monotonic_ns() // 1_000_000_000
        self._said = (second, self._said[1] + 1 if self._said[0] == second else 1)
        if self._said[1] > SAID_PER_S_MAX:
            return
        self._log.warning("message refused (%d so far): %s", self.refused, text[:REFUSAL_TEXT_MAX])
