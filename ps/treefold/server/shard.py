"""The tensors of one shard: its float32 master copy, the folded gradient, the optimizer's state.

Adjacent tensors of one param group are stepped as one flat parameter, a *run*, so that a step costs
the same however small the tensors are. A round in which only some of a run's tensors have a
gradient cuts it, for good: `torch.optim` leaves a parameter without gradient alone, counters
included. None of these cuts changes a bit.

No I/O here, and no knowledge of rounds, nodes or members.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, SparseAdam

from treefold.common import layout as layouts
from treefold.common.errors import DataError
from treefold.common.layout import Layout, Piece, ShardSpan
from treefold.common.optim import placement_of
from treefold.common.spec import BUFFER_GROUP, Hyper, Placement, Rule, TableSpec
from treefold.server.optimizers import (
    apply_hyper,
    build,
    rebased_view,
    slice_state,
    split_parameter,
    step,
)

SUM_ELEMENTS = 16_384
"""Elements summed at once for a norm. Torch does not share sums of less than 32,768 elements
(`at::internal::GRAIN_SIZE`) among threads, which would make the bits depend on their number."""

_NEGATIVE_ZERO_BITS = torch.iinfo(torch.int32).min
_CLIP_EPS = 1e-6  # torch.nn.utils.clip_grads_with_norm_


class StatePiece(NamedTuple):
    """Optimizer state of the part of one tensor that lies in a shard.

    ``offset`` is the position of its first element in the tensor, ``elements`` their number.
    ``state`` has views of the state tensors, and numbers where torch keeps one per parameter.
    """

    tensor: int
    offset: int
    elements: int
    state: dict[str, object]


@dataclass(slots=True)
class _Run:
    """Elements ``[start, stop)`` of the flat space that step alike; a buffer has no parameter."""

    group: int
    start: int
    stop: int
    values: Tensor
    gradient: Tensor
    parameter: nn.Parameter | None = None
    is_absent: bool = False


def clip_coefficient(norm_max: float, norm: float) -> float:
    """What gradients are multiplied with so that their global norm is at most ``norm_max``.

    Parameters
    ----------
    norm_max : float
        The limit, above 0.
    norm : float
        The global L2 norm of the round's gradient.

    Returns
    -------
    float
        A float32 value, 1 at most; NaN for a NaN norm. Source: the same float32 operations as in
        ``torch.nn.utils.clip_grads_with_norm_``.
    """
    coefficient = norm_max / (torch.tensor(norm, dtype=torch.float32) + _CLIP_EPS)
    return coefficient.clamp(max=1.0).item()


class ShardState:
    """One shard of a table.

    Parameters
    ----------
    spec : TableSpec
        The table.
    span : ShardSpan
        Which blocks of it.

    Attributes
    ----------
    parts : list of (start, stop)
        Elements of each part in the table's flat space.

    Raises
    ------
    DataError
        If the shard cuts a tensor that must stay whole, or tensors and optimizer do not fit.
    UnsupportedError
        If servers do not run the optimizer's class.
    """

    def __init__(self, spec: TableSpec, span: ShardSpan) -> None:
        self.spec = spec
        self.layout = Layout(spec)
        self.parts = self.layout.parts(span)
        self._start, self._stop = self.layout.shard_range(span)
        elements = max(0, self._stop - self._start)
        self._master = torch.zeros(elements)
        self._gradient = torch.zeros(0 if spec.rule is Rule.CONSTANT else elements)
        self._runs: list[_Run] = []
        self._norm_ranges: list[list[tuple[int, int]]] = []
        self._optimizer: Optimizer | None = None
        self._absent = [bytes(-(-len(self.layout.pieces(*part)) // 8)) for part in self.parts]
        if spec.rule is not Rule.CONSTANT:
            self._runs = self._initial_runs()
            self._norm_ranges = self._ranges_by_block(span)
            self._optimizer = self._build_optimizer()

    # ---- round by round -----------------------------------------------------------------------

    def initialize(self, parts: Sequence[Tensor]) -> None:
        """Set the values of version 0.

        Parameters
        ----------
        parts : sequence of Tensor, float32 [part]
            One per part, in order.

        Raises
        ------
        DataError
            If their number or a shape is wrong; nothing is changed then.
        """
        wanted = [[stop - start] for start, stop in self.parts]
        shapes = [list(part.shape) for part in parts]
        if shapes != wanted:
            raise DataError(self._text(f"initial values of shapes {shapes}, expected {wanted}"))
        for (start, stop), part in zip(self.parts, parts, strict=True):
            self._master[start - self._start : stop - self._start].copy_(part)

    def gradient_part(self, part: int) -> Tensor:
        """Where the root of a part's fold is to be written, before `block_sums` and `step`.

        Parameters
        ----------
        part : int
            Number of the part in this shard.

        Returns
        -------
        Tensor, float32 [part]
            A view of the shard's gradient.

        Raises
        ------
        DataError
            If the table is constant.
        """
        self._refuse_constant()
        start, stop = self.parts[part]
        return self._gradient[start - self._start : stop - self._start]

    def clear_gradient(self, part: int) -> None:
        """Do for a part whose root has no payload what `gradient_part` is for otherwise.

        Parameters
        ----------
        part : int
            Number of the part in this shard.

        Raises
        ------
        DataError
            If the table is constant.
        """
        self.gradient_part(part).fill_(-0.0)

    def block_sums(self) -> list[float]:
        """Sums of squares of the folded gradient, one per block, in order.

        Returns
        -------
        list of float
            In float64; buffers and the gaps of tensorwise placement do not count. A block's sum has
            the same bits on every cut of the table and with any number of threads.

        Raises
        ------
        DataError
            If the table is constant.
        """
        self._refuse_constant()
        return [
            _sum_of_squares([self._gradient[low:high] for low, high in ranges])
            for ranges in self._norm_ranges
        ]

    def step(
        self, groups: Sequence[Hyper], absent: Sequence[bytes], coefficient: float = 1.0
    ) -> None:
        """Make the next version from the folded gradient, which is used up.

        Parameters
        ----------
        groups : sequence of dict
            Hyper-parameters of the round, by param group.
        absent : sequence of bytes
            Per part, a bitmap of the tensors without a gradient: bit ``i`` for the ``i``-th of
            ``Layout.pieces(*part)``.
        coefficient : float
            The gradient of parameters, not of buffers, is multiplied with it in float32 first.

        Raises
        ------
        DataError
            If anything does not fit the table.
        UnsupportedError
            If torch cannot take this step. In both cases the version stays as it was.
        """
        self._refuse_constant()
        is_changed = list(absent) != self._absent
        ranges = self._absent_ranges(absent) if is_changed else []
        if self._optimizer is not None:
            apply_hyper(self._optimizer, groups)
        elif groups:
            raise DataError(self._text(f"{len(groups)} param groups, but no optimizer"))
        if is_changed:
            self._mark_absent(ranges)
            self._absent = list(absent)
        for run in self._runs:
            if run.parameter is not None:
                run.parameter.grad = None if run.is_absent else self._scaled(run, coefficient)
        if self._optimizer is not None:
            step(self._optimizer)
        for run in self._runs:
            if run.parameter is None and not run.is_absent:
                run.values.copy_(run.gradient)

    def copy_to(self, out: Tensor) -> None:
        """Copy the newest version.

        Parameters
        ----------
        out : Tensor, float32 [shard]
            Gets the elements of all parts, one after the other.

        Raises
        ------
        DataError
            If its shape is wrong.
        """
        if out.shape != self._master.shape:
            wanted, shape = list(self._master.shape), list(out.shape)
            raise DataError(self._text(f"a copy into shape {shape}, expected {wanted}"))
        out.copy_(self._master)

    def state_pieces(self) -> list[StatePiece]:
        """The optimizer's state tensor by tensor, the same whatever the cuts.

        Returns
        -------
        list of StatePiece
            For every tensor or piece of one in this shard, in order, buffers left out. Views of the
            living state: copy what is to be kept.
        """
        if self._optimizer is None:
            return []
        found: list[StatePiece] = []
        for run in self._runs:
            if run.parameter is None:
                continue
            state = self._optimizer.state.get(run.parameter, {})
            pieces = self.layout.pieces(run.start, run.stop)
            found += [_state_piece(state, piece, run, self._is_whole) for piece in pieces]
        return found

    # ---- runs ---------------------------------------------------------------------------------

    @property
    def _is_whole(self) -> bool:
        return self.spec.placement is Placement.TENSORWISE

    def _text(self, what: str) -> str:
        return f"table {self.spec.name!r}: {what}"

    def _refuse_constant(self) -> None:
        if self.spec.rule is Rule.CONSTANT:
            raise DataError(self._text("it is constant and has no rounds"))

    def _initial_runs(self) -> list[_Run]:
        """As few as possible: one per param group, or with tensorwise placement one per tensor."""
        found: list[tuple[int, int, int]] = []
        for piece in self.layout.pieces(self._start, self._stop):
            group, start = self.spec.tensors[piece.tensor].group, piece.start
            if self._is_whole:
                self._refuse_cut(piece)
            elif found and found[-1][0] == group and found[-1][2] == start:
                start = found.pop()[1]
            found.append((group, start, piece.stop))
        runs = [self._run(*bounds) for bounds in found]
        if self._is_whole:
            pieces = self.layout.pieces(self._start, self._stop)
            for run, piece in zip(runs, pieces, strict=True):
                shape = self.spec.tensors[piece.tensor].shape
                run.values, run.gradient = run.values.view(shape), run.gradient.view(shape)
        return runs

    def _run(self, group: int, start: int, stop: int) -> _Run:
        where = start - self._start, stop - self._start
        values, gradient = rebased_view(self._master, *where), self._gradient[slice(*where)]
        return _Run(group, start, stop, values, gradient)

    def _refuse_cut(self, piece: Piece) -> None:
        tensor = self.spec.tensors[piece.tensor]
        if piece.stop - piece.start != tensor.elements:
            text = (
                f"a shard would cut {tensor.name!r}, but tensorwise placement keeps tensors whole"
            )
            raise DataError(self._text(text))

    def _ranges_by_block(self, span: ShardSpan) -> list[list[tuple[int, int]]]:
        """Per block, where in the shard's gradient the elements of parameters are."""
        found: list[list[tuple[int, int]]] = [[] for _ in range(span.blocks)]
        step = layouts.BLOCK_ELEMENTS
        for run in self._runs:
            low, high = run.start - self._start, run.stop - self._start
            if run.group != BUFFER_GROUP:
                for block in range(low // step, -(-high // step)):
                    inside = max(low, block * step), min(high, (block + 1) * step)
                    found[block].append(inside)
        return found

    def _build_optimizer(self) -> Optimizer | None:
        spec = self.spec.optimizer
        if spec is None:
            return None
        if placement_of(spec.name, spec.groups) is Placement.TENSORWISE and not self._is_whole:
            text = f"{spec.name} with {spec.groups} needs tensorwise placement"
            raise DataError(self._text(text))
        groups: list[list[nn.Parameter]] = [[] for _ in spec.groups]
        for run in self._runs:
            if run.group != BUFFER_GROUP:
                run.parameter = nn.Parameter(run.values)
                groups[run.group].append(run.parameter)
        return build(spec, groups)

    def _absent_ranges(self, absent: Sequence[bytes]) -> list[tuple[int, int]]:
        """Elements of the tensors marked absent, adjacent ones as one range."""
        lengths, wanted = [len(marks) for marks in absent], [len(marks) for marks in self._absent]
        if lengths != wanted:
            raise DataError(self._text(f"absent marks of {lengths} bytes, expected {wanted}"))
        found: list[tuple[int, int]] = []
        last = (-1, False)
        for (start, stop), marks in zip(self.parts, absent, strict=True):
            for number, piece in enumerate(self.layout.pieces(start, stop)):
                is_absent = bool(marks[number // 8] >> number % 8 & 1)
                if last == (piece.tensor, not is_absent):
                    name = self.spec.tensors[piece.tensor].name
                    raise DataError(self._text(f"{name!r} is marked absent in some of its parts"))
                last = (piece.tensor, is_absent)
                if is_absent:
                    is_next = bool(found) and found[-1][1] == piece.start
                    first = found.pop()[0] if is_next else piece.start
                    found.append((first, piece.stop))
        return found

    def _mark_absent(self, ranges: list[tuple[int, int]]) -> None:
        """Mark the runs in these ranges, and no others, after cutting those that are partly in."""
        borders = [border for range_ in ranges for border in range_]
        self._runs = [piece for run in self._runs for piece in self._cut(run, borders)]
        starts = [start for start, _ in ranges]
        for run in self._runs:
            at = bisect_right(starts, run.start) - 1
            run.is_absent = at >= 0 and run.start < ranges[at][1]

    def _cut(self, run: _Run, borders: list[int]) -> list[_Run]:
        inner = borders[bisect_right(borders, run.start) : bisect_left(borders, run.stop)]
        if not inner:
            return [run]
        bounds = pairwise([run.start, *inner, run.stop])
        cuts = [self._run(run.group, start, stop) for start, stop in bounds]
        if run.parameter is not None and self._optimizer is not None:
            values = [cut.values for cut in cuts]
            parameters = split_parameter(self._optimizer, run.parameter, values)
            for cut, parameter in zip(cuts, parameters, strict=True):
                cut.parameter = parameter
        return cuts

    def _scaled(self, run: _Run, coefficient: float) -> Tensor:
        """The run's gradient as its optimizer wants it."""
        if isinstance(self._optimizer, SparseAdam):
            return _touched(run.gradient, coefficient)
        return run.gradient if coefficient == 1.0 else run.gradient.mul_(coefficient)


def _touched(gradient: Tensor, coefficient: float) -> Tensor:
    """The elements that are not -0.0, as a sparse gradient.

    Workers fill what they did not touch with -0.0. The product must not take part in the decision,
    since a small negative gradient may become -0.0 by it.
    """
    is_touched = gradient.view(torch.int32) != _NEGATIVE_ZERO_BITS
    values = gradient[is_touched]
    if coefficient != 1.0:
        values.mul_(coefficient)
    return torch.sparse_coo_tensor(
        is_touched.nonzero().t(),
        values,
        gradient.shape,
        check_invariants=False,
        is_coalesced=True,
    )


def _sum_of_squares(values: list[Tensor]) -> float:
    total = 0.0
    for tensor in values:
        for chunk in torch.split(tensor, SUM_ELEMENTS):
            total += chunk.double().square_().sum().item()
    return total


def _state_piece(state: dict[str, object], piece: Piece, run: _Run, is_whole: bool) -> StatePiece:
    start, stop = piece.start - run.start, piece.stop - run.start
    inside = dict(state) if is_whole else slice_state(state, start, stop)
    plain = {
        key: value.item() if isinstance(value, Tensor) and value.dim() == 0 else value
        for key, value in inside.items()
    }
    return StatePiece(piece.tensor, piece.offset, stop - start, plain)
