"""A worker of `bench.failover`: trains one large tensor, and says when it begins each round.

A round that a worker begins is one whose version is complete: all of its shards were published, and
are here.
"""

import argparse
import time

import torch
from torch import nn
from torch.utils.data import TensorDataset

import treefold.torch as ps

ROUNDS = 100_000  # more than any run takes: who measures ends it


def main() -> None:
    """Train until this process is killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parameters", type=int, required=True)
    parser.add_argument("--slot-ms", type=float, required=True, help="how long a body sleeps")
    parser.add_argument("--slots", type=int, required=True)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    ps.init()
    model = nn.Linear(chosen.parameters, 1, bias=False)
    optimizer = ps.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model)
    samples = TensorDataset(torch.arange(ROUNDS * chosen.slots) % 7 - 3.0)
    seen = -1
    for (sample,) in ps.batches(samples, batch_size=chosen.slots):
        if ps.round() != seen:
            seen = ps.round()
            print(f"round {seen} at {time.monotonic_ns()}", flush=True)
        time.sleep(chosen.slot_ms / 1e3)
        optimizer.zero_grad()
        torch.autograd.backward(model.weight.sum() * sample[0])
        optimizer.step()


if __name__ == "__main__":
    main()
