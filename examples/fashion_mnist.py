"""Fashion-MNIST (60,000 images of clothes): a small CNN with BatchNorm and a cosine learning rate.

    sudo apt-get install dataset-fashion-mnist
    python examples/fashion_mnist.py
    treefold run --servers 2 --workers 4 examples/fashion_mnist.py

With ``--data DIR`` the files may lie anywhere.
"""

import argparse
import gzip
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import treefold.torch as ps

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def read_idx(file: Path) -> Tensor:
    """One IDX file: two zero bytes, a type, the number of dimensions, their sizes, the bytes."""
    if not file.is_file():
        sys.exit(
            f"{file} is not there: install Debian's package dataset-fashion-mnist, or pass "
            "--data with a folder that has the four .gz files of Fashion-MNIST"
        )
    data = gzip.decompress(file.read_bytes())
    sizes = [int.from_bytes(data[at : at + 4], "big") for at in range(4, 4 + 4 * data[3], 4)]
    return torch.frombuffer(bytearray(data[4 + 4 * data[3] :]), dtype=torch.uint8).view(sizes)


def read(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Images, float32 [n, 1, 28, 28], and labels, int64 [n]."""
    images = read_idx(folder / f"{name}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{name}-labels-idx1-ubyte.gz")
    return images.unsqueeze(1).float() / 255, labels.long()


def make_model() -> nn.Module:
    """Two convolutions with BatchNorm, one linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 10),
    )


def main() -> None:
    """Train, then measure on the test images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DEBIAN, help="folder of the four .gz files")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=512, help="samples of a whole round")
    options = parser.parse_args()
    x, y = read(options.data, "train")
    x_test, y_test = read(options.data, "t10k")
    dataset = TensorDataset(x, y)

    ps.init()
    model = make_model()
    loss_fn = nn.CrossEntropyLoss()
    optimizer = ps.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=4e-3), model)
    rounds = options.epochs * -(-len(dataset) // options.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rounds)
    for epoch in range(options.epochs):
        model.train()
        for inputs, targets in ps.batches(dataset, batch_size=options.batch_size, epoch=epoch):
            optimizer.zero_grad()
            loss_fn(model(inputs), targets).backward()
            optimizer.step()
            schedule.step()

        if ps.is_chief():
            model.eval()
            with torch.no_grad():
                guesses = torch.cat([model(part).argmax(1) for part in x_test.chunk(10)])
            accuracy = (guesses == y_test).float().mean().item()
            print(f"epoch {epoch}: test accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
