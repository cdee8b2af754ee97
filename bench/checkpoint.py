"""What checkpoints cost: the same job without them and with one in the middle of every window.

    python -m bench.checkpoint [--quick] [--shape standard] [--optimizer adamw] [--every 20]
                               [--workers 2] [--servers 2] [--windows 5]

Run from the root of the repository. The work is that of `bench.dense` with AdamW: 25 million
float32 parameters (5 million with ``--quick``), gradients ready, synchronous steps, on shared
memory. A cluster without checkpoints and one with a checkpoint every so many rounds, in a local
folder for temporary files, stay and take their windows in turns. A window of the second has
exactly one checkpoint, half of ``--every`` before its end; nobody goes on before that one is whole.

*Costs* is how much longer a window with a checkpoint took than the one without it of the same turn,
in rounds: what one checkpoint costs. *Share* is that over ``--every``, and over the 200 rounds that
are the default. *Manifest* is the time from the version that is saved, as the chief comes to it,
to the moment at which its manifest has its name. *Longest* is the longest round of each window.
Everybody's final parameters are compared with torch's own. The last line is JSON.
"""

import argparse
import os
import sys
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import cast

from bench._dense_work import OPTIMIZERS, SHAPES, TOLERANCES, Work, reference
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
    ratio,
    staged,
    start,
    take_turns,
)
from bench._link import Answer, BenchError
from bench.dense import check
from treefold.checkpoint.store import MANIFEST, Store
from treefold.common.config import Settings

OFF, ON = "off", "on"
EVERY_MIN = 8  # rounds; fewer leave no time to write before the window ends
OPENING_STEPS = 2  # those that `opened` takes
PATIENCE_S = 120.0  # for one checkpoint
LOOK_S = 0.02
FLAGS: dict[str, object] = {"transport": "ipc"} | lane_flags("auto")


class Saving(Cluster):
    """A cluster that makes checkpoints; its windows end when the checkpoint that is due is whole.

    Parameters
    ----------
    work : Work
        What it does.
    folder : Path
        Where its checkpoints are.
    every : int
        Rounds from one to the next.
    """

    def __init__(self, work: Work, folder: Path, every: int) -> None:
        flags = {"servers": work.servers, "checkpoint": folder, "checkpoint-every": every}
        super().__init__(ON, "bench._dense_worker", work.dump(), work.workers, FLAGS | flags)
        self.store = Store(str(folder))
        self.manifest_s: list[float] = []
        self.sizes: list[int] = []
        self._folder = folder
        self._every = every
        self._version = 0

    def window(self, steps: int, settle: int = SETTLE_STEPS) -> list[Answer]:
        """Let every player take so many steps, and wait for the newest checkpoint they came by."""
        answers = super().window(steps, settle)
        first, self._version = self._version + settle, self._version + settle + steps
        due = self._version - self._version % self._every
        if due > first:
            ended_ns = cast("list[int]", answers[0]["value"])
            self._note(due, ended_ns[due - first - 1])
        return answers

    def _note(self, version: int, made_ns: int) -> None:
        """Wait for a checkpoint, and note what it was."""
        path = self._folder / f"{version:08d}" / MANIFEST
        until = time.monotonic() + PATIENCE_S
        while not path.exists():
            self.check()
            if time.monotonic() > until:
                msg = f"there is no checkpoint of version {version} after {PATIENCE_S:g} s"
                raise BenchError(msg)
            time.sleep(LOOK_S)
        # The name is the last thing that changes of a manifest.
        named_ns = path.stat().st_ctime_ns - clock_of_files_ns(self._folder.parent)
        self.manifest_s.append((named_ns - made_ns) / 1e9)
        tables = self.store.manifest(version).tables
        self.sizes.append(sum(file.nbytes for table in tables for file in table.files))


def clock_of_files_ns(folder: Path) -> int:
    """How far the clock by which files in a folder are dated is ahead of the monotonic one."""
    probe = folder / "now"
    before_ns = time.monotonic_ns()
    probe.touch()
    return probe.stat().st_ctime_ns - before_ns


