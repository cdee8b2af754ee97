"""A model of eight million parameters, with stops before it is made and after the last round.

Everything that a process needs once, such as kernels that are loaded when they are first used, has
been used before the first stop. Prints how much private memory the last loop body had beyond that.
"""

import argparse
import sys
import threading
from pathlib import Path

import torch
from torch import nn

import treefold.torch as ps

WIDTH, LAYERS = 1024, 24
BATCH, ROUNDS = 16, 5


def stop(text: str, path: str) -> None:
    """Say where this is, and wait until somebody opens the gate."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
    with open(path, "rb"):  # noqa: PTH123 # until somebody opens it for writing
        return


def network(width: int) -> nn.Sequential:
    """Linear layers without anything between them."""
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS)))


def warm_up() -> None:
    """Use everything once, with a small model."""
    model = network(64)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model(torch.randn(BATCH, 64)).square().mean().backward()


def private_bytes() -> int:
    """Resident memory of this process that is neither shared nor of a file."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    [line] = [line for line in text.splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


def main() -> None:
    """The plain loop, between two stops."""
    parser = argparse.ArgumentParser()
    parser.add_argument("first")
    parser.add_argument("last")
    parser.add_argument("--in-place", action="store_true")
    chosen = parser.parse_args()
    warm_up()
    before = private_bytes()
    stop("before", chosen.first)
    torch.manual_seed(3)
    model = network(WIDTH)
    inner = torch.optim.AdamW(model.parameters(), lr=1e-4)
    optimizer = ps.DistributedOptimizer(inner, model, in_place=chosen.in_place)
    dataset = torch.utils.data.TensorDataset(torch.randn(BATCH * ROUNDS, WIDTH))
    within = 0
    for (inputs,) in ps.batches(dataset, batch_size=BATCH, policy="static"):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
        within = private_bytes() - before
    sys.stdout.write(f"within {within}\n")
    stop("after", chosen.last)


if __name__ == "__main__":
    ps.init()
    main()
    ps.shutdown()
    for thread in threading.enumerate():
        if thread.name.startswith("treefold"):
            thread.join()
