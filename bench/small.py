"""What a round costs that moves next to nothing, in echoes of bare ZeroMQ.

    python -m bench.small [--windows 7] [--steps 200]

Run from the root of the repository. Measured in turns: a DEALER that waits for a ROUTER to send 64
bytes back (``echo``); rounds of a model with 10,000 parameters, 1 server and 2 workers that have
their gradients ready, as a bare ZeroMQ program (``zmq``) and on treefold (``round``); and the round
trip of a slot without any gradient, 1 server and 1 worker with the low-level client (``push``).
Each over ipc, where treefold takes its shared-memory
lane, and over tcp with treefold's socket lane. ``echoes`` is how many echoes of the same transport
fit into one round. The parameters at the end count the rounds; a wrong count ends the benchmark.
The last line is JSON.
"""

import argparse
import sys
from collections.abc import Sequence

from bench._dense_work import Work
from bench._dense_zmq import bare_zmq
from bench._harness import (
    SETTLE_STEPS,
    WINDOWS_MIN,
    Cluster,
    Contender,
    Spread,
    lane_flags,
    machine,
    opened,
    print_document,
    print_table,
    rates,
    ratio,
    staged,
    start,
    take_turns,
)
from bench._link import BenchError
from bench._small_parts import echo

LANES = {"ipc": "auto", "tcp": "socket"}
WORKERS = {"round": 2, "push": 1}


def contenders(folder: str) -> list[Contender]:
    """Everybody."""
    made: list[Contender] = [echo(transport, folder) for transport in LANES]
    bare = Work(shape="10k", workers=WORKERS["round"], servers=1)
    made += [bare_zmq(bare, transport, folder) for transport in LANES]
    for what, workers in WORKERS.items():
        for transport, lane in LANES.items():
            flags: dict[str, object] = {"servers": 1, "transport": transport}
            flags |= lane_flags(lane)
            name = f"{what} {transport}"
            made.append(Cluster(name, "bench._small_parts", what, workers, flags))
    return made


def check(everybody: Sequence[Contender], steps: int) -> None:
    """Compare the rounds that treefold counted with those that were taken.

    Raises
    ------
    BenchError
        They differ.
    """
    for contender in everybody:
        if contender.name.split()[0] not in WORKERS:
            continue
        counted = contender.question("rounds")
        if any(rounds != steps for rounds in counted):
            raise BenchError(f"{contender.name} counted {counted} rounds, not {steps}")


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", type=int, default=7)
    parser.add_argument("--steps", type=int, default=200, help="rounds or echoes of each window")
    options = parser.parse_args()
    if options.windows < WINDOWS_MIN:
        sys.exit(f"--windows must be at least {WINDOWS_MIN}")
    with staged() as stage:
        everybody = contenders(stage.folder)
        with opened(everybody, stage):
            found = take_turns(everybody, options.windows, options.steps)
            check(everybody, 2 + options.windows * (options.steps + SETTLE_STEPS))
    per_second = {name: rates(windows, options.steps) for name, windows in found.items()}
    rows, results = [], {}
    for name, values in per_second.items():
        spread = Spread.of(values)
        echoes = ratio(per_second[f"echo {name.split()[1]}"], values)
        figures = [spread.median, spread.least, spread.most, 1e6 / spread.median]
        rows.append([name, *(f"{value:.0f}" for value in figures), f"{echoes:.2f}"])
        results[name] = {
            "per_s": spread.document(),
            "us": round(1e6 / spread.median, 1),
            "echoes": round(echoes, 2),
        }
    print_table("small rounds", ["", "per second", "min", "max", "us", "echoes"], rows)
    shape = {"steps": options.steps, "windows": options.windows}
    print_document(shape | {"results": results, "machine": machine(found)})


if __name__ == "__main__":
    start(main)
