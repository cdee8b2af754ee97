"""Two workers push; the one of rank 1 goes on to something else before it waits for the round."""

import sys
from pathlib import Path

import torch

from treefold.common.spec import Hyper
from treefold.wire.words import Outcome
from treefold.worker import (
    Client,
    Dtype,
    OptimizerSpec,
    Placement,
    Rule,
    TableSpec,
    TensorSpec,
    load,
)

ELEMENTS = 10
GROUPS: list[Hyper] = [{"lr": 1.0}]


def main(gate: str) -> None:
    """One round. Who is in it is said by both."""
    tensor = TensorSpec("w", [ELEMENTS], Dtype.FLOAT32, 0)
    optimizer = OptimizerSpec("SGD", GROUPS)
    spec = TableSpec("few", Rule.OPTIMIZER, Placement.ELEMENTWISE, [tensor], optimizer)
    client = Client(load({}).settings)
    client.declare(spec, torch.zeros(ELEMENTS))
    pushed = client.push(0, torch.ones(ELEMENTS), GROUPS)
    if client.rank == 1:
        Path(gate).open("rb").close()  # something else
    client.wait(pushed)
    sys.stdout.write(f"waited {client.pull(0).tolist()}\n")
    client.leave(Outcome.DONE, "")


if __name__ == "__main__":
    main(sys.argv[1])
