"""Steps per second of a dense exchange, beside its floor and its peers.

    python -m bench.dense [--shape standard|small] [--optimizer sgd|adamw]
                          [--wire float32|bfloat16] [--workers 2] [--servers 2]
                          [--windows 5] [--steps 20] [--launches 1]
                          [--contenders "floor,lean floor,gloo,rpc,zmq tcp,zmq ipc,
                                         shared,in place,tcp,ipc"]
    python -m bench.dense --all

Run from the root of the repository. The work is that of `bench._dense_work`: 25 million float32
parameters, gradients ready, synchronous steps. The contenders, each in processes with one thread:

- ``floor``: the same fold, optimizer and copies by plain torch calls, spread over the processors;
- ``lean floor``: the fewest passes over memory that give the step, likewise;
- ``gloo``: ``torch.distributed`` all-reduce of one flat tensor, then a local step;
- ``rpc``: a parameter server on ``torch.distributed.rpc``;
- ``zmq tcp``, ``zmq ipc``: a bare ZeroMQ program that moves the same bytes;
- ``shared``, ``tcp``, ``ipc``: treefold under ``treefold run``, by its lane;
- ``in place``: as ``shared``, with parameters used where servers keep them.

They stay, and take their windows in turns; ``--launches`` starts all anew so many times, since one
launch can be luckier than another. Everybody's final parameters are compared with torch's
own; a wrong result ends the benchmark. ``--all`` measures the variations as well: AdamW, bfloat16
on the wire, 1 and 4 workers, 1 server, 5,000 tensors of 5,000. The last line is JSON.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from bench._dense_peers import floor, gloo, is_rpc_available, rpc_server
from bench._dense_work import OPTIMIZERS, SHAPES, TOLERANCES, WIRES, Work, reference
from bench._dense_zmq import bare_zmq
from bench._harness import (
    SETTLE_STEPS,
    WINDOWS_MIN,
    Cluster,
    Contender,
    Spread,
    Window,
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
from treefold.worker.machine import processors

BOUNDS = {"tcp": "zmq tcp", "ipc": "zmq ipc"}
PEERS = ("floor", "lean floor", "gloo", "rpc", "zmq tcp", "zmq ipc")
OURS = ("shared", "in place", "tcp", "ipc")
COLUMNS = ("floor", "lean floor", "gloo", "zmq")
STANDARD = Work()
VARIATIONS = (
    STANDARD,
    replace(STANDARD, optimizer="adamw"),
    replace(STANDARD, wire="bfloat16"),
    replace(STANDARD, workers=1),
    replace(STANDARD, workers=4),
    replace(STANDARD, servers=1),
    replace(STANDARD, shape="small"),
)
VARIED = ("floor", "lean floor", "gloo", *OURS)


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    windows: int
    steps: int
    launches: int

    @property
    def total(self) -> int:
        """Steps that a contender takes in a launch; two come before the first window."""
        return 2 + self.windows * (self.steps + SETTLE_STEPS)


def makers(work: Work, folder: str) -> dict[str, Callable[[], Contender]]:
    """How to make each contender."""
    count = processors()
    return {
        "floor": lambda: floor(work, count, is_lean=False),
        "lean floor": lambda: floor(work, count, is_lean=True),
        "gloo": lambda: gloo(work, folder),
        "rpc": lambda: rpc_server(work, folder),
        "zmq tcp": lambda: bare_zmq(work, "tcp", folder),
        "zmq ipc": lambda: bare_zmq(work, "ipc", folder),
        "shared": lambda: treefold(work, "shared", {"transport": "ipc"} | lane_flags("auto")),
        "in place": lambda: treefold(
            replace(work, in_place=True), "in place", {"transport": "ipc"} | lane_flags("auto")
        ),
        "tcp": lambda: treefold(work, "tcp", {"transport": "tcp"} | lane_flags("socket")),
        "ipc": lambda: treefold(work, "ipc", {"transport": "ipc"} | lane_flags("socket")),
    }


def treefold(work: Work, name: str, flags: dict[str, object]) -> Contender:
    """A cluster of treefold."""
    flags = {"servers": work.servers} | flags
    return Cluster(name, "bench._dense_worker", work.dump(), work.workers, flags)


def unavailable(work: Work, name: str) -> str:
    """Why a contender cannot do a work; empty if it can."""
    if name == "rpc" and not is_rpc_available():
        return "this torch has no RPC"
    if name == "gloo" and work.workers == 1:
        return "one worker has nobody to reduce with"
    return ""


def measure(work: Work, names: Sequence[str], effort: Effort) -> dict[str, object]:
    """Run one work, print its table, and return its document."""
    missing = {name: why for name in names if (why := unavailable(work, name))}
    able = [name for name in names if name not in missing]
    found: dict[str, list[Window]] = {name: [] for name in able}
    for _ in range(effort.launches):
        for name, windows in launch(work, able, effort).items():
            found[name] += windows
    per_second = {name: rates(windows, effort.steps) for name, windows in found.items()}
    ratios = {name: ratios_of(name, per_second) for name in per_second}
    show(work, per_second, ratios)
    for name, why in missing.items():
        print(f"{name}: {why}")
    results = {
        name: {"steps_per_s": Spread.of(values).document(), "ratios": ratios[name]}
        for name, values in per_second.items()
    }
    work_document = asdict(work) | {"parameters": work.elements, "tensors": len(work.sizes)}
    return {
        "work": work_document | asdict(effort),
        "results": results,
        "not available": missing,
        "machine": machine(found),
    }


def launch(work: Work, names: Sequence[str], effort: Effort) -> dict[str, list[Window]]:
    """Start everybody, give them their windows, and compare what they came to."""
    with staged() as stage:
        made = makers(work, stage.folder)
        contenders = [made[name]() for name in names]
        wanted = Path(stage.folder, "wanted")
        wanted.write_bytes(reference(work, effort.total).numpy().data)
        with opened(contenders, stage):
            found = take_turns(contenders, effort.windows, effort.steps)
            errors = {each.name: each.question("error", str(wanted)) for each in contenders}
    check(errors, TOLERANCES[work.wire])
    return found


def check(errors: dict[str, list[object]], tolerance: float) -> None:
    """Compare everybody's result with the right one.

    Raises
    ------
    BenchError
        One is wrong.
    """
    for name, found in errors.items():
        worst = max(float(str(error)) for error in found)
        if not worst <= tolerance:
            msg = f"{name} came to wrong parameters: off by {worst:.2g}, {tolerance:.2g} is allowed"
            raise BenchError(msg)


def ratios_of(name: str, per_second: dict[str, list[float]]) -> dict[str, float]:
    """How fast a contender is beside the floor, gloo and, for a lane, the bare ZeroMQ program."""
    others = {what: what for what in COLUMNS} | {"zmq": BOUNDS.get(name, "")}
    return {
        what: round(ratio(per_second[name], per_second[other]), 3)
        for what, other in others.items()
        if other in per_second and other != name
    }


def show(
    work: Work, per_second: dict[str, list[float]], ratios: dict[str, dict[str, float]]
) -> None:
    """Print the table of one work."""
    title = (
        f"{len(work.sizes)} tensors, {work.elements:,} values; {work.optimizer}, {work.wire}; "
        f"{work.workers} workers, {work.servers} servers"
    )
    rows = []
    for name, values in per_second.items():
        spread = Spread.of(values)
        figures = [f"{value:.2f}" for value in (spread.median, spread.least, spread.most)]
        beside = [f"{ratios[name][k]:.2f}" if k in ratios[name] else "" for k in COLUMNS]
        rows.append([f"treefold {name}" if name in OURS else name, *figures, *beside])
    print_table(title, ["contender", "steps/s", "min", "max", *(f"x {k}" for k in COLUMNS)], rows)


def main() -> None:
    """Measure, and print."""
    options = parser().parse_args()
    names = options.contenders.split(",")
    unknown = [name for name in names if name not in (*PEERS, *OURS)]
    if unknown or options.windows < WINDOWS_MIN:
        sys.exit(f"there is no contender {unknown}" if unknown else f"--windows >= {WINDOWS_MIN}")
    torch.set_num_threads(1)
    effort = Effort(options.windows, options.steps, options.launches)
    if not options.all:
        work = Work(
            **{key: getattr(options, key) for key in asdict(STANDARD) if hasattr(options, key)}
        )
        print_document(measure(work, names, effort))
        return
    found = [
        measure(work, names if work == STANDARD else [n for n in names if n in VARIED], effort)
        for work in VARIATIONS
    ]
    print_document({"variations": found})


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    choices = {"shape": tuple(SHAPES), "optimizer": OPTIMIZERS, "wire": WIRES}
    for key, value in asdict(STANDARD).items():
        if key == "in_place":
            continue  # a contender of its own
        made.add_argument(f"--{key}", type=type(value), default=value, choices=choices.get(key))
    made.add_argument("--windows", type=int, default=WINDOWS_MIN)
    made.add_argument("--steps", type=int, default=20, help="of each window")
    made.add_argument("--launches", type=int, default=1, help="how often to start everybody anew")
    made.add_argument("--contenders", default=",".join((*PEERS, *OURS)))
    made.add_argument("--all", action="store_true", help="the variations as well")
    return made


if __name__ == "__main__":
    start(main)
