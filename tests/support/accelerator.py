"""An accelerator in plain memory whose streams work when a test says so, or when somebody waits.

Work is done late and, between streams, in an order that a seed chooses; what nobody orders by an
event is done in the wrong order sooner or later. Pinned buffers are full of NaN whenever they are
taken, so that what is read before it was copied shows.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from treefold.torch import staging, streams
from treefold.torch.staging import Ring

POISON = 0xFF  # in every byte: NaN in every float type


class FakeEvent:
    """A point in a stream's work."""

    def __init__(self, device: "FakeDevice") -> None:
        self._device = device
        self.is_done = False

    def query(self) -> bool:
        """Whether it is done; the accelerator gets a little further while one asks."""
        self._device.work_on()
        return self.is_done

    def synchronize(self) -> None:
        """Let the accelerator work until it is done."""
        self._device.waits += not self.is_done
        while not self.is_done:
            assert self._device.work_on(), "waits for an event that nothing will ever finish"


class FakeStream:
    """Work in order."""

    def __init__(self, device: "FakeDevice") -> None:
        self._device = device
        self._queue: deque[Callable[[], None] | FakeEvent] = deque()
        self._until: list[FakeEvent] = []

    def do(self, work: Callable[[], None]) -> None:
        """Give it work."""
        self._queue.append(work)

    def wait(self, event: streams.Event) -> None:
        """Let what follows begin when the event is done."""
        assert isinstance(event, FakeEvent)
        self.do(lambda: self._until.append(event))

    def record_event(self) -> FakeEvent:
        """An event that is done when everything before it is; at once if there is nothing."""
        event = FakeEvent(self._device)
        self._queue.append(event)
        if len(self._queue) == 1 and not self.is_blocked:
            self.advance()
        return event

    @property
    def is_blocked(self) -> bool:
        """Whether it has to wait for another stream."""
        self._until = [event for event in self._until if not event.is_done]
        return bool(self._until)

    @property
    def is_ready(self) -> bool:
        """Whether there is something that it can do now."""
        return bool(self._queue) and not self.is_blocked

    def advance(self) -> None:
        """Do the next thing."""
        item = self._queue.popleft()
        if isinstance(item, FakeEvent):
            item.is_done = True
        else:
            with torch.no_grad():
                item()


class FakeDevice:
    """An accelerator, as `treefold.torch.streams.Port`.

    Parameters
    ----------
    seed : int
        Of the order in which streams get on.
    is_pinnable : bool
        Whether existing memory can be pinned.

    Attributes
    ----------
    computing : FakeStream
        The current stream. Tensors are plain ones: what a test or script computes with them without
        giving it to this stream is done at once.
    waits, made : int
        How often somebody had to wait for an event, and how many pinned buffers there are.
    """

    def __init__(self, seed: int = 0, *, is_pinnable: bool = False) -> None:
        self._random = random.Random(seed)
        self._is_pinnable = is_pinnable
        self.copying = FakeStream(self)
        self.computing = FakeStream(self)
        self._all = [self.copying, self.computing]
        self._current = self.computing
        self.waits = self.made = self.launched = 0

    def another(self) -> FakeStream:
        """One more stream that computes."""
        self._all.append(FakeStream(self))
        return self._all[-1]

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        """Make a stream the current one."""
        before, self._current = self._current, stream
        yield
        self._current = before

    def work_on(self) -> bool:
        """Do one thing on one stream that can get on; False if none can."""
        ready = [stream for stream in self._all if stream.is_ready]
        if ready:
            self._random.choice(ready).advance()
        return bool(ready)

    def finish(self) -> None:
        """Do everything."""
        while self.work_on():
            pass

    def current(self) -> FakeStream:
        """As `Port.current`."""
        return self._current

    def launch(self, work: Callable[[], None], after: Sequence[streams.Event]) -> FakeEvent:
        """As `Port.launch`."""
        self.launched += 1
        for event in after:
            self.copying.wait(event)
        self.copying.do(work)
        return self.copying.record_event()

    def wait(self, event: streams.Event) -> None:
        """As `Port.wait`."""
        self._current.wait(event)

    def buffer(self, elements: int, dtype: torch.dtype) -> Tensor:
        """As `Port.buffer`."""
        return torch.full((elements,), torch.nan, dtype=dtype)

    def pinned(self, nbytes: int) -> Tensor:
        """As `Port.pinned`."""
        self.made += 1
        return torch.full((nbytes,), POISON, dtype=torch.uint8)

    def pin(self, memory: Tensor, *, is_read_only: bool) -> bool:
        """As `Port.pin`."""
        del memory, is_read_only
        return self._is_pinnable


class ScriptDevice(FakeDevice):
    """An accelerator for whole scripts, whose computing is done as soon as it can be.

    What waits for an event has to be done at once too, since Python computes on the tensors.
    """

    def wait(self, event: streams.Event) -> None:
        """As `Port.wait`."""
        event.synchronize()


class PoisonedRing(Ring):
    """A ring whose buffers are full of NaN whenever they are taken."""

    def take(self) -> Tensor | None:
        """As `Ring.take`."""
        buffer = super().take()
        return None if buffer is None else buffer.fill_(POISON)


@contextmanager
def accelerated(device: FakeDevice, nbytes: int = 64) -> Iterator[None]:
    """Every model made in this context is on the accelerator, with a small poisoned ring."""

    def ring(port: streams.Port) -> Ring:
        return PoisonedRing(port, 3, nbytes)

    with (
        mock.patch.object(streams, "port_of", return_value=device),
        mock.patch.object(staging, "CHUNK_BYTES", nbytes),
        mock.patch.object(staging, "default_ring", ring),
    ):
        yield
