"""An asynchronous table of the low-level client, read with the same contributions in all shards.

Both halves of the table get the same gradients, and every sum is exact: shards add in orders of
their own, so with any rounding the same contributions would not be the same bits. A quarter is
exact, so this is for four workers. The last line says how the reads were.
"""

import sys
from collections import Counter

import torch

from treefold.common.spec import Consistency, ConsistencyKind, Hyper
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

HALF, ROUNDS = 140_000, 15
GROUPS: list[Hyper] = [{"lr": 1.0}]


def main() -> None:
    """Push, and read after every push."""
    tensor = TensorSpec("w", [2 * HALF], Dtype.FLOAT32, 0)
    kind = Consistency(ConsistencyKind.ASYNC)
    optimizer = OptimizerSpec("SGD", GROUPS)
    spec = TableSpec(
        "halves", Rule.OPTIMIZER, Placement.ELEMENTWISE, [tensor], optimizer, consistency=kind
    )
    client = Client(load({}).settings)
    client.declare(spec, torch.zeros(2 * HALF))
    found: Counter[str] = Counter()
    for number in range(ROUNDS):
        half = torch.full((HALF,), float(number * (1 + client.rank)))
        client.wait(client.push(0, torch.cat([half, half]), GROUPS))
        read = client.pull(0, consistent=True)
        found["alike" if read[:HALF].equal(read[HALF:]) else "torn"] += 1
    sys.stdout.write(f"final {dict(found)}\n")
    client.leave(Outcome.DONE, "")


if __name__ == "__main__":
    main()
