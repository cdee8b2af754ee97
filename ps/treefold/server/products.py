"""How large the contributions of slots are, and what they make coordinate by coordinate.

All sums are made of pieces of `SUM_ELEMENTS` from the beginning of a block, so that they have the
same bits on every cut of a table.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from treefold.common import layout as layouts
from treefold.common.blocks import Row
from treefold.common.layout import Layout
from treefold.common.spec import BUFFER_GROUP
from treefold.server.unit import SUM_ELEMENTS

Range = tuple[int, int]


class Products:
    """Measures the parts of one table.

    Parameters
    ----------
    layout : Layout
        The table's flat space.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._pieces = cache(self._cut)

    def of(self, part: Range, values: Sequence[Tensor | None]) -> list[Row]:
        """Sums of products of contributions with themselves and with later ones, block by block.

        Parameters
        ----------
        part : (start, stop)
            Which elements of the flat space.
        values : sequence of Tensor, of the table's wire type [stop - start]
            What slots have sent of them, None for nothing.

        Returns
        -------
        list of list of float
            A row for each block: with one contribution its sum of squares alone. Only parameters
            count, but a sum is NaN if a buffer of the part is not finite.
        """
        if len(values) == 1:
            return [[value] for value in self._squares(part, values[0])]
        return self._pairs(part, values)

    def buffers(self, part: Range) -> list[Range]:
        """Where the buffers of a part are, as positions in it."""
        return self._pieces(part)[1]

    def is_all_parameters(self, part: Range) -> bool:
        """Whether there are neither buffers nor gaps in a part."""
        blocks, _ = self._pieces(part)
        return sum(high - low for block in blocks for low, high in block) == part[1] - part[0]

    def _squares(self, part: Range, tensor: Tensor | None) -> list[float]:
        blocks, buffers = self._pieces(part)
        if tensor is None:
            return [0.0] * len(blocks)
        norms = iter(_norms(tensor, [piece for block in blocks for piece in block]))
        found = []
        for block in blocks:
            total = 0.0
            for low, high in block:
                norm = next(norms)
                is_odd = not norm < math.inf  # float32 overflows before a gradient does
                total += _slowly(tensor[low:high]) if is_odd else norm * norm
            found.append(total)
        if not all(bool(tensor[low:high].isfinite().all()) for low, high in buffers):
            found[0] = math.nan
        return found

    def _pairs(self, part: Range, values: Sequence[Tensor | None]) -> list[Row]:
        blocks, _ = self._pieces(part)
        slots = len(values)
        squares = [self._squares(part, tensor) for tensor in values]
        upper = torch.triu_indices(slots, slots)
        rows = []
        for number, block in enumerate(blocks):
            total = torch.zeros(slots, slots, dtype=torch.float64)
            for low, high in block:
                wide = torch.zeros(slots, high - low, dtype=torch.float64)
                for own, tensor in zip(wide, values, strict=True):
                    if tensor is not None:
                        own.copy_(tensor[low:high])
                total += wide @ wide.T
            row = total[upper[0], upper[1]].tolist()
            for slot in range(slots):
                if math.isnan(squares[slot][number]):
                    row[slot * slots - slot * (slot - 1) // 2] = float("nan")
            rows.append(row)
        return rows

    def _cut(self, part: Range) -> tuple[list[list[Range]], list[Range]]:
        """Pieces of parameters by block, and buffers, as positions in the part."""
        start, stop = part
        step = layouts.BLOCK_ELEMENTS
        blocks: list[list[Range]] = [[] for _ in range(max(1, -(-(stop - start) // step)))]
        buffers: list[Range] = []
        for is_buffer, low, high in self._stretches(start, stop):
            if is_buffer:
                buffers.append((low, high))
                continue
            for block in range(low // step, -(-high // step)):
                begin = block * step
                for at in range(begin, begin + step, SUM_ELEMENTS):
                    piece = max(low, at), min(high, at + SUM_ELEMENTS, begin + step)
                    if piece[0] < piece[1]:
                        blocks[block].append(piece)
        return blocks, buffers

    def _stretches(self, start: int, stop: int) -> Iterator[tuple[bool, int, int]]:
        """Adjacent tensors that are all parameters, or all buffers, as positions in a part."""
        open_: tuple[bool, int, int] | None = None
        for piece in self._layout.pieces(start, stop):
            is_buffer = self._layout.spec.tensors[piece.tensor].group == BUFFER_GROUP
            low, high = piece.start - start, piece.stop - start
            if open_ is not None and open_[0] == is_buffer and open_[2] == low:
                open_ = is_buffer, open_[1], high
                continue
            if open_ is not None:
                yield open_
            open_ = is_buffer, low, high
        if open_ is not None:
            yield open_


def _norms(tensor: Tensor, pieces: Sequence[Range]) -> list[float]:
    """The norms of pieces of a tensor, in float32; adjacent whole ones at once.

    Source of what makes it fast: `torch.linalg.vector_norm` over the rows of a matrix is one pass
    of vector instructions, in the same order for every row.
    """
    found: list[float] = []
    at = 0
    while at < len(pieces):
        low, high = pieces[at]
        end = at + 1
        while end < len(pieces) and pieces[end] == (high, high + SUM_ELEMENTS):
            high, end = pieces[end][1], end + 1
        if (high - low) % SUM_ELEMENTS:  # the first one is short
            high, end = pieces[at][1], at + 1
        rows = tensor[low:high].view(end - at, -1)
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
        found += norms.tolist()
        at = end
    return found


def _slowly(tensor: Tensor) -> float:
    return tensor.double().square_().sum().item()


def trimmed_mean(rows: list[Tensor], trimmed: int) -> Tensor:
    """The mean of each column without its largest and its smallest values.

    Parameters
    ----------
    rows : list of Tensor, float32 [n]
        What is averaged. They are used up.
    trimmed : int
        How many values are left out at each end; with as many as possible it is the median.

    Returns
    -------
    Tensor, float32 [n]

    Notes
    -----
    Sources: Yin et al., Byzantine-robust distributed learning: towards optimal statistical rates,
    ICML 2018, definitions 1 and 2. Columns are sorted all at once by Batcher's odd-even merge sort
    (Sorting networks and their applications, AFIPS 1968), which compares whole rows.
    """
    spare = torch.empty_like(rows[0])
    for one, other in _network(len(rows)):
        torch.minimum(rows[one], rows[other], out=spare)
        torch.maximum(rows[one], rows[other], out=rows[other])
        rows[one], spare = spare, rows[one]
    kept = rows[trimmed : len(rows) - trimmed]
    total = kept[0]
    for row in kept[1:]:
        total.add_(row)
    return total.div_(len(kept))


@cache
def _network(count: int) -> list[tuple[int, int]]:
    """Which rows to compare, in this order."""
    found: list[tuple[int, int]] = []
    size = 1
    while size < count:
        step = size
        while step:
            for begin in range(step % size, count - step, 2 * step):
                found += [
                    (at, at + step)
                    for at in range(begin, min(begin + step, count - step))
                    if at // (2 * size) == (at + step) // (2 * size)
                ]
            step //= 2
        size *= 2
    return found
