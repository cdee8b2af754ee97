"""Time per step with and without overlap, where the exchange takes as long as the computation.

    python -m bench.overlap [--windows 5] [--steps 6] [--workers 2] [--forward-share 0.33]

Run from the root of the repository. The model has layers of 1 MiB, each of which sleeps in forward
and in backward, so that the cores are not the limit. What a member sends over each connection is
capped (``lane_bytes_per_s``) at 1 Gbit/s and at 100 Mbit/s; the model's bytes over the cap are the
exchange, and forward and backward together sleep just as long. Every worker computes one slot, with
one server. The three clusters of a cap, without overlap, with that of backward and with both, take
turns. ``times`` is how much shorter a step is than without, the median over turns. The layers count
the rounds; a wrong count ends the benchmark. The last line is JSON.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from typing import cast

from bench._harness import (
    SETTLE_STEPS,
    WINDOWS_MIN,
    Cluster,
    Spread,
    Window,
    machine,
    opened,
    print_document,
    print_table,
    ratio,
    staged,
    start,
    take_turns,
)
from bench._link import BenchError
from bench._overlap_worker import LAYER, Load

CAPS = {"1 Gbit/s": (125_000_000, 24), "100 Mbit/s": (12_500_000, 6)}
"""Bytes per second, and layers of the model."""
OVERLAPS: dict[str, bool | str] = {"none": False, "backward": "backward", "both": True}


def measure(cap: str, options: argparse.Namespace) -> dict[str, object]:
    """Measure the three clusters of one cap."""
    per_s, layers = CAPS[cap]
    exchange_ms = 1e3 * layers * LAYER * 4 / per_s
    forward_ms = exchange_ms * options.forward_share
    flags: dict[str, object] = {"servers": 1, "slots": options.workers, "transport": "tcp"}
    flags |= {"lane-bytes-per-s": per_s}
    clusters = []
    for name, overlap in OVERLAPS.items():
        work = Load(layers, forward_ms, exchange_ms - forward_ms, overlap, options.workers)
        clusters.append(Cluster(name, "bench._overlap_worker", work.dump(), options.workers, flags))
    with staged() as stage, opened(clusters, stage):
        found = take_turns(clusters, options.windows, options.steps)
        for cluster in clusters:
            rounds = options.windows * (options.steps + SETTLE_STEPS)
            counted = cast("list[list[float]]", cluster.question("rounds"))
            if any(count != rounds + SETTLE_STEPS for pair in counted for count in pair):
                raise BenchError(f"{cluster.name} counted {counted} rounds, not {rounds}")
    return {
        "cap": cap,
        "exchange_ms": round(exchange_ms, 1),
        "forward_ms": round(forward_ms, 1),
        "steps": {name: figures(found, name, options.steps) for name in OVERLAPS},
        "machine": machine(found),
    }


def figures(found: dict[str, list[Window]], name: str, steps: int) -> dict[str, object]:
    """What the windows of one cluster say."""
    times = [1e3 * window.seconds / steps for window in found[name]]
    without = [1e3 * window.seconds / steps for window in found["none"]]
    return {
        "ms": Spread.of(times).document(1),
        "times": round(ratio(without, times), 2),
        "elsewhere": round(statistics.median(window.elsewhere for window in found[name]), 2),
    }


def show(found: Sequence[dict[str, object]]) -> None:
    """Print the table."""
    rows = []
    for each in found:
        for name, step in cast("dict[str, dict[str, object]]", each["steps"]).items():
            spread = cast("dict[str, float]", step["ms"])
            shown = [f"{value:.1f}" for value in spread.values()]
            rows.append([f"{each['cap']}, {name}", *shown, str(step["times"])])
    print_table("a step whose exchange takes as long as its computation",
                ["overlap", "ms", "min", "max", "times"], rows)  # fmt: skip


def main() -> None:
    """Measure, and print."""
    options = parser().parse_args()
    if options.windows < WINDOWS_MIN:
        sys.exit(f"--windows must be at least {WINDOWS_MIN}")
    found = [measure(cap, options) for cap in CAPS]
    show(found)
    print_document({"windows": options.windows, "steps": options.steps, "caps": found})


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--windows", type=int, default=WINDOWS_MIN)
    made.add_argument("--steps", type=int, default=6, help="rounds of each window")
    made.add_argument("--workers", type=int, default=2)
    made.add_argument("--forward-share", type=float, default=1 / 3, help="of the computation")
    return made


if __name__ == "__main__":
    start(main)
