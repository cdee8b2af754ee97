"""Samples per second of real training, beside DDP over gloo and one plain process.

    python -m bench.train [--data DIR] [--models mlp,cnn] [--workers 2] [--servers 1]
                          [--batch 256] [--windows 5] [--steps 30]

Run from the root of the repository. A perceptron 784-512-512-10 and a small convolutional network
learn Fashion-MNIST, whose four IDX files are in DIR; all contenders with the same samples per round
over all workers, the same optimizer, one thread per process, and the images in memory:

- ``plain``: one process;
- ``ddp``: a process per worker, ``DistributedDataParallel`` over gloo;
- ``shared``, ``tcp``: treefold under ``treefold run``, by its lane.

``outside`` is the share of the time that treefold's workers spend outside of the loop's body:
waiting, loading parameters, handing over gradients. In the end everybody's accuracy on the test
images is compared with the plain process's; a large difference ends the benchmark. The last line
is JSON.
"""

import argparse
import statistics
import sys
from dataclasses import asdict

from bench._harness import (
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
from bench._train_work import MODELS, Images, Training, ddp, plain

DATA = "/usr/share/datasets/fashion-mnist"
LANES = {"shared": ("ipc", "auto"), "tcp": ("tcp", "socket")}
ACCURACY_MARGIN = 0.1  # after so few rounds the order of the samples makes a difference


def treefold(training: Training, name: str) -> Contender:
    """A cluster with one slot per worker, as DDP has it."""
    transport, lane = LANES[name]
    flags: dict[str, object] = {"servers": training.servers, "slots": training.workers}
    flags |= {"transport": transport} | lane_flags(lane)
    return Cluster(name, "bench._train_worker", training.dump(), training.workers, flags)


def measure(training: Training, windows: int, steps: int) -> dict[str, object]:
    """Train one model in all ways, print the table, and return its document."""
    with staged() as stage:
        contenders: list[Contender] = [plain(training), ddp(training, stage.folder)]
        contenders += [treefold(training, name) for name in LANES]
        with opened(contenders, stage):
            found = take_turns(contenders, windows, steps)
            reached = {each.name: each.question("accuracy") for each in contenders}
    accuracies = check(reached)
    per_second = {name: rates(taken, steps * training.batch) for name, taken in found.items()}
    rows, results = [], {}
    for name, values in per_second.items():
        spread = Spread.of(values)
        beside = [ratio(values, per_second[other]) for other in ("ddp", "plain")]
        outside = statistics.median(map(share_outside, found[name])) if name in LANES else None
        figures = [f"{value:.0f}" for value in (spread.median, spread.least, spread.most)]
        figures += [f"{value:.2f}" for value in beside]
        figures += ["" if outside is None else f"{100 * outside:.0f} %"]
        shown = f"treefold {name}" if name in LANES else name
        rows.append([shown, *figures, f"{100 * accuracies[name]:.1f} %"])
        results[name] = {
            "samples_per_s": spread.document(1),
            "of_ddp": round(beside[0], 3),
            "of_plain": round(beside[1], 3),
            "outside": None if outside is None else round(outside, 3),
            "accuracy": accuracies[name],
        }
    title = f"{training.model}, {training.workers} workers, {training.batch} samples per round"
    columns = ["contender", "samples/s", "min", "max", "x ddp", "x plain", "outside", "accuracy"]
    print_table(title, columns, rows)
    shape = asdict(training) | {"steps": steps, "windows": windows}
    del shape["data"]
    return shape | {"results": results, "machine": machine(found)}


def share_outside(window: Window) -> float:
    """The mean over the workers."""
    return statistics.mean(float(str(answer["value"])) for answer in window.answers)


def check(reached: dict[str, list[object]]) -> dict[str, float]:
    """Everybody's accuracy.

    Raises
    ------
    BenchError
        Workers of one contender differ, or one has learned much less than the plain process.
    """
    found: dict[str, float] = {}
    for name, each in reached.items():
        if len(dict.fromkeys(each)) != 1:
            raise BenchError(f"the workers of {name} ended with different models: {each}")
        found[name] = float(str(each[0]))
    for name, value in found.items():
        if abs(value - found["plain"]) > ACCURACY_MARGIN:
            msg = f"{name} recognises {value:.1%} of the images, and plain {found['plain']:.1%}"
            raise BenchError(msg)
    return found


def main() -> None:
    """Measure, and print."""
    options = parser().parse_args()
    models = options.models.split(",")
    unknown = [model for model in models if model not in MODELS]
    if unknown or options.windows < WINDOWS_MIN or options.batch % options.workers:
        sys.exit(f"known models: {', '.join(MODELS)}; --windows >= {WINDOWS_MIN}; equal batches")
    samples = len(Images(options.data, "train"))
    if options.steps * options.batch > samples:
        sys.exit(f"a window must not exceed the {samples} samples of an epoch")
    found = [
        measure(
            Training(model, options.data, options.batch, options.workers, options.servers),
            options.windows,
            options.steps,
        )
        for model in models
    ]
    print_document({"trainings": found})


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--data", default=DATA, help="folder of the IDX files")
    made.add_argument("--models", default=",".join(MODELS))
    made.add_argument("--workers", type=int, default=2)
    made.add_argument("--servers", type=int, default=1)
    made.add_argument("--batch", type=int, default=256, help="samples of a round")
    made.add_argument("--windows", type=int, default=WINDOWS_MIN)
    made.add_argument("--steps", type=int, default=30, help="rounds of each window")
    return made


if __name__ == "__main__":
    start(main)
