"""Parts of a table as a worker fills them: which slices of which gradients, scaled how.

Pure tensor work: no client, no rounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from treefold.common.layout import Layout, Piece
from treefold.torch.gradients import ABSENT, Gradient


@dataclass(slots=True)
class Run:
    """Adjacent elements of a part that are adjacent in a flat gradient buffer too."""

    source: Tensor
    start: int
    stop: int


@dataclass(slots=True)
class Part:
    """One part of a table.

    Attributes
    ----------
    number, start, stop : int
        Which part, and its elements in the flat space.
    pieces : list of Piece
        The tensors in it, in the order of the absent marks.
    gradients : list of int
        Which parameters have elements in it.
    buffers : list of (int, Piece)
        Which float buffers have, by their number among the buffers, each with its piece.
    has_gaps : bool
        Whether some elements are no gradient's.
    missing : int
        Gradients that this slot's backward has not finished yet.
    is_sent : bool
        Whether this slot's contribution is with the client already.
    """

    number: int
    start: int
    stop: int
    pieces: list[Piece]
    gradients: list[int] = field(default_factory=list)
    buffers: list[tuple[int, Piece]] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    has_gaps: bool = False
    missing: int = 0
    is_sent: bool = False

    @property
    def elements(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    @property
    def all_absent(self) -> int:
        """The marks of a part in which no tensor has a gradient."""
        return (1 << len(self.pieces)) - 1

    def marks(self, absent: int) -> bytes:
        """Absent marks as they travel: bit ``i`` is byte ``i // 8``, value ``1 << i % 8``."""
        return absent.to_bytes(-(-len(self.pieces) // 8), "little")

    def absent_gradients(self, gradients: Sequence[Gradient]) -> int:
        """Marks of the parameters without a gradient; buffers count as absent."""
        absent = 0
        for position, piece in enumerate(self.pieces):
            tensor = piece.tensor
            if tensor >= len(gradients) or not gradients[tensor].is_present:
                absent |= 1 << position
        return absent

    def write_gradients(self, scale: float, flat: Tensor | None, out: Tensor) -> None:
        """Write the slot's gradients times ``scale``, rounded once, in float32.

        Parameters
        ----------
        scale : float
            The slot's share of the round's samples; 1.0 leaves the bits as they are.
        flat : Tensor, float32 [elements of the table], or None
            All gradients as `Gradients.flat` has them.
        out : Tensor, float32 [elements]
            On the CPU. Gaps and buffers are filled with -0.0.
        """
        if flat is not None:
            torch.mul(flat[self.start : self.stop], scale, out=out)
            return
        if self.has_gaps:
            out.fill_(ABSENT)
        for run in self.runs:
            target = out[run.start : run.stop]
            if scale != 1.0 and run.source.dtype == torch.float32 and run.source.is_cpu:
                torch.mul(run.source, scale, out=target)
            else:
                target.copy_(run.source)
                if scale != 1.0:
                    target.mul_(scale)

    def restore_touched(self, out: Tensor) -> None:
        """Make a touched element of a sparse gradient +0.0 if scaling made it -0.0."""
        for run in self.runs:
            target = out[run.start : run.stop]
            source = run.source.to("cpu", torch.float32)
            untouched = (source == 0) & torch.signbit(source)
            target.add_(0.0)
            target[untouched] = ABSENT


def cut_parts(
    layout: Layout, ranges: Sequence[tuple[int, int]], gradients: Sequence[Gradient]
) -> list[Part]:
    """Work out what goes into each part.

    Parameters
    ----------
    layout : Layout
        Of the table; its first tensors are the parameters, the others float buffers.
    ranges : sequence of (start, stop)
        Elements of each part.
    gradients : sequence of Gradient
        In the table's order.

    Returns
    -------
    list of Part
        In the order of ``ranges``.
    """
    found: list[Part] = []
    for number, (start, stop) in enumerate(ranges):
        part = Part(number, start, stop, layout.pieces(start, stop))
        for piece in part.pieces:
            if piece.tensor < len(gradients):
                part.gradients.append(piece.tensor)
                _add_run(part.runs, _run_of(part, piece, gradients[piece.tensor]))
            else:
                part.buffers.append((piece.tensor - len(gradients), piece))
        part.has_gaps = sum(run.stop - run.start for run in part.runs) < part.elements
        found.append(part)
    return found


def joint_runs(parts: Sequence[Part]) -> list[Run]:
    """The runs of adjacent parts, as if they were one part that begins with the first of them."""
    found: list[Run] = []
    for part in parts:
        shift = part.start - parts[0].start
        for run in part.runs:
            _add_run(found, Run(run.source, run.start + shift, run.stop + shift))
    return found


def _run_of(part: Part, piece: Piece, gradient: Gradient) -> Run:
    source = gradient.flat[piece.offset : piece.offset + piece.stop - piece.start]
    return Run(source, piece.start - part.start, piece.stop - part.start)


def _add_run(runs: list[Run], run: Run) -> None:
    last = runs[-1] if runs else None
    if last is not None and last.stop == run.start and _is_next(last.source, run.source):
        length = last.source.numel() + run.source.numel()
        runs[-1] = Run(last.source.as_strided((length,), (1,)), last.start, run.stop)
    else:
        runs.append(run)


def _is_next(left: Tensor, right: Tensor) -> bool:
    """Whether ``right`` begins where ``left`` ends, in the same flat buffer."""
    same = left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
    return same and left.storage_offset() + left.numel() == right.storage_offset()
