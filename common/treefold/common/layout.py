"""Where each tensor of a table lies in its flat space, and how that space is cut.

Three cuts, none of which changes a bit of the result:

- a *block* is 65,536 consecutive elements and never split; norms are summed block by block;
- a *shard* is a run of blocks on one server;
- a *part* is at most `PART_BLOCKS_MAX` blocks of a shard, the unit of one message and of one fold.
"""

from bisect import bisect_right
from collections.abc import Collection
from typing import NamedTuple

import msgspec

from treefold.common.errors import DataError
from treefold.common.spec import BUFFER_GROUP, Dtype, Placement, Rule, TableSpec

BLOCK_ELEMENTS = 65_536
PART_BLOCKS_MAX = 4  # 1 MiB of float32: larger slices measured slower over ZeroMQ


class ShardSpan(msgspec.Struct, frozen=True, array_like=True):
    """The run of blocks ``[first_block, first_block + blocks)`` of a table."""

    first_block: int
    blocks: int


class Piece(NamedTuple):
    """The part of one tensor that lies in an interval of the flat space.

    ``start`` and ``stop`` are positions in the flat space, ``offset`` the first one's position in
    the tensor.
    """

    tensor: int
    start: int
    stop: int
    offset: int


class Layout:
    """The flat space of one table.

    Parameters
    ----------
    spec : TableSpec
        With tensorwise placement every tensor begins a new block, so that a shard can hold it
        whole. With a narrow wire the first buffer does, and a new part: buffers stay float32.

    Attributes
    ----------
    starts : list of int
        Position of each tensor's first element.
    elements : int
        Length of the flat space, gaps of tensorwise placement included.
    blocks : int
        Blocks of it, the last one possibly short; at least 1.
    """

    def __init__(self, spec: TableSpec) -> None:
        self.spec = spec
        self.starts: list[int] = []
        begins = _block_begins(spec)
        self.sizes = [tensor.elements for tensor in spec.tensors]
        end = 0
        for size in self.sizes:
            if len(self.starts) in begins:
                end = -(-end // BLOCK_ELEMENTS) * BLOCK_ELEMENTS
            self.starts.append(end)
            end += size
        self.elements = end
        groups = [tensor.group for tensor in spec.tensors]
        is_folded = spec.rule is Rule.OPTIMIZER and BUFFER_GROUP in groups
        is_mixed = is_folded and spec.wire is not Dtype.FLOAT32
        self._narrow_stop = self.starts[groups.index(BUFFER_GROUP)] if is_mixed else end
        self.blocks = max(1, -(-end // BLOCK_ELEMENTS))

    def shard_range(self, shard: ShardSpan) -> tuple[int, int]:
        """Elements ``[start, stop)`` of a shard."""
        start = shard.first_block * BLOCK_ELEMENTS
        return start, min(start + shard.blocks * BLOCK_ELEMENTS, self.elements)

    def parts(self, shard: ShardSpan) -> list[tuple[int, int]]:
        """Elements ``[start, stop)`` of each part of a shard, in order."""
        start, stop = self.shard_range(shard)
        step = PART_BLOCKS_MAX * BLOCK_ELEMENTS
        border = self._narrow_stop if start < self._narrow_stop < stop else stop
        found = [(at, min(at + step, border)) for at in range(start, max(border, start + 1), step)]
        return found + [(at, min(at + step, stop)) for at in range(border, stop, step)]

    def wire(self, part: tuple[int, int]) -> Dtype:
        """What a part ``[start, stop)`` travels as: the table's wire, float32 if it has buffers."""
        return self.spec.wire if part[1] <= self._narrow_stop else Dtype.FLOAT32

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """The pieces of tensors in ``[start, stop)``, in order; empty tensors have none."""
        found: list[Piece] = []
        tensor = max(0, bisect_right(self.starts, start) - 1)
        while tensor < len(self.starts) and self.starts[tensor] < stop:
            first, size = self.starts[tensor], self.sizes[tensor]
            low, high = max(start, first), min(stop, first + size)
            if low < high:
                found.append(Piece(tensor, low, high, low - first))
            tensor += 1
        return found

    def has_buffers(self, start: int, stop: int) -> bool:
        """Whether elements of a buffer are in ``[start, stop)``."""
        numbers = [piece.tensor for piece in self.pieces(start, stop)]
        return any(self.spec.tensors[number].group == BUFFER_GROUP for number in numbers)

    def cut(self, shards: int) -> list[ShardSpan]:
        """Cut the table into at most ``shards`` runs of blocks of nearly equal length.

        With tensorwise placement cuts lie between tensors, so that runs may differ more.
        """
        if self.spec.placement is Placement.TENSORWISE:
            borders = sorted({start // BLOCK_ELEMENTS for start in self.starts} | {0})
        else:
            borders = list(range(self.blocks))
        wanted = [self.blocks * number // shards for number in range(shards)]
        chosen = sorted({borders[bisect_right(borders, block) - 1] for block in wanted})
        ends = [*chosen[1:], self.blocks]
        return [ShardSpan(a, b - a) for a, b in zip(chosen, ends, strict=True)]


def _block_begins(spec: TableSpec) -> Collection[int]:
    """Numbers of the tensors that begin a new block."""
    if spec.placement is Placement.TENSORWISE:
        return range(len(spec.tensors))
    groups = [tensor.group for tensor in spec.tensors]
    is_mixed = spec.wire is not Dtype.FLOAT32 and BUFFER_GROUP in groups
    return [groups.index(BUFFER_GROUP)] if is_mixed else []


def split_run(count: int, elements: int) -> list[int]:
    """Elements of each of ``count`` adjacent parts of a shard that have ``elements`` together.

    All parts of a shard are of one size, but for its last one, which may be shorter.

    Raises
    ------
    DataError
        No run of so many parts has so many elements.
    """
    full = PART_BLOCKS_MAX * BLOCK_ELEMENTS
    rest = elements - (count - 1) * full
    if count < 1 or not 0 <= rest <= full or (rest == 0 and count > 1):
        text = f"{elements} elements in {count} parts, each of which has at most {full}"
        raise DataError(text)
    return [full] * (count - 1) + [rest]
