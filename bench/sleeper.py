"""A worker whose compute is a sleep: what `bench.stragglers` measures without need of many cores.

Prints the monotonic time at which it begins each round that it takes part in.
"""

import argparse
import time

import torch

from treefold.common.plan import LoopPlan, PlanKind
from treefold.wire.words import Outcome
from treefold.worker import (
    Client,
    Dtype,
    OptimizerSpec,
    PartRun,
    Placement,
    Rule,
    SlotMeta,
    TableSpec,
    Task,
    TensorSpec,
    Values,
    load,
)

ELEMENTS = 4_096


def main() -> None:
    """Take part in the given number of rounds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--slot-ms", type=float, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    chosen = parser.parse_args()
    settings = load({}).settings
    client = Client(settings)
    tensor = TensorSpec("weights", [ELEMENTS], Dtype.FLOAT32, 0)
    optimizer = OptimizerSpec("SGD", [{"lr": 0.1}])
    spec = TableSpec("model", Rule.OPTIMIZER, Placement.ELEMENTWISE, [tensor], optimizer)
    client.declare(spec, torch.zeros(ELEMENTS)).release()
    slots, rounds = settings.slots, chosen.rounds
    client.enter_loop(
        LoopPlan(PlanKind.SLOTS, 0, 0, rounds, slots, rounds * slots, slots, 0, False, 0)
    )
    seen = -1
    while isinstance(task := client.next_task(), Task):
        if task.round != seen:
            print(f"round {task.round} at {time.monotonic_ns()}", flush=True)
            seen = task.round
        time.sleep(chosen.slot_ms / 1e3)
        contribute(client, task, 1.0 / slots)
    client.leave(Outcome.DONE, "")


def contribute(client: Client, task: Task, share: float) -> None:
    """Push a slot whose gradient is all ones."""
    for snapshot in task.snapshots:
        snapshot.release()
    values = client.scratch(ELEMENTS).fill_(share)
    where = PartRun(0, 0, len(client.parts(0)), [])
    client.contribute(task, where, Values(values, 1.0, values))
    client.finish_slot(task, {0: SlotMeta([{"lr": 0.1}], 0.0, b"")})


if __name__ == "__main__":
    main()
