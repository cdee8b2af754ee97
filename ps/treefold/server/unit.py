"""What one optimizer steps at once: a part of a shard, or all of it if tensors must stay whole.

A part is small enough to stay in a processor's cache between the fold and the step, which makes the
kernels of `torch.optim` several times faster than over a whole shard.

Adjacent tensors of one param group are stepped as one flat parameter, a *run*, so that a step costs
the same however small the tensors are. A round in which only some of a run's tensors have a
gradient cuts it, for good: `torch.optim` leaves a parameter without gradient alone, counters
included. None of these cuts changes a bit.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, SparseAdam

from treefold.common import layout as layouts
from treefold.common.errors import DataError
from treefold.common.layout import Layout, Piece
from treefold.common.spec import BUFFER_GROUP, Placement, TableSpec
from treefold.common.unit_state import UnitState, pack, unpack
from treefold.server.optimizers import (
    TorchHyper,
    make,
    rebased_view,
    set_hyper,
    slice_state,
    split_parameter,
    step,
)

SUM_ELEMENTS = 16_384
"""Elements summed at once for a norm. Torch does not share sums of less than 32,768 elements
(`at::internal::GRAIN_SIZE`) among threads, which would make the bits depend on their number."""

_NEGATIVE_ZERO_BITS = torch.iinfo(torch.int32).min


class StatePiece(NamedTuple):
    """Optimizer state of the part of one tensor that lies in a shard.

    ``offset`` is the position of its first element in the tensor, ``elements`` their number.
    ``state`` has views of the state tensors, and numbers where torch keeps one per parameter.
    """

    tensor: int
    offset: int
    elements: int
    state: dict[str, object]


@dataclass(frozen=True, slots=True)
class Extent:
    """A stretch of a table's flat space that is stepped at once.

    Attributes
    ----------
    start, stop : int
        Its elements.
    parts : list of (start, stop)
        The parts that it consists of.
    """

    start: int
    stop: int
    parts: Sequence[tuple[int, int]]


@dataclass(slots=True)
class _Run:
    """Elements ``[start, stop)`` of the flat space that step alike; a buffer has no parameter."""

    group: int
    start: int
    stop: int
    values: Tensor
    shape: Sequence[int] | None = None
    parameter: nn.Parameter | None = None
    is_absent: bool = False


class Unit:
    """One stretch of a shard with its optimizer.

    Parameters
    ----------
    spec : TableSpec
        The table.
    layout : Layout
        Its flat space.
    extent : Extent
        Which elements.
    values : Tensor, float32 [stop - start]
        Their values, changed in place by every step; begins its own storage (`rebased_view`).
    hypers : sequence of dict
        Hyper-parameters of the first round by param group, as torch wants them.

    Raises
    ------
    DataError
        The stretch cuts a tensor that must stay whole.
    """

    def __init__(
        self,
        spec: TableSpec,
        layout: Layout,
        extent: Extent,
        values: Tensor,
        hypers: Sequence[TorchHyper],
    ) -> None:
        self.spec = spec
        self.layout = layout
        self.extent = extent
        self._values = values
        self._is_whole = spec.placement is Placement.TENSORWISE
        self._absent = [bytes(-(-len(layout.pieces(*part)) // 8)) for part in extent.parts]
        self._hypers: Sequence[TorchHyper] = ()
        self._runs = self._initial_runs()
        self._norm_ranges = self._ranges_by_block()
        self._optimizer: Optimizer | None = None
        if spec.optimizer is not None:
            groups: list[list[nn.Parameter]] = [[] for _ in spec.optimizer.groups]
            for run in self._runs:
                if run.group != BUFFER_GROUP:
                    run.parameter = nn.Parameter(run.values)
                    groups[run.group].append(run.parameter)
            if any(groups):
                self._optimizer = make(spec.optimizer.name, hypers, groups)

    def step(
        self,
        gradient: Tensor,
        absent: Sequence[bytes],
        hypers: Sequence[TorchHyper],
        coefficient: float,
    ) -> None:
        """Make the next version of this stretch.

        Parameters
        ----------
        gradient : Tensor, float32 [stop - start]
            The folded gradient; not kept.
        absent : sequence of bytes
            Per part, a bitmap of the tensors without a gradient: bit ``i`` for the ``i``-th of
            ``Layout.pieces(*part)``.
        hypers : sequence of dict
            Hyper-parameters of the round by param group, as torch wants them.
        coefficient : float
            The gradient of parameters, not of buffers, is multiplied with it in float32 first.

        Raises
        ------
        DataError
            The marks do not fit.
        UnsupportedError
            torch cannot take this step.
        """
        if absent != self._absent:
            self._mark_absent(self._absent_ranges(absent))
            self._absent = list(absent)
        if self._optimizer is not None and hypers is not self._hypers:
            set_hyper(self._optimizer, hypers)
            self._hypers = hypers
        for run in self._runs:
            if run.parameter is not None:
                wanted = None if run.is_absent else self._of_run(gradient, run, coefficient)
                run.parameter.grad = wanted
        if self._optimizer is not None:
            step(self._optimizer)
        for run in self._runs:
            if run.parameter is not None:
                run.parameter.grad = None
            elif not run.is_absent:
                run.values.copy_(self._of_run(gradient, run, 1.0))

    def block_sums(self, gradient: Tensor) -> list[float]:
        """Sums of squares of a folded gradient, one per block, in order.

        Parameters
        ----------
        gradient : Tensor, float32 [stop - start]
            The folded gradient.

        Returns
        -------
        list of float
            In float64; buffers and the gaps of tensorwise placement do not count. A block's sum has
            the same bits on every cut of the table and with any number of threads.
        """
        return [
            _sum_of_squares([gradient[low:high] for low, high in ranges])
            for ranges in self._norm_ranges
        ]

    def state_pieces(self) -> list[StatePiece]:
        """The optimizer's state tensor by tensor; see `ShardState.state_pieces`."""
        if self.spec.optimizer is None:
            return []
        found: list[StatePiece] = []
        for run in self._runs:
            if run.parameter is None:
                continue
            state = {} if self._optimizer is None else self._optimizer.state.get(run.parameter, {})
            pieces = self.layout.pieces(run.start, run.stop)
            found += [_state_piece(state, piece, run, self._is_whole) for piece in pieces]
        return found

    def export_state(self) -> UnitState:
        """A copy of the values and of everything that the optimizer keeps.

        Raises
        ------
        UnsupportedError
            The optimizer keeps something that cannot be copied.
        """
        states = [(run.start, run.stop, self._state_of(run)) for run in self._runs]
        return pack(self.extent.start, self._values, states)

    def import_state(self, state: UnitState) -> None:
        """Take over what another server's unit of the same stretch exported, before any step.

        Raises
        ------
        DataError
            It does not fit this stretch of this table; nothing is changed then.
        """
        values, states = unpack(state)
        wanted = self.extent.start, self.extent.stop
        if (state.header.start, state.header.stop) != wanted:
            text = f"a state of [{state.header.start}, {state.header.stop}) for {list(wanted)}"
            raise DataError(self._text(text))
        borders = sorted({at for start, stop, _ in states for at in (start, stop)})
        cut = {(run.start, run.stop) for run in self._runs}
        if not self._is_whole:
            cut = {bounds for run in self._runs for bounds in _cut_bounds(run, borders)}
        found = {(start, stop): one for start, stop, one in states}
        if set(found) != cut or len(found) != len(states):
            raise DataError(self._text(f"a state of runs {sorted(found)}, not of {sorted(cut)}"))
        for (start, stop), one in found.items():
            self._check_state(start, stop, one)
        if not self._is_whole:
            self._runs = [piece for run in self._runs for piece in self._cut(run, borders)]
        self._values.copy_(values)
        for run in self._runs:
            if run.parameter is not None and self._optimizer is not None:
                self._optimizer.state.pop(run.parameter, None)
                if found[run.start, run.stop]:
                    self._optimizer.state[run.parameter] = found[run.start, run.stop]

    def kept(self) -> Iterator[tuple[str, object]]:
        """Everything that the optimizer keeps, run by run and by name; not a copy."""
        for run in self._runs:
            state = self._state_of(run)
            yield from ((key, state[key]) for key in sorted(state))

    def _state_of(self, run: _Run) -> dict[str, object]:
        if run.parameter is None or self._optimizer is None:
            return {}
        return dict(self._optimizer.state.get(run.parameter, {}))

    def _check_state(self, start: int, stop: int, state: dict[str, object]) -> None:
        """Tensors of an elementwise optimizer have one element per element of their run."""
        for key, value in state.items():
            if self._is_whole or not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if value.shape != (stop - start,):
                text = f"{key!r} of shape {list(value.shape)} for [{start}, {stop})"
                raise DataError(self._text(text))

    # ---- runs ---------------------------------------------------------------------------------

    def _text(self, what: str) -> str:
        return f"table {self.spec.name!r}: {what}"

    def _of_run(self, gradient: Tensor, run: _Run, coefficient: float) -> Tensor:
        """A run's gradient as its optimizer wants it."""
        low, high = run.start - self.extent.start, run.stop - self.extent.start
        own = gradient if high - low == gradient.numel() else gradient[low:high]
        if run.shape is not None:
            own = own.view(run.shape)
        if run.parameter is not None and isinstance(self._optimizer, SparseAdam):
            return _touched(own, coefficient)
        return own if coefficient == 1.0 else own * coefficient

    def _initial_runs(self) -> list[_Run]:
        """As few as possible: one per param group, or with tensorwise placement one per tensor."""
        found: list[tuple[int, int, int]] = []
        pieces = self.layout.pieces(self.extent.start, self.extent.stop)
        for piece in pieces:
            group, start = self.spec.tensors[piece.tensor].group, piece.start
            if self._is_whole:
                self._refuse_cut(piece)
            elif found and found[-1][0] == group and found[-1][2] == start:
                start = found.pop()[1]
            found.append((group, start, piece.stop))
        runs = [self._run(*bounds) for bounds in found]
        if self._is_whole:
            for run, piece in zip(runs, pieces, strict=True):
                run.shape = self.spec.tensors[piece.tensor].shape
                run.values = run.values.view(run.shape)
        return runs

    def _run(self, group: int, start: int, stop: int) -> _Run:
        low, high = start - self.extent.start, stop - self.extent.start
        return _Run(group, start, stop, rebased_view(self._values, low, high))

    def _refuse_cut(self, piece: Piece) -> None:
        tensor = self.spec.tensors[piece.tensor]
        if piece.stop - piece.start != tensor.elements:
            text = (
                f"a shard would cut {tensor.name!r}, but tensorwise placement keeps tensors whole"
            )
            raise DataError(self._text(text))

    def _ranges_by_block(self) -> list[list[tuple[int, int]]]:
        """Per block, where in the gradient the elements of parameters are."""
        step = layouts.BLOCK_ELEMENTS
        blocks = max(1, -(-(self.extent.stop - self.extent.start) // step))
        found: list[list[tuple[int, int]]] = [[] for _ in range(blocks)]
        for run in self._runs:
            low, high = run.start - self.extent.start, run.stop - self.extent.start
            if run.group != BUFFER_GROUP:
                for block in range(low // step, -(-high // step)):
                    inside = max(low, block * step), min(high, (block + 1) * step)
                    found[block].append(inside)
        return found

    def _absent_ranges(self, absent: Sequence[bytes]) -> list[tuple[int, int]]:
        """Elements of the tensors marked absent, adjacent ones as one range."""
        lengths, wanted = [len(marks) for marks in absent], [len(marks) for marks in self._absent]
        if lengths != wanted:
            raise DataError(self._text(f"absent marks of {lengths} bytes, expected {wanted}"))
        found: list[tuple[int, int]] = []
        last = (-1, False)
        for (start, stop), marks in zip(self.extent.parts, absent, strict=True):
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
        bounds = _cut_bounds(run, borders)
        if len(bounds) == 1:
            return [run]
        cuts = [self._run(run.group, start, stop) for start, stop in bounds]
        if run.parameter is not None and self._optimizer is not None:
            values = [cut.values for cut in cuts]
            parameters = split_parameter(self._optimizer, run.parameter, values)
            for cut, parameter in zip(cuts, parameters, strict=True):
                cut.parameter = parameter
        return cuts


def _cut_bounds(run: _Run, borders: list[int]) -> list[tuple[int, int]]:
    inner = borders[bisect_right(borders, run.start) : bisect_left(borders, run.stop)]
    return list(pairwise([run.start, *inner, run.stop]))


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
