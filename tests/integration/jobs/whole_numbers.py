"""Gradients are whole numbers, so that the parameters say exactly which samples were counted.

Every sample's gradient is a multiple of the number of slots and the learning rate is 1: after one
pass the parameters are minus the sum over all samples, exactly, if each counted once. While the
file that ``--slow`` names exists, every loop body takes a little while. With ``--beside`` half of
the parameters are in a table of another mode. The last line is a hash of the parameters.
"""

import argparse
import hashlib
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import treefold.torch as ps

SLOTS = 8
KINDS = 5  # kinds of samples, each with a gradient of its own


def gradient_of(kind: int, elements: int) -> torch.Tensor:
    """What samples of a kind contribute, before the mean over the slots."""
    places = torch.arange(elements, dtype=torch.int64)
    return ((places * (kind + 1) + kind) % 7 - 3) * SLOTS


def expected(samples: int, elements: int) -> torch.Tensor:
    """The parameters if every sample counted once."""
    total = torch.zeros(elements, dtype=torch.int64)
    for kind in range(KINDS):
        total += gradient_of(kind, elements) // SLOTS * len(range(kind, samples, KINDS))
    return -total


def main() -> None:
    """Train, and compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--elements", type=int, default=400_000)  # several shards
    parser.add_argument("--slow", type=Path, required=True)
    parser.add_argument("--pause-ms", type=float, default=10.0, help="how much slower a body is")
    parser.add_argument("--beside", default="", help="mode of a second table, if there is one")
    parser.add_argument("--passes", type=int, default=1)
    chosen = parser.parse_args()
    samples, elements = chosen.rounds * SLOTS, chosen.elements
    gradients = torch.stack([gradient_of(kind, elements) for kind in range(KINDS)]).float()
    ps.init(slots=SLOTS)
    sizes = [elements - elements // 2, elements // 2] if chosen.beside else [elements]
    weights = [nn.Linear(size, 1, bias=False) for size in sizes]
    for one in weights:
        nn.init.zeros_(one.weight)
    optimizers = [
        ps.DistributedOptimizer(
            torch.optim.SGD(one.parameters(), lr=1.0),
            one,
            consistency=chosen.beside if number else None,
        )
        for number, one in enumerate(weights)
    ]
    kinds = TensorDataset(torch.arange(samples) % KINDS)
    for epoch in range(chosen.passes):
        for number, (kind,) in enumerate(ps.batches(kinds, batch_size=SLOTS, epoch=epoch)):
            if number % 10 == 0:
                sys.stdout.write(f"body {number} of pass {epoch}\n")
            if chosen.slow.exists():
                time.sleep(chosen.pause_ms / 1e3)
            for optimizer in optimizers:
                optimizer.zero_grad()
            whole = torch.cat([one.weight[0] for one in weights])
            torch.autograd.backward((whole * gradients[kind[0]]).sum())
            for optimizer in optimizers:
                optimizer.step()
    found = torch.cat([one.weight.detach()[0] for one in weights])
    wrong = (found.to(torch.int64) != chosen.passes * expected(samples, elements)).sum().item()
    sys.stdout.write(f"final {'exact' if not wrong else f'{wrong}-of-{elements}-are-wrong'}\n")
    sys.stdout.write(f"bits {hashlib.sha256(found.numpy().tobytes()).hexdigest()}\n")


if __name__ == "__main__":
    main()
