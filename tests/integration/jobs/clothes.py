"""Trains a small network on some of Fashion-MNIST, and says how well it does and how fast it was.

With ``--pause-ms`` every loop body takes so much longer, as on a slow machine. The last lines are
the accuracy on test images, a hash of the parameters, and samples per second of the whole job.
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
from examples.fashion_mnist import read

SAMPLES, TESTED, BATCH = 8_192, 2_000, 64


def main() -> None:
    """Train, then measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--pause-ms", type=float, default=2.0)
    chosen = parser.parse_args()
    images, labels = (values[:SAMPLES] for values in read(chosen.data, "train"))
    ps.init()
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ps.DistributedOptimizer(inner, model)
    # Small steps at the end: with 0.1 to the last, accuracies of seeds differ by up to 0.035.
    rounds = chosen.epochs * SAMPLES // BATCH
    schedule = torch.optim.lr_scheduler.LinearLR(inner, 1.0, 0.05, total_iters=rounds)
    dataset, loss_fn = TensorDataset(images, labels), nn.CrossEntropyLoss()
    began = time.perf_counter()
    for epoch in range(chosen.epochs):
        for inputs, targets in ps.batches(dataset, batch_size=BATCH, epoch=epoch):
            time.sleep(chosen.pause_ms / 1e3)
            optimizer.zero_grad()
            torch.autograd.backward(loss_fn(model(inputs), targets))
            optimizer.step()
            schedule.step()
    took_s = time.perf_counter() - began
    tested, known = (values[:TESTED] for values in read(chosen.data, "t10k"))
    with torch.no_grad():
        accuracy = (model(tested).argmax(1) == known).float().mean().item()
    hashed = hashlib.sha256()
    for value in ps.state_dict().values():
        hashed.update(value.numpy().tobytes())
    rate = SAMPLES * chosen.epochs / took_s
    sys.stdout.write(f"accuracy {accuracy:.4f} at {rate:.0f} samples/s\n")
    sys.stdout.write(f"final {hashed.hexdigest()}\n")


if __name__ == "__main__":
    main()
