"""The same small job several times over, under the same attack, with what stands it or does not.

With ``--attack=faults`` slot 1 sends NaN in round 3 and slot 6 a huge gradient in round 12; with
``--attack=signs`` slots 1 and 4 send their gradient with the opposite sign, and larger, in every
round, but for the table that is ``spared``. Every table trains a model of its own. What a version
is, is said at the beginning of every body; how well each model does, at the end.
"""

import argparse
import hashlib
import math
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

import treefold.torch as ps
from treefold.torch import session

FEATURES, HIDDEN, CLASSES = 32, 64, 4
SAMPLES, TESTED, BATCH_SIZE = 2_560, 1_000, 256
TABLES: dict[str, dict[str, dict[str, Any]]] = {
    "faults": {
        "off": {},
        "warn": {"health": ps.Health("warn", window=64, warmup=16)},
        "reject": {"health": ps.Health("reject", window=64, warmup=16)},
        "skip-round": {"health": ps.Health("skip-round", window=64, warmup=16)},
        "clip": {"health": ps.Health("clip", window=64, warmup=16)},
    },
    "signs": {
        "spared": {},
        "mean": {},
        "median": {"aggregation": "median"},
        "trimmed": {"aggregation": ps.TrimmedMean(0.25)},
        "krum": {"aggregation": ps.Krum(2)},
        "clipping": {"aggregation": ps.CenteredClipping()},
    },
}
FACTORS = {"faults": {(3, 1): math.nan, (12, 6): 1e6}}


def factor_of(attack: str, round_: int, slot: int) -> float:
    """What a slot's gradient is multiplied with."""
    if attack == "signs":
        return -20.0 if slot in (1, 4) else 1.0
    return FACTORS[attack].get((round_, slot), 1.0)


def net(seed: int) -> nn.Module:
    """A small network, the same for every table."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(FEATURES, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)
    )


def hash_of(values: dict[str, Tensor]) -> str:
    """A hash of parameters and buffers."""
    hashed = hashlib.sha256()
    for name, value in sorted(values.items()):
        hashed.update(name.encode() + value.numpy().tobytes())
    return hashed.hexdigest()


def say(text: str) -> None:
    """Print at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    """Train, then measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--attack", choices=TABLES, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--sleep-ms", type=float, default=0.0, help="in every loop body")
    chosen = parser.parse_args()
    torch.manual_seed(5)
    x = torch.randn(SAMPLES + TESTED, FEATURES)
    y = (x @ torch.randn(FEATURES, CLASSES)).argmax(1)
    dataset = torch.utils.data.TensorDataset(x[:SAMPLES], y[:SAMPLES])
    ps.init()
    models = {name: net(11) for name in TABLES[chosen.attack]}
    trained = [
        ps.DistributedOptimizer(
            torch.optim.SGD(models[name].parameters(), lr=0.2, momentum=0.5), models[name], **rule
        )
        for name, rule in TABLES[chosen.attack].items()
    ]
    loss_of = nn.CrossEntropyLoss()
    for epoch in range(chosen.epochs):
        for inputs, targets in ps.batches(dataset, batch_size=BATCH_SIZE, epoch=epoch):
            task = session.current().task
            assert task is not None
            say(f"round {task.round} slot {task.slot}")
            time.sleep(chosen.sleep_ms / 1e3)
            for name, model in models.items():
                parameters = {key: value.detach() for key, value in model.named_parameters()}
                say(f"values {task.round} {name} {hash_of(parameters)}")
            for optimizer in trained:
                optimizer.zero_grad()
            attack = factor_of(chosen.attack, task.round, task.slot)
            for name, model in models.items():
                factor = 1.0 if name == "spared" else attack
                (factor * loss_of(model(inputs), targets)).backward()
            for optimizer in trained:
                optimizer.step()
    values = ps.state_dict()
    for name, model in zip(TABLES[chosen.attack], models.values(), strict=True):
        model.eval()
        with torch.no_grad():
            right = (model(x[SAMPLES:]).argmax(1) == y[SAMPLES:]).float().mean().item()
        say(f"accuracy {name} {right:.4f}")
    say(f"final {hash_of(values)}")


if __name__ == "__main__":
    main()
