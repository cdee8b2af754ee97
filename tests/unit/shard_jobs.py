"""A table on plain torch and on shards, for comparing them bit by bit.

The oracle is `Plain`: whole tensors, torch's own optimizer, ``grad = None`` where there is none.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from treefold.common import layout as layouts
from treefold.common.layout import Layout, ShardSpan
from treefold.common.optim import optimizer_class, placement_of
from treefold.common.spec import (
    BUFFER_GROUP,
    Dtype,
    Hyper,
    OptimizerSpec,
    Placement,
    Rule,
    TableSpec,
    TensorSpec,
)
from treefold.common.unit_state import UnitState, decode_header, encode_header
from treefold.server.shard import FoldedPart, ShardState
from treefold.server.unit import StatePiece


@dataclass
class Round:
    """One gradient (or new buffer) per tensor, None for none, and the hyper-parameters."""

    gradients: list[Tensor | None]
    groups: list[Hyper]
    coefficient: float = 1.0


@contextmanager
def blocks_of(elements: int, blocks_per_part: int = 2) -> Iterator[None]:
    """Small blocks, so that small tensors are cut."""
    with (
        mock.patch.object(layouts, "BLOCK_ELEMENTS", elements),
        mock.patch.object(layouts, "PART_BLOCKS_MAX", blocks_per_part),
    ):
        yield


def make_spec(
    name: str, hypers: list[Hyper], tensors: Sequence[tuple[list[int], int]]
) -> TableSpec:
    """A table of tensors, each given by its shape and param group."""
    specs = [TensorSpec(f"t{n}", s, Dtype.FLOAT32, g) for n, (s, g) in enumerate(tensors)]
    placement = placement_of(name, hypers)
    return TableSpec("net", Rule.OPTIMIZER, placement, specs, OptimizerSpec(name, hypers))


class Plain:
    """The reference: torch alone, tensor by tensor."""

    def __init__(self, spec: TableSpec, initial: list[Tensor]) -> None:
        assert spec.optimizer is not None
        self.spec = spec
        self.values = [nn.Parameter(value.clone()) for value in initial]
        self.groups: list[dict[str, object]] = [
            {"params": self._of_group(number), **_tuples(hyper)}
            for number, hyper in enumerate(spec.optimizer.groups)
        ]
        # Adagrad takes this from its constructor only.
        key = "initial_accumulator_value"
        first = {k: v for k, v in spec.optimizer.groups[0].items() if k == key}
        self.optimizer = optimizer_class(spec.optimizer.name)(self.groups, **first)

    def _of_group(self, number: int) -> list[nn.Parameter]:
        pairs = zip(self.spec.tensors, self.values, strict=True)
        return [value for tensor, value in pairs if tensor.group == number]

    def step(self, round_: Round) -> None:
        """One round on whole tensors."""
        for group, hyper in zip(self.optimizer.param_groups, round_.groups, strict=True):
            group.update(_tuples(hyper))
        for tensor, value, gradient in zip(
            self.spec.tensors, self.values, round_.gradients, strict=True
        ):
            if tensor.group == BUFFER_GROUP:
                value.data = value.data if gradient is None else gradient.clone()
                continue
            value.grad = None if gradient is None else gradient * round_.coefficient
            if gradient is not None and isinstance(self.optimizer, torch.optim.SparseAdam):
                value.grad = by_rows(gradient) * round_.coefficient
        self.optimizer.step()


def _tuples(hyper: Hyper) -> dict[str, object]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in hyper.items()}


def by_rows(gradient: Tensor) -> Tensor:
    """A gradient as `torch.nn.Embedding` makes it: the rows that are not all -0.0."""
    rows = gradient.reshape(gradient.shape[0], -1)
    touched = ~((rows == 0) & rows.signbit()).all(dim=1)
    where = touched.nonzero().t()
    return torch.sparse_coo_tensor(where, gradient[touched], gradient.shape, check_invariants=True)


@dataclass
class Cluster:
    """The same table on shards."""

    spec: TableSpec
    spans: list[ShardSpan]
    shards: list[ShardState] = field(default_factory=list)

    def start(self, initial: list[Tensor]) -> None:
        """Make the shards and bring the initial values."""
        self.shards = [ShardState(self.spec, span) for span in self.spans]
        flat = self.flat(initial)
        for shard in self.shards:
            for number, (start, stop) in enumerate(shard.parts):
                shard.initialize(number, flat[start:stop])

    def flat(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Tensors at their places in the flat space, -0.0 where there is none."""
        layout = self.shards[0].layout
        flat = torch.full((layout.elements,), -0.0)
        for tensor, start, size in zip(tensors, layout.starts, layout.sizes, strict=True):
            if tensor is not None:
                flat[start : start + size] = tensor.flatten()
        return flat

    def folded(self, shard: ShardState, round_: Round) -> list[FoldedPart]:
        """A round's gradients, part by part; no payload where there is nothing at all."""
        flat = self.flat(round_.gradients)
        found = []
        for number, ((start, stop), absent) in enumerate(
            zip(shard.parts, marks(shard, round_), strict=True)
        ):
            is_there = _is_there(shard, round_, (start, stop))
            found.append(FoldedPart(number, flat[start:stop] if is_there else None, absent))
        return found

    def step(self, round_: Round) -> None:
        """One round on the shards: the last parts first, where parts step by themselves."""
        for shard in self.shards:
            folded = self.folded(shard, round_)
            runs = [[part] for part in reversed(folded)]
            if self.spec.placement is Placement.TENSORWISE:
                runs = [folded]
            for run in runs:
                shard.step(run, round_.groups, round_.coefficient)

    def move(self) -> None:
        """Copy every unit to another server's shards, and go on with those."""
        fresh = [ShardState(self.spec, span) for span in self.spans]
        for old, new in zip(self.shards, fresh, strict=True):
            is_whole = self.spec.placement is Placement.TENSORWISE
            for unit in range(1 if is_whole else len(old.parts)):
                header, flat = old.export_unit(unit)
                new.import_unit(unit, UnitState(decode_header(encode_header(header)), flat))
        self.shards = fresh

    def values(self) -> list[Tensor]:
        """The tensors of the newest version."""
        layout = self.shards[0].layout
        flat = torch.full((layout.elements,), math.nan)
        for shard in self.shards:
            shard.copy_to(flat[shard.parts[0][0] : shard.parts[-1][1]])
        pairs = zip(layout.starts, layout.sizes, self.spec.tensors, strict=True)
        return [flat[start : start + size].view(tensor.shape) for start, size, tensor in pairs]

    def pieces(self) -> list[StatePiece]:
        """The optimizer's state on all shards."""
        return [piece for shard in self.shards for piece in shard.state_pieces()]


