"""Parameters that are views of servers' memory while a loop body runs, which spares a copy of each.

The memory is read-only here, and a server writes to it again two versions later. It gets so far
only without this worker, whose loop body then counts for nothing; that is found out at its end
(`treefold.worker.client.Client.borrow`).
"""

import contextlib
import faulthandler
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from treefold.common.layout import Layout
from treefold.transport.segments import Segment
from treefold.worker.handed import Snapshot

LINE_BYTES = 64
"""How a parameter lies to multiples of this is the same wherever its memory is: kernels may add up
in another order where it is not."""
KEPT_MAX = 2  # versions are in two buffers in turn; memory of others is let go

Parts = list[tuple[int, int, Tensor]]


class InPlace:
    """The parameters of one table, on the CPU, float32 and laid out row by row.

    Parameters
    ----------
    parameters : sequence of Parameter
        The table's first tensors.
    layout : Layout
        Its flat space.

    Attributes
    ----------
    is_used : bool
        Whether parameters are views of servers' memory at this moment.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], layout: Layout) -> None:
        self._parameters = list(parameters)
        self._starts = layout.starts[: len(self._parameters)]
        self._own: dict[int, Tensor] = {}
        self._views: dict[tuple[int, ...], list[Tensor | None]] = {}
        self.is_used = False

    def load(self, snapshot: Snapshot) -> bool:
        """Make parameters views of a version; those that cannot be are copied.

        Returns
        -------
        bool
            False, and nothing is done, if none of them can be.
        """
        parts, segments = snapshot.parts, snapshot.segments
        if not segments:
            return False
        key = tuple(
            0 if _home(values, segments) is None else values.data_ptr() for *_, values in parts
        )
        if key not in self._views:
            while len(self._views) >= KEPT_MAX:
                del self._views[next(iter(self._views))]
            own = zip(self._parameters, self._starts, strict=True)
            self._views[key] = [_view(one, start, parts, segments) for one, start in own]
        views = self._views[key] = self._views.pop(
            key
        )  # used last; they keep the memory mapped, so that an address stays what it is
        if all(view is None for view in views):
            return False
        for number, (parameter, view) in enumerate(zip(self._parameters, views, strict=True)):
            parameter.data = self._copy(number, parts) if view is None else view
        self.is_used = True
        _say_where_it_dies()
        return True

    def leave(self) -> None:
        """Let go of servers' memory; the parameters have been given other memory."""
        self._views.clear()
        self._own.clear()
        self.is_used = False

    def _copy(self, number: int, parts: Parts) -> Tensor:
        """A parameter's values in memory of its own."""
        parameter, start = self._parameters[number], self._starts[number]
        own = self._own.get(number)
        if own is None:
            shift = start % (LINE_BYTES // 4)
            own = self._own[number] = torch.empty(shift + parameter.numel())[shift:]
        at = 0
        for piece in _within(parts, start, start + parameter.numel()):
            own[at : at + piece.numel()].copy_(piece)
            at += piece.numel()
        return own.view(parameter.shape)


def _say_where_it_dies() -> None:
    """Have Python print where a script writes to what it must not, if there is where to."""
    if not faulthandler.is_enabled():
        with contextlib.suppress(RuntimeError, ValueError, OSError):
            faulthandler.enable(sys.__stderr__ or sys.stderr)


def _home(values: Tensor, segments: Sequence[Segment]) -> Segment | None:
    """The segment that values lie in."""
    return next((one for one in segments if one.offset_of(values) is not None), None)


def _view(
    parameter: nn.Parameter, start: int, parts: Parts, segments: Sequence[Segment]
) -> Tensor | None:
    """A parameter where it lies in a segment; None if it does not, or not in one piece."""
    pieces = list(_within(parts, start, start + parameter.numel()))
    home = _home(pieces[0], segments) if pieces else None
    if home is None:
        return None
    first = at = pieces[0].data_ptr()
    for piece in pieces:
        if piece.dtype != torch.float32 or piece.data_ptr() != at:
            return None
        at += piece.nbytes
    if at > home.address + home.nbytes or (first - 4 * start) % LINE_BYTES:
        return None
    return home.window(first - home.address, parameter.numel()).view(parameter.shape)


def _within(parts: Parts, start: int, stop: int) -> Iterator[Tensor]:
    """What parts have of the elements ``[start, stop)``, in order."""
    for low, high, values in parts:
        if low < stop and start < high:
            yield values[max(start, low) - low : min(stop, high) - low]
