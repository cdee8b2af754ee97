"""A small job whose rounds a test lets through step by step, wherever its workers run.

Every ``STEP`` rounds it waits until a file says that the next ones may be computed. At the end each
worker prints a hash of every parameter and buffer. Without a folder nothing waits.
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

SAMPLES, BATCH_SIZE, EPOCHS = 160, 32, 20
STEP = 10  # rounds; there are SAMPLES / BATCH_SIZE * EPOCHS = 100
WIDTH = 400  # three shards
LOOK_S = 0.02


def main() -> None:
    """Train, waiting where told to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gates", type=Path, help="folder where the file of each step appears")
    gates = parser.parse_args().gates
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 64, generator=generator)
    y = torch.randint(10, (SAMPLES,), generator=generator)
    ps.init(slots=8, seed=3)
    model = nn.Sequential(
        nn.Linear(64, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Dropout(0.1),
        nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10),
    )  # fmt: skip
    optimizer = ps.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model)
    loss_fn = nn.CrossEntropyLoss()
    for epoch in range(EPOCHS):
        for inputs, targets in ps.batches(TensorDataset(x, y), batch_size=BATCH_SIZE, epoch=epoch):
            step = ps.round() // STEP
            while gates is not None and not (gates / str(step)).exists():
                time.sleep(LOOK_S)
            optimizer.zero_grad()
            loss_fn(model(inputs), targets).backward()
            optimizer.step()
    state = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    sys.stdout.write(f"final {hashlib.sha256(state).hexdigest()[:16]}\n")


if __name__ == "__main__":
    main()