def measure(work: Work, every: int, windows: int) -> dict[str, object]:
    """Measure with and without, print the table, and return the document."""
    steps, phase = every - SETTLE_STEPS, every // 2
    load = os.getloadavg()
    with staged() as stage:
        wanted = Path(stage.folder, "wanted")
        wanted.write_bytes(reference(work, phase + windows * every).numpy().data)
        without = {"servers": work.servers} | FLAGS
        plain = Cluster(OFF, "bench._dense_worker", work.dump(), work.workers, without)
        saving = Saving(work, Path(stage.folder, "checkpoints"), every)
        contenders = [plain, saving]
        with opened(contenders, stage):
            for each in contenders:
                each.window(phase - OPENING_STEPS - SETTLE_STEPS)
            found = take_turns(contenders, windows, steps)
            errors = {each.name: each.question("error", str(wanted)) for each in contenders}
    check(errors, TOLERANCES[work.wire])
    made = document(found, saving, every)
    show(made, f"{work.elements:,} values; {work.optimizer}; load {load[0]:.1f} before")
    loads = {"before": load, "after": os.getloadavg()}
    return {"work": asdict(work), "every": every, "load": loads} | made


def document(found: dict[str, list[Window]], saving: Saving, every: int) -> dict[str, object]:
    """What is said of both."""
    steps = every - SETTLE_STEPS
    per_s = {name: rates(windows, steps) for name, windows in found.items()}
    costs = [
        (on.seconds - off.seconds) / (off.seconds / steps)
        for on, off in zip(found[ON], found[OFF], strict=True)
    ]
    default = Settings().checkpoint_every
    cost = Spread.of(costs)
    return {
        "rounds_per_s": {name: Spread.of(values).document() for name, values in per_s.items()},
        "of_off": round(ratio(per_s[ON], per_s[OFF]), 3),
        "costs_rounds": cost.document(),
        "costs_rounds_by_turn": [round(value, 2) for value in costs],
        "share_of_round_time": round(cost.median / every, 4),
        "share_by_default": {"every": default, "share": round(cost.median / default, 5)},
        "longest_round_s": {
            name: Spread.of([longest_s(window) for window in windows]).document(3)
            for name, windows in found.items()
        },
        "manifest_s": Spread.of(saving.manifest_s).document(3),
        "checkpoint_bytes": Spread.of(saving.sizes).document(),
        "machine": machine(found),
    }


def longest_s(window: Window) -> float:
    """The longest round of a window, as the chief saw it."""
    chief = window.answers[0]
    ends = [chief["began_ns"], *cast("list[int]", chief["value"])]
    return max(late - early for early, late in pairwise(ends)) / 1e9


def show(made: dict[str, object], title: str) -> None:
    """Print the table."""
    per_s = cast("dict[str, dict[str, float]]", made["rounds_per_s"])
    longest = cast("dict[str, dict[str, float]]", made["longest_round_s"])
    rows = []
    for name in (OFF, ON):
        of_off = str(made["of_off"]) if name == ON else ""
        rows.append([name, figures(per_s[name]), of_off, figures(longest[name])])
    print_table(title, ["checkpoints", "rounds/s", "of off", "longest, s"], rows)
    default = cast("dict[str, float]", made["share_by_default"])
    costs, manifest = (
        cast("dict[str, float]", made[key]) for key in ("costs_rounds", "manifest_s")
    )
    size = cast("dict[str, float]", made["checkpoint_bytes"])["median"]
    shares = [f"{100 * cast('float', made['share_of_round_time']):.1f} %"]
    shares += [f"{100 * default['share']:.2f} %"]
    row = [figures(costs), *shares, figures(manifest), f"{size / 1e6:.1f}"]
    titles = ["costs, rounds", "share", f"share, every {default['every']}", "manifest, s", "MB"]
    print_table("one checkpoint", titles, [row])


def figures(spread: dict[str, float]) -> str:
    """A median with its range."""
    return f"{spread['median']} ({spread['min']} to {spread['max']})"


def main() -> None:
    """Measure, and print."""
    options = parser().parse_args()
    if options.windows < WINDOWS_MIN or options.every < EVERY_MIN:
        sys.exit(f"--windows >= {WINDOWS_MIN}, --every >= {EVERY_MIN}")
    work = Work(
        shape="fifth" if options.quick else options.shape,
        optimizer=options.optimizer,
        workers=options.workers,
        servers=options.servers,
    )
    print_document(measure(work, options.every, options.windows))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--quick", action="store_true", help="5 million parameters")
    made.add_argument("--shape", choices=SHAPES, default=Work().shape)
    made.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    made.add_argument("--every", type=int, default=20, help="rounds from one to the next")
    made.add_argument("--workers", type=int, default=2)
    made.add_argument("--servers", type=int, default=2)
    made.add_argument("--windows", type=int, default=WINDOWS_MIN)
    return made


if __name__ == "__main__":
    start(main)
