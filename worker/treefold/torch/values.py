"""A table's parameters in the model: how a version gets into them.

Parameters that are alike (one dtype, one device, laid out row by row) are moved into one flat
tensor in which they lie as in the table's flat space, so that a version is loaded by a copy per
part, however many tensors there are. Others are copied piece by piece.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from treefold.common.layout import Layout, Piece
from treefold.torch import streams
from treefold.torch.in_place import InPlace
from treefold.torch.inward import Inward
from treefold.worker.handed import Snapshot

Pieces = Callable[[int, int], list[Piece]]


class ModelValues:
    """The parameters of one table.

    Parameters
    ----------
    parameters : sequence of Parameter
        The table's first tensors.
    layout : Layout
        Its flat space.
    pieces : callable
        ``Layout.pieces``, possibly remembered.
    is_in_place : bool
        Whether `lend` may make them views of servers' memory.

    Attributes
    ----------
    flat : Tensor [elements of the parameters], or None
        What they are views of, if they are alike and not lent.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        layout: Layout,
        pieces: Pieces,
        *,
        is_in_place: bool = False,
    ) -> None:
        self._parameters = list(parameters)
        self._layout = layout
        self._pieces = pieces
        self.flat: Tensor | None = None
        if self._parameters and _are_alike(self._parameters):
            self.flat = self._gather()
        port = None if self.flat is None else streams.port_of([self.flat])
        self._inward = None if port is None else Inward(port)
        can_be = self.flat is not None and self.flat.is_cpu and self.flat.dtype == torch.float32
        self._in_place = InPlace(self._parameters, layout) if is_in_place and can_be else None

    def lend(self, snapshot: Snapshot) -> bool:
        """Make the parameters views of where a version lies, for a loop body.

        Returns
        -------
        bool
            False, and nothing is done, if that was not asked for or cannot be.
        """
        if self._in_place is None or not self._in_place.load(snapshot):
            return False
        self.flat = None
        torch.autograd.graph.increment_version(self._parameters)
        return True

    @property
    def is_lent(self) -> bool:
        """Whether the parameters are views of where a version lies."""
        return self._in_place is not None and self._in_place.is_used

    def take_back(self) -> None:
        """Give the parameters memory of their own again, with the values that they have."""
        if self._in_place is not None and self._in_place.is_used:
            self.flat = self._gather()
            self._in_place.leave()

    def load(self, snapshot: Snapshot) -> None:
        """Write a version into the parameters, through autograd's sight but not into its graph."""
        self.take_back()
        if self.flat is None:
            copy_parameters(snapshot, self._pieces, self._parameters)
            return
        with torch.no_grad():
            if self._inward is not None:
                self._inward.load(self.flat, snapshot.parts, snapshot.segments)
            else:
                self._load(self.flat, snapshot)
        torch.autograd.graph.increment_version(self._parameters)

    def _load(self, flat: Tensor, snapshot: Snapshot) -> None:
        end = flat.numel()
        for start, stop, values in snapshot.parts:
            if start < end:
                flat[start : min(stop, end)].copy_(values[: end - start])

    def _gather(self) -> Tensor:
        """Make the parameters views of one new flat tensor, with the values that they have."""
        first, starts = self._parameters[0], self._layout.starts
        last = len(self._parameters) - 1
        end = starts[last] + self._layout.sizes[last]
        flat = torch.zeros(end, dtype=first.dtype, device=first.device)
        for parameter, start in zip(self._parameters, starts, strict=False):
            own = flat[start : start + parameter.numel()].view(parameter.shape)
            own.copy_(parameter.detach())
            parameter.data = own
        return flat


def _are_alike(parameters: Sequence[nn.Parameter]) -> bool:
    first = parameters[0]
    return all(
        one.dtype == first.dtype and one.device == first.device and one.is_contiguous()
        for one in parameters
    )


def copy_parameters(snapshot: Snapshot, pieces: Pieces, parameters: Sequence[nn.Parameter]) -> None:
    """Write a version into parameters, through autograd's sight but not into its graph.

    Parameters
    ----------
    snapshot : Snapshot
        Any version.
    pieces : callable
        ``Layout.pieces`` of its table.
    parameters : sequence of Parameter
        The table's first tensors.
    """
    targets = [_row_major(parameter) for parameter in parameters]
    with torch.no_grad():
        for start, stop, values in snapshot.parts:
            moved: dict[torch.device, Tensor] = {}
            for piece in pieces(start, stop):
                if piece.tensor >= len(targets):
                    continue
                target = targets[piece.tensor]
                if target.device not in moved:
                    moved[target.device] = values.to(target.device)
                source = moved[target.device][piece.start - start : piece.stop - start]
                target[piece.offset : piece.offset + source.numel()].copy_(source)
        for parameter, target in zip(parameters, targets, strict=True):
            if not parameter.is_contiguous():
                parameter.copy_(target.view(parameter.shape))


def _row_major(parameter: nn.Parameter) -> Tensor:
    """The elements in row-major order: the parameter's own memory if it is laid out so."""
    flat = parameter.detach()
    return flat.view(-1) if flat.is_contiguous() else flat.reshape(-1)
