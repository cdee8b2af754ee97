"""What a schedule of contributions trains: a real model on real data, by the servers' own step.

Where the simulator says when contributions are applied and with which versions they begin, this
says what comes of it. Tensors there are symbols, and time means nothing here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from tests.support.reference import fold
from treefold.common.layout import Layout
from treefold.common.spec import (
    Dtype,
    Hyper,
    OptimizerSpec,
    Placement,
    Rule,
    TableSpec,
    TensorSpec,
)
from treefold.server.shard import FoldedPart, ShardState

PIXELS, HIDDEN, CLASSES = 64, 32, 10
TRAIN = 1_280  # images; with 32 slots of 4 they are ten whole rounds
BATCH = 128  # samples of a round over all slots
HYPER: Hyper = {"lr": 0.5}
IN_A_ROW = 5  # evaluations, one per round, before a loss counts as reached


@dataclass(frozen=True, slots=True)
class Step:
    """How one version was made.

    Attributes
    ----------
    at_ns : int
        When.
    batches : tuple of (int, int)
        Round and slot of the contributions that it was made of.
    base : int
        The version that their bodies began with.
    """

    at_ns: int
    batches: tuple[tuple[int, int], ...]
    base: int


@dataclass(frozen=True, slots=True)
class Images:
    """Pixels, float32 [n, 64], and labels, int64 [n]."""

    pixels: Tensor
    labels: Tensor


class Digits:
    """scikit-learn's handwritten digits: a part to train with, and a part held back.

    Parameters
    ----------
    seed : int
        Of what is held back, and of the order in which samples are taken.
    """

    def __init__(self, seed: int) -> None:
        pixels, labels = _digits()
        order = torch.randperm(len(labels), generator=_generator(seed, 0))
        kept, held = order[:TRAIN], order[TRAIN:]
        self.train = Images(pixels[kept], labels[kept])
        self.test = Images(pixels[held], labels[held])
        self._seed = seed
        self._orders: dict[int, Tensor] = {}

    def of(self, round_: int, slot: int, slots: int) -> Images:
        """The samples of a slot in a round: each one once per epoch."""
        epoch, number = divmod(round_, TRAIN // BATCH)
        if epoch not in self._orders:
            generator = _generator(self._seed, 1 + epoch)
            self._orders[epoch] = torch.randperm(TRAIN, generator=generator)
        each = BATCH // slots
        start = number * BATCH + slot * each
        chosen = self._orders[epoch][start : start + each]
        return Images(self.train.pixels[chosen], self.train.labels[chosen])


@dataclass(frozen=True, slots=True)
class Lesson:
    """What came of a schedule.

    Attributes
    ----------
    times_ns : list of int
        When each round's worth of contributions was in.
    losses : list of float
        Mean loss of all training images then.
    accuracy : float
        Share of the images held back that the last version recognises.
    values : Tensor, float32 [n]
        The last version.
    """

    times_ns: list[int]
    losses: list[float]
    accuracy: float
    values: Tensor

    def reached_ns(self, loss: float) -> int | None:
        """When the first of some evaluations in a row found this loss or less; None if never."""
        good = [found <= loss for found in self.losses]
        for number, at_ns in enumerate(self.times_ns[: len(good) - IN_A_ROW + 1]):
            if all(good[number : number + IN_A_ROW]):
                return at_ns
        return None


def make_model(seed: int) -> nn.Sequential:
    """A perceptron 64-32-10, with initial values of its own for each seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


class Pupil:
    """A model whose versions are made one by one.

    Parameters
    ----------
    digits : Digits
        What it learns.
    slots : int
        Of a round. A gradient counts with its slot's share of the round's samples.
    seed : int
        Of its initial values.

    Attributes
    ----------
    versions : list of Tensor, float32 [n]
        All so far.
    """

    def __init__(self, digits: Digits, slots: int, seed: int) -> None:
        self._digits, self._slots = digits, slots
        self._model = make_model(seed)
        self._parameters = list(self._model.parameters())
        flat = nn.utils.parameters_to_vector(self._parameters).detach()
        self._state = _shard(self._model)
        for part, (start, stop) in enumerate(self._state.parts):
            self._state.initialize(part, flat[start:stop].clone())
        self.versions = [self._values()]

    def step(self, step: Step) -> None:
        """Make the next version."""
        self._load(step.base)
        total = fold([self._gradient(*batch) for batch in step.batches])
        parts = enumerate(self._state.parts)
        folded = [FoldedPart(part, total[start:stop], b"\0") for part, (start, stop) in parts]
        self._state.step(folded, [HYPER])
        self.versions.append(self._values())

    def loss(self) -> float:
        """Of the newest version, over all training images."""
        self._load(-1)
        with torch.no_grad():
            return float(self._loss(self._digits.train))

    def accuracy(self) -> float:
        """Of the newest version, over the images held back."""
        self._load(-1)
        test = self._digits.test
        with torch.no_grad():
            right = (self._model(test.pixels).argmax(1) == test.labels).sum()
        return int(right) / len(test.labels)

    def _gradient(self, round_: int, slot: int) -> Tensor:
        loss = self._loss(self._digits.of(round_, slot, self._slots))
        found = torch.autograd.grad(loss, self._parameters)
        return nn.utils.parameters_to_vector(found) * (1 / self._slots)

    def _loss(self, images: Images) -> Tensor:
        return nn.functional.cross_entropy(self._model(images.pixels), images.labels)

    def _load(self, version: int) -> None:
        nn.utils.vector_to_parameters(self.versions[version], self._parameters)

    def _values(self) -> Tensor:
        return torch.cat([self._state.values(part) for part in range(len(self._state.parts))])


def replay(steps: Sequence[Step], slots: int, seed: int) -> Lesson:
    """Train by a schedule.

    Parameters
    ----------
    steps : sequence of Step
        In the order of versions, from 1 on.
    slots : int
        Of a round.
    seed : int
        Of data and initial values.
    """
    pupil = Pupil(Digits(seed), slots, seed)
    times_ns: list[int] = []
    losses: list[float] = []
    applied = 0
    for step in steps:
        pupil.step(step)
        before, applied = applied, applied + len(step.batches)
        if applied // slots > before // slots:
            times_ns.append(step.at_ns)
            losses.append(pupil.loss())
    return Lesson(times_ns, losses, pupil.accuracy(), pupil.versions[-1])


def _shard(model: nn.Module) -> ShardState:
    tensors = [
        TensorSpec(name, list(one.shape), Dtype.FLOAT32, 0)
        for name, one in model.named_parameters()
    ]
    optimizer = OptimizerSpec("SGD", [HYPER])
    spec = TableSpec("model", Rule.OPTIMIZER, Placement.ELEMENTWISE, tensors, optimizer)
    return ShardState(spec, Layout(spec).cut(1)[0])


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000 * seed + number)


@cache
def _digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    pixels = torch.tensor(found.data, dtype=torch.float32) / 16
    return pixels, torch.tensor(found.target)
