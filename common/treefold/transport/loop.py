"""The turn of every shell: wait, decode, let the core decide, carry out what it says.

A shell owns a `Loop` and gives it three things: its core, how to carry out an effect, and whom an
arrival is from. A message that does not decode is counted, answered with a coded error and
otherwise ignored.
"""

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

import torch

from treefold.common.errors import RemoteProtocolError
from treefold.common.fold import view_frame
from treefold.common.log import logger
from treefold.transport.sockets import Arrival, Hub
from treefold.wire import codec
from treefold.wire.exchange import Peer, Received, Tick
from treefold.wire.messages import Code, Refused

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


class Payloads:
    """Tensors by the numbers that cores know them by."""

    def __init__(self) -> None:
        self._tensors: dict[int, torch.Tensor] = {}
        self._next = 1

    def __len__(self) -> int:
        """How many are held."""
        return len(self._tensors)

    def add(self, tensor: torch.Tensor) -> int:
        """Hold a tensor; returns its number."""
        number = self._next
        self._next += 1
        self._tensors[number] = tensor
        return number

    def get(self, number: int) -> torch.Tensor:
        """The tensor of a number."""
        return self._tensors[number]

    def put(self, number: int, tensor: torch.Tensor) -> None:
        """Hold another tensor under a number."""
        self._tensors[number] = tensor

    def pop(self, number: int) -> torch.Tensor:
        """The tensor of a number, held no longer."""
        return self._tensors.pop(number)


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
    """

    def __init__(
        self,
        hub: Hub,
        core: Core[EventT | Received | Tick, EffectT],
        perform: Callable[[EffectT], Iterable[EventT]],
    ) -> None:
        self.hub = hub
        self.core = core
        self.payloads = Payloads()
        self.refused = 0
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
        except RemoteProtocolError as error:
            self._refuse(arrival.sender, str(error))
            return None
        if not arrival.payloads:
            return Received(peer, message)
        return Received(peer, message, self.payloads.add(view_frame(arrival.payloads[0])))

    def _refuse(self, sender: Hashable, text: str) -> None:
        self.refused += 1
        self._log.warning("message refused (%d so far): %s", self.refused, text[:REFUSAL_TEXT_MAX])
        if isinstance(sender, bytes):
            header = codec.encode(Refused(0, Code.BAD_MESSAGE, text[:REFUSAL_TEXT_MAX]))
            self.hub.send("listener", sender, header)
