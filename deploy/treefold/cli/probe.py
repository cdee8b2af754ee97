"""One push and pull round trip with a known result: what `treefold doctor` tries.

``python -m treefold.cli.probe`` is the worker of the trial with real processes.
"""

import sys

import torch

from treefold.common.config import load
from treefold.common.errors import DataError
from treefold.common.optim import describe
from treefold.common.spec import Dtype, Placement, Rule, TableSpec, TensorSpec
from treefold.wire.words import Outcome
from treefold.worker.client import Client

ELEMENTS = 100_000  # more than one block, so that two shards are possible
LEARNING_RATE = 0.5
ANSWER = "round trip"


def round_trip(client: Client) -> str:
    """Push a gradient, wait for its round, pull, and compare.

    Parameters
    ----------
    client : Client
        A fresh connection; it is closed afterwards.

    Returns
    -------
    str
        What was tried.

    Raises
    ------
    DataError
        What came back is not what plain torch computes.
    """
    initial = torch.arange(ELEMENTS, dtype=torch.float32)
    gradient = torch.linspace(-1.0, 1.0, ELEMENTS)
    optimizer = torch.optim.SGD([torch.nn.Parameter(initial.clone())], lr=LEARNING_RATE)
    described = describe(optimizer)
    tensor = TensorSpec("weight", [ELEMENTS], Dtype.FLOAT32, 0)
    spec = TableSpec("probe", Rule.OPTIMIZER, Placement.ELEMENTWISE, [tensor], described)
    table = client.declare(spec, initial).table
    client.wait(client.push(table, gradient, described.groups))
    found = client.pull(table)
    client.leave(Outcome.DONE, "")
    expected = initial - LEARNING_RATE * gradient
    if not torch.equal(found, expected):
        worst = (found - expected).abs().max().item()
        raise DataError(f"the pulled values differ from plain torch's by up to {worst}")
    return f"{ANSWER} of {ELEMENTS:,} elements, equal to plain torch bit for bit"


def main() -> int:
    """Try it on the cluster that the environment names.

    Returns
    -------
    int
        0.
    """
    settings = load({}).settings
    sys.stdout.write(round_trip(Client(settings)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
