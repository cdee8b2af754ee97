"""Parameters from the host to an accelerator, between what it computes before and after.

A copy stream does the copying: from the servers' memory where it lies, if that can be pinned, or
through a ring of a few pinned buffers.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from treefold.torch import staging
from treefold.torch.staging import Converter
from treefold.torch.streams import Event, Port
from treefold.transport.segments import Segment

Parts = Sequence[tuple[int, int, Tensor]]


@dataclass(slots=True)
class _Run:
    """Adjacent parts that are copied together.

    ``segment`` is where they lie one after the other, if copies can be made from there.
    """

    start: int
    stop: int
    values: list[Tensor]
    segment: Segment | None

    @property
    def source(self) -> Tensor:
        """The values where they lie, if it is in a segment."""
        assert self.segment is not None
        first = self.values[0]
        offset = self.segment.offset_of(first)
        assert offset is not None
        size = (self.stop - self.start) * first.itemsize
        return self.segment.body[offset : offset + size].view(first.dtype)


@dataclass(slots=True)
class _Arrival:
    """One call of `Inward.load`: what it waits for, and what waits for it."""

    after: list[Event]
    last: Event | None = None
    last_in_place: Event | None = None


class Inward:
    """Parameters on their way to the accelerator.

    Parameters
    ----------
    port : Port
        The accelerator.
    """

    def __init__(self, port: Port) -> None:
        self._port = port
        self._ring = staging.default_ring(port)
        self._converter = Converter(port)
        self._flights: deque[tuple[Event, Tensor]] = deque()

    def load(self, flat: Tensor, parts: Parts, segments: Sequence[Segment]) -> None:
        """Copy parts of a version into a flat tensor.

        When it returns all of ``parts`` has been read. The accelerator may be copying still: what
        the current stream is given from now on begins when it is done.

        Parameters
        ----------
        flat : Tensor [elements]
            On the accelerator.
        parts : sequence of (start, stop, Tensor [stop - start])
            On the host; what lies beyond the end of ``flat`` is left out.
        segments : sequence of Segment
            Servers' memory in which some of the values may lie.
        """
        arrival = _Arrival([self._port.current().record_event()])
        for run in self._runs(_within(parts, flat.numel()), segments):
            target = flat[run.start : run.stop]
            if run.segment is not None:
                self._launch(arrival, run.source, target)
                arrival.last_in_place = arrival.last
            else:
                self._load_staged(arrival, run, target)
        if arrival.last is not None:
            self._port.wait(arrival.last)
        if arrival.last_in_place is not None:
            arrival.last_in_place.synchronize()

    def _launch(self, arrival: _Arrival, source: Tensor, target: Tensor) -> None:
        work = partial(self._converter.into, source, target)
        arrival.last = self._port.launch(work, arrival.after)
        arrival.after = []  # the copy stream keeps the order from here on

    def _load_staged(self, arrival: _Arrival, run: _Run, target: Tensor) -> None:
        buffer = self._take()
        first = run.values[0].dtype
        dtype = first if first.itemsize <= target.itemsize else target.dtype
        source = buffer[: target.numel() * dtype.itemsize].view(dtype)
        at = 0
        for values in run.values:
            source[at : at + values.numel()].copy_(values)
            at += values.numel()
        self._launch(arrival, source, target)
        assert arrival.last is not None
        self._flights.append((arrival.last, buffer))

    def _take(self) -> Tensor:
        """A buffer of the ring; waits for the oldest copy if all are in use."""
        while self._flights and self._flights[0][0].query():
            self._ring.give(self._flights.popleft()[1])
        buffer = self._ring.take()
        while buffer is None:
            done, used = self._flights.popleft()
            done.synchronize()
            self._ring.give(used)
            buffer = self._ring.take()
        return buffer

    def _runs(self, parts: Iterable[tuple[int, Tensor]], segments: Sequence[Segment]) -> list[_Run]:
        pinned = [one for one in segments if self._port.pin(one.body, is_read_only=True)]
        step = self._ring.nbytes // torch.float32.itemsize
        runs: list[_Run] = []
        for begin, values in parts:
            start = begin
            home = next((one for one in pinned if one.offset_of(values) is not None), None)
            for piece in torch.split(values, step):
                last = runs[-1] if runs else None
                if (
                    last is not None
                    and last.segment is home
                    and self._continues(last, start, piece)
                ):
                    last.values.append(piece)
                    last.stop += piece.numel()
                else:
                    runs.append(_Run(start, start + piece.numel(), [piece], home))
                start += piece.numel()
        return runs

    def _continues(self, run: _Run, start: int, piece: Tensor) -> bool:
        before = run.values[-1]
        if run.stop != start or before.dtype != piece.dtype:
            return False
        if run.segment is not None:
            return before.data_ptr() + before.nbytes == piece.data_ptr()
        return (run.stop - run.start + piece.numel()) * torch.float32.itemsize <= self._ring.nbytes


def _within(parts: Parts, end: int) -> Iterator[tuple[int, Tensor]]:
    """Start and values of the parts, up to ``end``."""
    for start, stop, values in parts:
        if start < end:
            yield start, values[: min(stop, end) - start]
