"""Push, pull and wait with the low-level client; with ``--mistakes``, every wrong call first."""

import argparse
import hashlib
import sys
from collections.abc import Callable

import torch

from treefold.common.errors import TreefoldError
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
GROUPS: list[Hyper] = [{"lr": 0.1}]
ROUNDS = 5


def mistakes(client: Client) -> dict[str, Callable[[], object]]:
    """Calls that must be refused at once, by name."""
    right = torch.ones(ELEMENTS)
    return {
        "too short": lambda: client.push(0, right[:-1], GROUPS),
        "two-dimensional": lambda: client.push(0, right.view(2, 5), GROUPS),
        "another dtype": lambda: client.push(0, right.double(), GROUPS),
        "another number of groups": lambda: client.push(0, right, GROUPS * 2),
        "push to an unknown table": lambda: client.push(7, right, GROUPS),
        "pull of an unknown table": lambda: client.pull(7),
        "initial values": lambda: client.declare(spec_of("other"), right.half()),
        "a wait for nothing": lambda: client.wait(3),
    }


def spec_of(name: str) -> TableSpec:
    """A table with one tensor."""
    tensor = TensorSpec("w", [ELEMENTS], Dtype.FLOAT32, 0)
    optimizer = OptimizerSpec("SGD", GROUPS)
    return TableSpec(name, Rule.OPTIMIZER, Placement.ELEMENTWISE, [tensor], optimizer)


def say(text: str) -> None:
    """Print at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    """Make the mistakes, then train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mistakes", action="store_true")
    chosen = parser.parse_args()
    client = Client(load({}).settings)
    client.declare(spec_of("weights"), torch.zeros(ELEMENTS))
    for name, call in mistakes(client).items() if chosen.mistakes else ():
        try:
            call()
        except TreefoldError as error:
            say(f"{name}: {type(error).__name__}: {error}")
    for number in range(ROUNDS):
        client.wait(client.push(0, torch.full((ELEMENTS,), float(number)), GROUPS))
    values = client.pull(0)
    say(f"final {hashlib.sha256(values.numpy().tobytes()).hexdigest()}")
    client.leave(Outcome.DONE, "")


if __name__ == "__main__":
    main()
