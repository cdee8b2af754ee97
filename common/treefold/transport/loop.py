"""The turn of every shell: wait, decode, let the core decide, carry out what it says.

A shell owns a `Loop` and gives it three things: its core, how to carry out an effect, and whom an
arrival is from. A message that does not decode is counted, answered with a coded error and
otherwise ignored.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

from treefold.common.errors import RemoteProtocolError
from treefold.common.log import logger
from treefold.transport.sockets import Arrival, Hub
from treefold.wire import codec
from treefold.wire.exchange import Peer, Received, Tick
from treefold.wire.messages import (
    AnyMessage,
    Code,
    Pulled,
    Push,
    Refused,
    SegmentAnswer,
    SegmentOffer,
)

BATCH_MAX = 64  # messages taken from one socket before the clock is looked at
REFUSAL_TEXT_MAX = 500
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

    def receive(self, arrival: Arrival, message: Push | Pulled) -> tuple[int, ...] | None:
        """Hold the payloads of a message; None if it is to be ignored."""

    def on_segment(self, arrival: Arrival, message: SegmentOffer | SegmentAnswer) -> None:
        """Deal with an offer of shared memory, or with the answer to ours."""


class Loop(Generic[EventT, EffectT]):
    """Turns arrivals and deadlines into events, and effects into deeds.

    Parameters
    ----------
    hub : Hub
        The sockets.
    core : Core
        Decides.
    perform : callable
        Carries out one effect; returns events that came of it.
    tensors : Tensors, optional
        Takes in payloads. A role without tensors refuses messages that have some.
    """

    def __init__(
        self,
        hub: Hub,
        core: Core[EventT | Received | Tick, EffectT],
        perform: Callable[[EffectT], Iterable[EventT]],
        tensors: Tensors | None = None,
    ) -> None:
        self.hub = hub
        self.core = core
        self.refused = 0
        self._tensors = tensors
        self._perform = perform
        self._log = logger("transport")

    def turn(self, peer_of: Callable[[Arrival], Peer]) -> None:
        """Wait for the next arrival or deadline and deal with it."""
        deadline_ns = self.core.next_deadline_ns()
        now_ns = time.monotonic_ns()
        timeout_ns = None if deadline_ns is None else deadline_ns - now_ns
        for arrival in self.hub.wait(timeout_ns, BATCH_MAX):
            received = self._decode(arrival, peer_of(arrival))
            if received is not None:
                self.feed(received)
        deadline_ns = self.core.next_deadline_ns()
        if deadline_ns is not None and time.monotonic_ns() >= deadline_ns:
            self.feed(Tick())

    def feed(self, event: EventT | Received | Tick) -> None:
        """Give the core one event, and those that follow from it, and carry out what it says."""
        events: deque[EventT | Received | Tick] = deque([event])
        while events:
            for effect in self.core.handle(time.monotonic_ns(), events.popleft()):
                events.extend(self._perform(effect))

    def _decode(self, arrival: Arrival, peer: Peer) -> Received | None:
        try:
            message = codec.decode(arrival.header)
            codec.check_payload(message, [payload.nbytes for payload in arrival.payloads])
            return self._received(arrival, peer, message)
        except RemoteProtocolError as error:
            self._refuse(arrival, str(error))
            return None

    def _received(self, arrival: Arrival, peer: Peer, message: AnyMessage) -> Received | None:
        if not isinstance(message, Push | Pulled | SegmentOffer | SegmentAnswer):
            return Received(peer, message)
        if self._tensors is None:
            raise RemoteProtocolError(f"{type(message).__name__} to a member without tensors")
        if isinstance(message, SegmentOffer | SegmentAnswer):
            self._tensors.on_segment(arrival, message)
            return None
        payloads = self._tensors.receive(arrival, message)
        return None if payloads is None else Received(peer, message, payloads)

    def _refuse(self, arrival: Arrival, text: str) -> None:
        self.refused += 1
        self._log.warning("message refused (%d so far): %s", self.refused, text[:REFUSAL_TEXT_MAX])
        if isinstance(arrival.sender, bytes):
            header = codec.encode(Refused(0, Code.BAD_MESSAGE, text[:REFUSAL_TEXT_MAX]))
            self.hub.send(arrival.socket, arrival.sender, header)