def marks(shard: ShardState, round_: Round) -> list[bytes]:
    """The bitmaps of absent tensors, part by part."""
    found = []
    for start, stop in shard.parts:
        pieces = shard.layout.pieces(start, stop)
        absent = [round_.gradients[piece.tensor] is None for piece in pieces]
        mask = sum(1 << number for number, is_absent in enumerate(absent) if is_absent)
        found.append(mask.to_bytes(-(-len(pieces) // 8), "little"))
    return found


def _is_there(shard: ShardState, round_: Round, part: tuple[int, int]) -> bool:
    pieces = shard.layout.pieces(*part)
    return any(round_.gradients[piece.tensor] is not None for piece in pieces)


def is_same(left: object, right: object) -> bool:
    """Equal bit by bit: the sign of zero counts."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        left, right = left.detach().flatten(), right.detach().flatten()
        return torch.equal(left.view(torch.int32), right.view(torch.int32))
    return left == right


def differences(plain: Plain, cluster: Cluster) -> list[str]:
    """Names of tensors whose values or optimizer state are not the same on both."""
    found = []
    named = zip(cluster.spec.tensors, plain.values, cluster.values(), strict=True)
    found += [tensor.name for tensor, one, other in named if not is_same(one, other)]
    is_whole = cluster.spec.placement is Placement.TENSORWISE
    covered = [0] * len(plain.values)
    for piece in cluster.pieces():
        covered[piece.tensor] += piece.elements
        state = plain.optimizer.state.get(plain.values[piece.tensor], {})
        where = slice(piece.offset, piece.offset + piece.elements)
        wanted = {key: _part(value, where, is_whole) for key, value in state.items()}
        name = cluster.spec.tensors[piece.tensor].name
        if wanted.keys() != piece.state.keys():
            found.append(f"{name}: {sorted(wanted)}, {sorted(piece.state)}")
        found += [f"{name}.{k}" for k in wanted if not is_same(wanted[k], piece.state.get(k))]
    sizes = [t.elements if t.group != BUFFER_GROUP else 0 for t in cluster.spec.tensors]
    return found if covered == sizes else [*found, f"state of {covered} elements, not {sizes}"]


def _part(value: object, where: slice, is_whole: bool) -> object:
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 0:
        return value.item()
    return value if is_whole else value.flatten()[where]


# ---- jobs at random ------------------------------------------------------------------------------


@dataclass
class Job:
    """A table, where it is cut, and what happens to it."""

    spec: TableSpec
    block: int
    shards: int
    initial: list[Tensor]
    rounds: list[Round]
    moved_after: int | None = None

    def run(self) -> tuple[Plain, Cluster]:
        """Run it on both."""
        with blocks_of(self.block):
            cluster = Cluster(self.spec, Layout(self.spec).cut(self.shards))
            plain = Plain(self.spec, self.initial)
            cluster.start(self.initial)
            for number, round_ in enumerate(self.rounds):
                if number == self.moved_after:
                    cluster.move()
                plain.step(round_)
                cluster.step(round_)
            if self.moved_after == len(self.rounds):
                cluster.move()
            return plain, cluster

    def differences(self) -> list[str]:
        """Run it on both, and compare."""
        return differences(*self.run())


@dataclass
class Draw:
    """Tensors and hyper-parameters from one seed."""

    seed: int
    is_sparse: bool

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def tensor(self, shape: list[int]) -> Tensor:
        """Normal values of one of several magnitudes."""
        scale = 10.0 ** torch.randint(-3, 3, (), generator=self.generator).item()
        return torch.randn(shape, generator=self.generator) * scale

    def gradient(self, shape: list[int]) -> Tensor:
        """A gradient, some elements of it 0; of a sparse class some rows -0.0 all over."""
        gradient = self.tensor(shape)
        gradient[torch.rand(shape, generator=self.generator) < 0.1] = 0.0
        if self.is_sparse:
            gradient[torch.rand(shape[0], generator=self.generator) < 0.5] = -0.0
        return gradient

    def hyper(self, declared: Hyper, round_: int) -> Hyper:
        """A learning rate, and where there is one a momentum, of this round."""
        cycled: Hyper = {"lr": float(str(declared["lr"])) / (1 + round_)}
        if declared.get("momentum"):
            cycled["momentum"] = 0.9 - 0.01 * round_
        if "betas" in declared:
            cycled["betas"] = [0.6 + 0.01 * round_, 0.7]
        return {**declared, **cycled}


Shapes = list[tuple[list[int], int]]
"""Shape and param group of every tensor."""


def make_job(name: str, hyper: Hyper, tensors: Shapes, patterns: list[list[int]], seed: int) -> Job:
    """A job with a round per pattern, which says which tensors have a gradient."""
    count = 1 + max(group for _, group in tensors)
    groups: list[Hyper] = [{**hyper, "lr": 0.1 / (1 + number)} for number in range(count)]
    values = Draw(seed, name == "SparseAdam")
    rounds = []
    for number, pattern in enumerate(patterns):
        gradients = [
            values.gradient(shape) if is_there else None
            for (shape, _), is_there in zip(tensors, pattern, strict=True)
        ]
        rounds.append(Round(gradients, [values.hyper(group, number) for group in groups]))
    initial = [values.tensor(shape) for shape, _ in tensors]
    return Job(make_spec(name, groups, tensors), 16, 3, initial, rounds)


SHAPES = st.sampled_from([[1], [2], [7], [3, 5], [64], [33, 47], [2, 3, 4], [0], [501]])


@st.composite
def jobs(draw: st.DrawFn, name: str, hyper: Hyper) -> Job:
    """A table of two param groups and buffers, some tensors of it absent in some rounds."""
    shapes = [draw(st.lists(SHAPES, min_size=1, max_size=4)) for _ in range(3)]
    if name == "Muon":
        shapes = [[s for s in some if len(s) == 2] or [[4, 6]] for some in shapes]
    if name in {"Adafactor", "SparseAdam"}:  # torch cannot step empty tensors with these
        shapes = [[s for s in some if 0 not in s] or [[9]] for some in shapes]
    tensors = [(s, g) for g, some in zip([0, 1, BUFFER_GROUP], shapes, strict=True) for s in some]
    all_of_them = [1] * len(tensors)
    sometimes = st.lists(st.integers(0, 3), min_size=len(tensors), max_size=len(tensors))
    if hyper.get("fused") and hyper.get("momentum"):  # torch refuses first steps at various times
        sometimes = st.just(all_of_them)
    patterns = draw(st.lists(sometimes, min_size=4, max_size=6))
    patterns[0] = all_of_them if draw(st.booleans()) else patterns[0]
    job = make_job(name, hyper, tensors, patterns, draw(st.integers(0, 1 << 30)))
    job.block = draw(st.sampled_from([1, 5, 16, 37, 256]))
    job.shards = draw(st.integers(1, 4))
    return job
