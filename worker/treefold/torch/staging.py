"""Gradients from an accelerator to the host, while it goes on computing.

A copy stream does the copying, to pinned memory. Where the memory of the exchange can be pinned
itself, copies go there at once; otherwise through a ring of a few pinned buffers. Nothing here
knows parts, rounds or clients.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from treefold.torch.streams import Event, Port, Stream

CHUNK_BYTES = 4 << 20
"""Of one buffer of a ring, and what is worth a copy of its own."""
RING_BUFFERS = 4


class Ring:
    """A few pinned buffers of one size, made when they are first wanted.

    Parameters
    ----------
    port : Port
        Makes them.
    buffers : int
        How many at most.
    nbytes : int
        Of each.
    """

    def __init__(self, port: Port, buffers: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self._port = port
        self._unmade = buffers
        self._free: list[Tensor] = []

    def take(self) -> Tensor | None:
        """A buffer that nobody uses, uint8 [nbytes]; None if there is none."""
        if self._free:
            return self._free.pop()
        if not self._unmade:
            return None
        self._unmade -= 1
        return self._port.pinned(self.nbytes)

    def give(self, buffer: Tensor) -> None:
        """Take a buffer back; every copy from and to it is done."""
        self._free.append(buffer)


def default_ring(port: Port) -> Ring:
    """What is needed to keep a copy stream busy while a core copies on from it, or to it."""
    return Ring(port, RING_BUFFERS, CHUNK_BYTES)


class Converter:
    """Copies that also scale and round, within the work of a copy stream.

    Parameters
    ----------
    port : Port
        Makes the memory for what is in between.
    """

    def __init__(self, port: Port) -> None:
        self._port = port
        self._buffers: dict[torch.dtype, Tensor] = {}

    def out(self, source: Tensor, target: Tensor, scale: float) -> None:
        """Copy to the host: ``source`` times ``scale``, rounded to float32 and then to the type.

        Parameters
        ----------
        source : Tensor, float32, bfloat16 or float16 [n]
            On the accelerator.
        target : Tensor, float32, bfloat16 or float16 [n]
            Pinned.
        scale : float
            1.0 leaves the bits as they are.
        """
        if scale == 1.0 and source.dtype == target.dtype:
            target.copy_(source, non_blocking=True)
            return
        for piece, goal in _in_pieces(source, target):
            wide = self._buffer(piece.numel(), torch.float32)
            if piece.dtype == torch.float32:
                torch.mul(piece, scale, out=wide)
            else:
                wide.copy_(piece)
                wide.mul_(scale)
            done = wide
            if goal.dtype != torch.float32:
                done = self._buffer(piece.numel(), goal.dtype)
                done.copy_(wide)
            goal.copy_(done, non_blocking=True)

    def into(self, source: Tensor, target: Tensor) -> None:
        """Copy to the accelerator, rounding there if the types differ.

        Parameters
        ----------
        source : Tensor, float32, bfloat16 or float16 [n]
            Pinned.
        target : Tensor, float32, bfloat16 or float16 [n]
            On the accelerator.
        """
        if source.dtype == target.dtype:
            target.copy_(source, non_blocking=True)
            return
        for piece, goal in _in_pieces(source, target):
            here = self._buffer(piece.numel(), piece.dtype)
            here.copy_(piece, non_blocking=True)
            goal.copy_(here)

    def _buffer(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Used by one copy after the other, which the stream keeps in order."""
        if dtype not in self._buffers:
            self._buffers[dtype] = self._port.buffer(CHUNK_BYTES // dtype.itemsize, dtype)
        return self._buffers[dtype][:elements]


def _in_pieces(source: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both, cut into pieces that fit the buffers in between, whatever their type."""
    step = CHUNK_BYTES // torch.float32.itemsize
    return zip(torch.split(source, step), torch.split(target, step), strict=True)


@dataclass(frozen=True, slots=True)
class Copy:
    """What is to be copied: ``target``, in the memory of the exchange, is ``source * scale``."""

    source: Tensor
    target: Tensor
    scale: float


@dataclass(slots=True)
class _Job:
    """Copies that are launched together.

    ``hand`` is called when they are done, and all before them. Those through the ring are one copy
    each, no larger than a buffer.
    """

    copies: Sequence[Copy]
    after: Sequence[Event]
    is_direct: bool
    hand: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class _Flight:
    """A job that was launched."""

    job: _Job
    done: Event
    buffer: Tensor | None


class Outward:
    """Gradients on their way to the host.

    What is sent is handed over when its copy is done, in the order of sending, by whoever calls
    `poll` or `drain` then. Sources must not change until `drain` has returned.

    Parameters
    ----------
    port : Port
        The accelerator.
    """

    def __init__(self, port: Port) -> None:
        self._port = port
        self._ring = default_ring(port)
        self._converter = Converter(port)
        self._streams: dict[Stream, None] = {}
        self._queue: deque[_Job] = deque()
        self._flights: deque[_Flight] = deque()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way."""
        return not self._flights and not self._queue

    def pin(self, memory: Tensor) -> bool:
        """Whether memory of the exchange can be copied to without the ring."""
        return self._port.pin(memory, is_read_only=False)

    def begin(self) -> None:
        """Begin a slot; what an earlier one has left, since it failed, goes nowhere."""
        self._queue.clear()
        while self._flights:
            flight = self._flights.popleft()
            flight.done.synchronize()
            self._give_back(flight)
        self._streams.clear()

    def note(self) -> None:
        """Gradients are being computed on the stream that is current in this thread."""
        self._streams[self._port.current()] = None

    def send(self, copies: Sequence[Copy], *, is_pinned: bool, hand: Callable[[], None]) -> None:
        """Copy gradients that the streams noted so far have been given the work for; do not wait.

        Parameters
        ----------
        copies : sequence of Copy
            Targets must stay untouched until ``hand`` is called.
        is_pinned : bool
            What `pin` said of the targets' memory.
        hand : callable
            Called when all of them are done.
        """
        self.note()
        after = [stream.record_event() for stream in self._streams]
        if is_pinned:
            self._queue.append(_Job(copies, after, is_direct=True, hand=hand))
        else:
            for copy in _cut(copies, self._ring.nbytes):
                self._queue.append(_Job([copy], after, is_direct=False))
            self._queue[-1].hand = hand
        self.poll()

    def poll(self) -> None:
        """Hand over what is there by now, and launch what waited for a buffer."""
        while self._flights and self._flights[0].done.query():
            self._land(self._flights.popleft())
        self._launch()

    def drain(self) -> None:
        """Wait until everything is there, and hand it over."""
        self._launch()
        while self._flights:
            flight = self._flights.popleft()
            flight.done.synchronize()
            self._land(flight)
            self._launch()

    def _launch(self) -> None:
        while self._queue:
            job = self._queue[0]
            buffer = None if job.is_direct else self._ring.take()
            if buffer is None and not job.is_direct:
                return
            self._queue.popleft()
            done = self._port.launch(partial(self._copy, job, buffer), job.after)
            self._flights.append(_Flight(job, done, buffer))

    def _copy(self, job: _Job, buffer: Tensor | None) -> None:
        for copy in job.copies:
            target = copy.target if buffer is None else _like(copy.target, buffer)
            self._converter.out(copy.source, target, copy.scale)

    def _land(self, flight: _Flight) -> None:
        if flight.buffer is not None:
            (copy,) = flight.job.copies
            copy.target.copy_(_like(copy.target, flight.buffer))
        self._give_back(flight)
        if flight.job.hand is not None:
            flight.job.hand()

    def _give_back(self, flight: _Flight) -> None:
        if flight.buffer is not None:
            self._ring.give(flight.buffer)


def _like(target: Tensor, buffer: Tensor) -> Tensor:
    """The beginning of a buffer, as a tensor like ``target``."""
    return buffer[: target.nbytes].view(target.dtype)


def _cut(copies: Iterable[Copy], nbytes: int) -> Iterator[Copy]:
    """The same copies in pieces whose targets have at most so many bytes."""
    for copy in copies:
        step = nbytes // copy.target.itemsize
        sources, targets = torch.split(copy.source, step), torch.split(copy.target, step)
        for source, target in zip(sources, targets, strict=True):
            yield Copy(source, target, copy.scale)
