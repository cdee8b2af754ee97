"""Scripts of the torch layer, run against the reference job in this process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import treefold.torch as ps
from tests.support.reference import ReferenceClient, ReferenceJob, bits
from treefold.torch import session
from treefold.torch.randomness import permutation, seed_all, seed_for_compute

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

SAMPLES = 30
BATCH = 8


@contextmanager
def joined(job: ReferenceJob, seed: int = 0) -> Iterator[ReferenceClient]:
    """A worker of the reference job, until the end of the context."""
    client = ReferenceClient(job)
    with mock.patch.object(session, "_connect", return_value=client):
        ps.init(slots=job.slots, seed=seed)
    try:
        yield client
    finally:
        ps.shutdown()


def dataset(samples: int = SAMPLES) -> TensorDataset:
    """Samples of six numbers in three classes, always the same."""
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(samples, 6, generator=generator)
    return TensorDataset(inputs, torch.arange(samples) % 3)


def network() -> nn.Sequential:
    """A small model with everything that needs care: BatchNorm and dropout."""
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
    )


def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """The loss of a batch."""
    inputs, targets = batch
    loss: Tensor = nn.functional.cross_entropy(model(inputs).float(), targets)
    return loss


def backward(loss: Tensor) -> None:
    """Backward, as scripts call it."""
    loss.backward()  # type: ignore[no-untyped-call] # torch's own has no types


def bare() -> nn.Sequential:
    """A small model that takes a single sample too: dropout, but no BatchNorm."""
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """All parameters."""
    return list(model.parameters())


def state_bits(model: nn.Module) -> dict[str, bytes]:
    """Every bit of parameters and buffers."""
    return {name: bits(value) for name, value in model.state_dict().items()}


def plain_batches(epoch: int, first_round: int = 0, seed: int = 0) -> Iterator[list[Tensor]]:
    """The batches of an epoch as a plain loop has them, torch seeded as for slot 0 of one slot."""
    data = dataset()
    order = permutation(len(data), seed, epoch)
    for number, indices in enumerate(torch.split(order, BATCH)):
        seed_for_compute(seed, first_round + number, 0)
        yield [data.tensors[0][indices], data.tensors[1][indices]]


def rounds_of(samples: int = SAMPLES) -> int:
    """Rounds of an epoch."""
    return -(-samples // BATCH)


def train(
    job: ReferenceJob,
    make: MakeOptimizer,
    build: Callable[[], nn.Module] = network,
    epochs: int = 2,
) -> dict[str, bytes]:
    """The plainest script on the reference job: every bit of the model it ends with."""
    with joined(job):
        model = build()
        optimizer = ps.DistributedOptimizer(make(parameters_of(model)), model)
        for epoch in range(epochs):
            for batch in ps.batches(dataset(), BATCH, epoch):
                optimizer.zero_grad()
                backward(loss_of(model, batch))
                optimizer.step()
        return state_bits(model)


def train_plainly(
    make: MakeOptimizer, build: Callable[[], nn.Module] = network, epochs: int = 2
) -> dict[str, bytes]:
    """The same script without a parameter server."""
    model = seeded(build)
    optimizer = make(parameters_of(model))
    for epoch in range(epochs):
        for batch in plain_batches(epoch, epoch * rounds_of()):
            optimizer.zero_grad()
            backward(loss_of(model, batch))
            optimizer.step()
    return state_bits(model)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, whose weight decay shows whether a parameter was left alone."""
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def adagrad(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Adagrad."""
    return torch.optim.Adagrad(parameters, lr=0.05)


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The model that a script builds after ``ps.init``."""
    seed_all(seed)
    return build()
