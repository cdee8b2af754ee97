"""Whole numbers as in ``whole_numbers.py``, pass after pass until a file says which is the last.

Every loop body says which round it is in before it does anything. While the file that ``--slow``
names exists, bodies take a little while, so that whoever writes the file can be well ahead.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import treefold.torch as ps
from tests.integration.jobs.whole_numbers import KINDS, SLOTS, expected, gradient_of

ROUNDS = 10  # of a pass
SAMPLES = ROUNDS * SLOTS
ELEMENTS = 280_000  # four shards


def main() -> None:
    """Train until the last pass is over, and compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--last", type=Path, required=True, help="file with the last pass's number")
    parser.add_argument("--slow", type=Path, required=True)
    chosen = parser.parse_args()
    gradients = torch.stack([gradient_of(kind, ELEMENTS) for kind in range(KINDS)]).float()
    ps.init(slots=SLOTS)
    weights = nn.Linear(ELEMENTS, 1, bias=False)
    nn.init.zeros_(weights.weight)
    optimizer = ps.DistributedOptimizer(torch.optim.SGD(weights.parameters(), lr=1.0), weights)
    kinds = TensorDataset(torch.arange(SAMPLES) % KINDS)
    passes = 0
    for number in itertools.count():
        if chosen.last.exists() and number > int(chosen.last.read_text(encoding="ascii")):
            break
        for (kind,) in ps.batches(kinds, batch_size=SLOTS, epoch=number):
            sys.stdout.write(f"round {ps.round()}\n")
            if chosen.slow.exists():
                time.sleep(0.01)
            ps.log("passes", passes)
            optimizer.zero_grad()
            torch.autograd.backward((weights.weight[0] * gradients[kind[0]]).sum())
            optimizer.step()
        passes = number + 1
    found = weights.weight.detach()[0].to(torch.int64)
    wrong = (found != passes * expected(SAMPLES, ELEMENTS)).sum().item()
    verdict = "exact" if not wrong else f"{wrong}-of-{ELEMENTS}-are-wrong"
    sys.stdout.write(f"final {verdict} after {passes} passes\n")


if __name__ == "__main__":
    main()
