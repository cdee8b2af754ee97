"""The tensors of one shard: its float32 master copy and the optimizers that step it, unit by unit.

No I/O here, and no knowledge of rounds, nodes or members.
"""

from collections.abc import Iterator, Sequence

import msgspec
import torch
from torch import Tensor

from treefold.common.errors import DataError
from treefold.common.layout import Layout, ShardSpan
from treefold.common.optim import placement_of
from treefold.common.spec import BUFFER_GROUP, Hyper, Placement, Rule, TableSpec
from treefold.common.unit_state import UnitState, pack, unpack
from treefold.server.optimizers import TorchHyper, check_optimizer, prepare_hyper, rebased_view
from treefold.server.unit import Extent, StatePiece, Unit

_CLIP_EPS = 1e-6  # torch.nn.utils.clip_grads_with_norm_


class FoldedPart(msgspec.Struct, frozen=True, gc=False):
    """The root of one part's fold.

    Attributes
    ----------
    part : int
        Number of the part in its shard.
    gradient : Tensor, float32 [part], or None
        None if no tensor of the part has a gradient.
    absent : bytes
        Bitmap of the tensors without a gradient: bit ``i`` for the ``i``-th of
        ``Layout.pieces(*part)``.
    """

    part: int
    gradient: Tensor | None
    absent: bytes


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
        self._master = torch.zeros(max(0, self._stop - self._start))
        self._is_whole = spec.placement is Placement.TENSORWISE
        self._gradient: Tensor | None = None
        self._groups: Sequence[Hyper] | None = None
        self._written = b""
        self._hypers: Sequence[TorchHyper] = ()
        self._units: list[Unit] = []
        if spec.rule is not Rule.CONSTANT:
            self._units = self._make_units()

    # ---- round by round -----------------------------------------------------------------------

    def initialize(self, part: int, values: Tensor) -> None:
        """Set the values that a part has in version 0.

        Parameters
        ----------
        part : int
            Number of the part in this shard.
        values : Tensor, float32 [part]
            The values.

        Raises
        ------
        DataError
            If their shape is wrong; nothing is changed then.
        """
        start, stop = self.parts[part]
        if list(values.shape) != [stop - start]:
            text = f"initial values of shape {list(values.shape)}, expected [{stop - start}]"
            raise DataError(self._text(text))
        self.values(part).copy_(values)

    def step(
        self, folded: Sequence[FoldedPart], groups: Sequence[Hyper], coefficient: float = 1.0
    ) -> None:
        """Make the next version of some parts from their folded gradients.

        Parameters
        ----------
        folded : sequence of FoldedPart
            Any parts, each once per round; with tensorwise placement all parts at once, in order.
        groups : sequence of dict
            Hyper-parameters of the round, by param group.
        coefficient : float
            The gradient of parameters, not of buffers, is multiplied with it in float32 first.

        Raises
        ------
        DataError
            If anything does not fit the table.
        UnsupportedError
            If torch cannot take this step.
        """
        self._refuse_constant()
        self._prepare(groups)
        if self._is_whole:
            absent = [part.absent for part in folded]
            self._units[0].step(self._gathered(folded), absent, self._hypers, coefficient)
            return
        for part in folded:
            gradient = self._or_zeros(part)
            self._units[part.part].step(gradient, [part.absent], self._hypers, coefficient)

    def block_sums(self, folded: Sequence[FoldedPart]) -> list[float]:
        """Sums of squares of the folded gradient of all parts, one per block, in order.

        Parameters
        ----------
        folded : sequence of FoldedPart
            All parts, in order.

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
        if self._is_whole:
            return self._units[0].block_sums(self._gathered(folded))
        sums = [self._units[part.part].block_sums(self._or_zeros(part)) for part in folded]
        return [value for part in sums for value in part]

    def values(self, part: int) -> Tensor:
        """The newest values of a part, float32 [part]: the living ones, not a copy."""
        start, stop = self.parts[part]
        return self._master[start - self._start : stop - self._start]

    def trained(self, part: int) -> int:
        """How many elements of a part are of parameters; those of buffers come last."""
        tensors = self.spec.tensors
        first = next((n for n, one in enumerate(tensors) if one.group == BUFFER_GROUP), None)
        begin = self._stop if first is None else self.layout.starts[first]
        start, stop = self.parts[part]
        return max(0, min(stop, begin) - start)

    def copy_part(self, part: int, out: Tensor) -> None:
        """Copy the newest values of a part.

        Parameters
        ----------
        part : int
            Number of the part in this shard.
        out : Tensor [part]
            Gets them, rounded if it is of a narrower type.
        """
        out.copy_(self.values(part))

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

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of the tensors that the optimizer keeps."""
        kept = (value for unit in self._units for _, value in unit.kept())
        return sum(value.nbytes for value in kept if isinstance(value, Tensor))

    def state_pieces(self) -> list[StatePiece]:
        """The optimizer's state tensor by tensor, the same whatever the cuts.

        Returns
        -------
        list of StatePiece
            For every tensor or piece of one in each unit of this shard, in order, buffers left out.
            Views of the living state: copy what is to be kept.
        """
        return [piece for unit in self._units for piece in unit.state_pieces()]

    # ---- units --------------------------------------------------------------------------------

    def units(self) -> list[tuple[int, int]]:
        """Elements ``[start, stop)`` of each unit: what the optimizer steps at once."""
        return [(self._start, self._stop)] if self._is_one_unit else list(self.parts)

    def unit_of(self, part: int) -> int:
        """The unit that a part belongs to."""
        return 0 if self._is_one_unit else part

    @property
    def _is_one_unit(self) -> bool:
        return self._is_whole and bool(self._units)

    def export_unit(self, unit: int) -> UnitState:
        """A copy of the values of a unit and of everything that its optimizer keeps.

        Parameters
        ----------
        unit : int
            What the optimizer steps at once: a part by its number, or with tensorwise placement the
            whole shard, which is unit 0.

        Raises
        ------
        UnsupportedError
            The optimizer keeps something that cannot be copied.
        """
        if self._units:
            return self._units[unit].export_state()
        return pack(self.parts[unit][0], self.values(unit), [])

    def import_unit(self, unit: int, state: UnitState) -> None:
        """Take over what another server exported of this unit; nothing was stepped here before.

        Raises
        ------
        DataError
            It is not the state of this unit; nothing is changed then.
        """
        if self._units:
            self._units[unit].import_state(state)
            return
        start, stop = self.parts[unit]
        values, states = unpack(state)
        if (state.header.start, state.header.stop, states) != (start, stop, []):
            raise DataError(self._text(f"a state that is not of constants [{start}, {stop})"))
        self.values(unit).copy_(values)

    def tensors(self) -> Iterator[Tensor]:
        """All tensors of values and optimizer state, not copied, in an order of their own."""
        yield self._master
        for _, value in self._kept():
            if isinstance(value, Tensor) and value.dim() > 0:
                yield value

    def counters(self) -> Iterator[tuple[str, object]]:
        """What else the optimizer keeps, by name."""
        for key, value in self._kept():
            if not isinstance(value, Tensor):
                yield key, value
            elif value.dim() == 0:
                yield key, value.item()

    def _kept(self) -> Iterator[tuple[str, object]]:
        for unit in self._units:
            yield from unit.kept()

    # ---- insides ------------------------------------------------------------------------------

    def _text(self, what: str) -> str:
        return f"table {self.spec.name!r}: {what}"

    def _refuse_constant(self) -> None:
        if self.spec.rule is Rule.CONSTANT:
            raise DataError(self._text("it is constant and has no rounds"))

    def _prepare(self, groups: Sequence[Hyper]) -> None:
        """Work out the hyper-parameters of a round, once for all of its parts."""
        if groups is self._groups:
            return
        written = msgspec.msgpack.encode(groups)
        if written == self._written:  # as in most rounds
            self._groups = groups
            return
        spec = self.spec.optimizer
        if spec is not None:
            self._hypers = prepare_hyper(spec, groups)
        elif groups:
            raise DataError(self._text(f"{len(groups)} param groups, but no optimizer"))
        self._groups, self._written = groups, written

    def _or_zeros(self, part: FoldedPart) -> Tensor:
        if part.gradient is not None:
            return part.gradient
        return torch.full((self.parts[part.part][1] - self.parts[part.part][0],), -0.0)

    def _gathered(self, folded: Sequence[FoldedPart]) -> Tensor:
        """The gradient of the whole shard in one piece."""
        if [part.part for part in folded] != list(range(len(self.parts))):
            raise DataError(self._text("tensors that stay whole are stepped all parts at once"))
        if self._gradient is None:
            self._gradient = torch.empty_like(self._master)
        for part in folded:
            start, stop = self.parts[part.part]
            target = self._gradient[start - self._start : stop - self._start]
            if part.gradient is None:
                target.fill_(-0.0)
            else:
                target.copy_(part.gradient)
        return self._gradient

    def _make_units(self) -> list[Unit]:
        spec = self.spec.optimizer
        hypers: list[TorchHyper] = []
        if spec is not None:
            needed = placement_of(spec.name, spec.groups)
            if needed is Placement.TENSORWISE and not self._is_whole:
                text = f"{spec.name} with {spec.groups} needs tensorwise placement"
                raise DataError(self._text(text))
            hypers = check_optimizer(spec)
        extents = [Extent(start, stop, [(start, stop)]) for start, stop in self.parts]
        if self._is_whole:
            extents = [Extent(self._start, self._stop, self.parts)]
        return [
            Unit(
                self.spec,
                self.layout,
                extent,
                rebased_view(self._master, extent.start - self._start, extent.stop - self._start),
                hypers,
            )
            for extent in extents
        ]
