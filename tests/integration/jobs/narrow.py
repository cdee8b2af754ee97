"""A job whose tensors travel in a narrow type; with ``--alone``, the same by plain PyTorch.

The plain loop has no cluster and none of its code but the order of the samples: it rounds every
gradient, every sum of two and the parameters that it computes with, and steps float32.
"""

import argparse
import hashlib
import sys

import torch
from torch import Tensor, nn

import treefold.torch as ps
from treefold.torch.randomness import permutation

SLOTS, BATCH, SAMPLES, EPOCHS = 4, 32, 96, 2
FEATURES, HIDDEN, CLASSES = 64, 1_024, 70  # the second layer has parts of its own
WIRES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def network() -> nn.Sequential:
    """A model with buffers, always the same."""
    torch.manual_seed(11)
    return nn.Sequential(
        nn.Linear(FEATURES, HIDDEN),
        nn.BatchNorm1d(HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, CLASSES),
    )


def samples() -> tuple[Tensor, Tensor]:
    """Inputs and targets, always the same."""
    made = torch.Generator().manual_seed(5)
    return torch.randn(SAMPLES, FEATURES, generator=made), torch.arange(SAMPLES) % CLASSES


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """What trains it."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def on_cluster(wire: str) -> dict[str, Tensor]:
    """The plain loop on a cluster."""
    ps.init()
    model = network()
    optimizer = ps.DistributedOptimizer(adamw(model), model, overlap=True, wire=wire)
    dataset = torch.utils.data.TensorDataset(*samples())
    for epoch in range(EPOCHS):
        for inputs, targets in ps.batches(dataset, batch_size=BATCH, epoch=epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call] # torch's own has no types
            optimizer.step()
    state = ps.state_dict()
    ps.shutdown()
    return state


def fold(nodes: list[Tensor]) -> Tensor:
    """Neighbours first, then neighbours of those; every sum is rounded to the type of both."""
    while len(nodes) > 1:
        nodes = [left + right for left, right in zip(nodes[::2], nodes[1::2], strict=True)]
    return nodes[0]


def alone(wire: str) -> dict[str, Tensor]:
    """One process that rounds where a cluster does."""
    kind = WIRES[wire]
    model, master = network(), network()
    optimizer = adamw(master)
    x, y = samples()
    statistics = [b for b in model.buffers() if b.is_floating_point()]
    own = list(zip(model.parameters(), master.parameters(), strict=True))
    for epoch in range(EPOCHS):
        for indices in torch.split(permutation(SAMPLES, 0, epoch), BATCH):
            for parameter, wide in own:
                parameter.data.copy_(wide.data.to(kind))
            first = [buffer.clone() for buffer in statistics]
            gradients: list[list[Tensor]] = []
            moved: list[list[Tensor]] = []
            for part in indices.chunk(SLOTS):
                for buffer, value in zip(statistics, first, strict=True):
                    buffer.copy_(value)
                model.zero_grad()
                nn.functional.cross_entropy(model(x[part]), y[part]).backward()  # type: ignore[no-untyped-call] # torch's own has no types
                found = [p.grad for p in model.parameters() if p.grad is not None]
                gradients.append([(grad * (1 / SLOTS)).to(kind) for grad in found])
                moved.append([buffer * (1 / SLOTS) for buffer in statistics])
            for (_, wide), *nodes in zip(own, *gradients, strict=True):
                wide.grad = fold(nodes).float()
            for buffer, *shares in zip(statistics, *moved, strict=True):
                buffer.copy_(fold(shares))
            optimizer.step()
    for parameter, wide in own:
        parameter.data.copy_(wide.data.to(kind))
    return model.state_dict()


def main() -> None:
    """Train, and print a hash of all floats."""
    parser = argparse.ArgumentParser()
    parser.add_argument("wire", choices=WIRES)
    parser.add_argument("--alone", action="store_true")
    chosen = parser.parse_args()
    state = alone(chosen.wire) if chosen.alone else on_cluster(chosen.wire)
    hashed = hashlib.sha256()
    for name, value in sorted(state.items()):
        if value.is_floating_point():
            hashed.update(name.encode() + value.numpy().tobytes())
    sys.stdout.write(f"final {hashed.hexdigest()}\n")


if __name__ == "__main__":
    main()
