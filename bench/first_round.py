"""A worker that trains one round of a tiny model: what `bench.startup` waits for.

Prints the monotonic time, in nanoseconds, at which the round was over.
"""

import time

import torch

import treefold.torch as ps

FEATURES, CLASSES, BATCH = 4, 2, 16


def main() -> None:
    """Train one round."""
    ps.init()
    model = torch.nn.Linear(FEATURES, CLASSES)
    optimizer = ps.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    samples = torch.utils.data.TensorDataset(
        torch.randn(BATCH, FEATURES), torch.randint(CLASSES, (BATCH,))
    )
    for x, y in ps.batches(samples, batch_size=BATCH, epoch=0):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call] # torch's own has no types
        optimizer.step()
    print(f"ready at {time.monotonic_ns()}", flush=True)


if __name__ == "__main__":
    main()
