"""Rounds per second and traffic as workers and servers are added, with computation that sleeps.

    python -m bench.scale [--workers 1,2,4,8] [--servers 1,2,4] [--slots 8] [--slot-ms 40]
                          [--windows 5] [--steps 10] [--lane socket|auto]

Run from the root of the repository. A round is so many slots, each of which sleeps; then it pushes
the gradient of 524,288 parameters (2 MiB). One cluster after the other is started with ``treefold
run``, every number of workers with every number of servers, and one with four times the slots.
``of ideal`` compares the rounds with the time that the busiest worker sleeps; ``bytes`` are what a
worker sends to servers and receives from them per round, headers and what lies in shared memory
included, ``shared`` the latter alone; ``at server`` is what a server sends and receives, in sizes
of the model; ``messages`` are a worker's per round with servers; ``control`` are its messages per
second with the scheduler, heartbeats and their answers among them; ``server ms`` is what all
servers together compute per round. The parameters at the end count the rounds; a wrong count ends
the benchmark. The last line is JSON.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import cast

from bench._harness import (
    SETTLE_STEPS,
    WINDOWS_MIN,
    Cluster,
    Spread,
    Window,
    lane_flags,
    machine,
    opened,
    print_document,
    print_table,
    rates,
    staged,
    start,
    take_turns,
)
from bench._link import BenchError
from bench._scale_worker import PARAMETERS, Load

MODEL_BYTES = PARAMETERS * 4
MORE_SLOTS = 4
MANY = (2, 2)  # workers and servers of the cluster with more slots
Spent = dict[str, dict[str, float]]


def measure(work: Load, effort: tuple[int, int], lane: str) -> dict[str, object]:
    """Measure one cluster."""
    windows, steps = effort
    name = f"{work.workers} workers, {work.servers} servers"
    flags: dict[str, object] = {"servers": work.servers, "slots": work.slots}
    flags |= {"transport": "tcp" if lane == "socket" else "ipc"} | lane_flags(lane)
    cluster = Cluster(name, "bench._scale_worker", work.dump(), work.workers, flags)
    with staged() as stage, opened([cluster], stage):
        before = cast("Spent", cluster.question("servers")[0])
        found = take_turns([cluster], windows, steps)
        after = cast("Spent", cluster.question("servers")[0])
        counted = cluster.question("rounds")
    rounds = windows * (steps + SETTLE_STEPS)
    if any(count != rounds + 2 for count in counted):
        raise BenchError(f"{name} counted {counted} rounds, not {rounds + 2}")
    busy_s = sum(sum(spent.values()) for spent in after.values())
    busy_s -= sum(sum(spent.values()) for spent in before.values())
    return (
        asdict(work)
        | figures(work, found[name], steps)
        | {
            "server_ms_per_round": round(1e3 * busy_s / rounds, 3),
            "machine": machine(found),
        }
    )


def figures(work: Load, windows: Sequence[Window], steps: int) -> dict[str, object]:
    """What the windows of one cluster say."""
    per_second = rates(windows, steps)
    ideal = 1e3 / (work.slot_ms * math.ceil(work.slots / work.workers))
    ways = {what: f"{what}_shared_bytes" for what in ("sent", "received")}
    shared = {what: typical(windows, key) / steps for what, key in ways.items()}
    per_round = {
        what: typical(windows, f"{what}_bytes") / steps + nbytes for what, nbytes in shared.items()
    }
    both = sum(per_round.values())
    control = typical(windows, "control_messages")
    seconds = statistics.median(window.seconds for window in windows)
    return {
        "rounds_per_s": Spread.of(per_second).document(),
        "of_ideal": round(statistics.median(per_second) / ideal, 3),
        "sent_models_per_round": round(per_round["sent"] / MODEL_BYTES, 4),
        "received_models_per_round": round(per_round["received"] / MODEL_BYTES, 4),
        "bytes_per_round": round(both),
        "shared_bytes_per_round": round(sum(shared.values())),
        "server_models_per_round": round(both * work.workers / work.servers / MODEL_BYTES, 4),
        "messages_per_round": round(typical(windows, "messages") / steps, 2),
        "control_messages_per_s": round(control / seconds, 2),
    }


def typical(windows: Sequence[Window], what: str) -> float:
    """The median over windows of the mean over workers of a count."""
    counts = [
        [cast("dict[str, int]", answer["value"])[what] for answer in window.answers]
        for window in windows
    ]
    return statistics.median(statistics.mean(each) for each in counts)


def show(found: Sequence[dict[str, object]]) -> None:
    """Print the table."""
    columns = {
        "workers": "workers", "servers": "servers", "slots": "slots", "of ideal": "of_ideal",
        "bytes": "bytes_per_round", "shared": "shared_bytes_per_round",
        "at server": "server_models_per_round", "messages": "messages_per_round",
        "control": "control_messages_per_s", "server ms": "server_ms_per_round",
    }  # fmt: skip
    rows = []
    for each in found:
        spread = cast("dict[str, float]", each["rounds_per_s"])
        row = [str(each[key]) for key in columns.values()]
        row[3:3] = [f"{value:.2f}" for value in spread.values()]
        rows.append(row)
    titles = list(columns)
    titles[3:3] = ["rounds/s", "min", "max"]
    print_table("clusters whose computation sleeps", titles, rows)


def main() -> None:
    """Measure, and print."""
    options = parser().parse_args()
    if options.windows < WINDOWS_MIN:
        sys.exit(f"--windows must be at least {WINDOWS_MIN}")
    workers, servers = (
        [int(count) for count in text.split(",")] for text in (options.workers, options.servers)
    )
    sizes = [(each, several) for several in servers for each in workers]
    loads = [Load(*size, options.slots, options.slot_ms) for size in sizes]
    loads.append(Load(*MANY, options.slots * MORE_SLOTS, options.slot_ms / MORE_SLOTS))
    effort = options.windows, options.steps
    found = [measure(work, effort, options.lane) for work in loads]
    show(found)
    print_document({"windows": options.windows, "steps": options.steps, "clusters": found})


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--workers", default="1,2,4,8")
    made.add_argument("--servers", default="1,2,4")
    made.add_argument("--slots", type=int, default=8)
    made.add_argument("--slot-ms", type=float, default=40.0, help="how long a slot sleeps")
    made.add_argument("--windows", type=int, default=WINDOWS_MIN)
    made.add_argument("--steps", type=int, default=10, help="rounds of each window")
    made.add_argument("--lane", choices=("socket", "auto"), default="socket")
    return made


if __name__ == "__main__":
    start(main)
