"""What stragglers cost in every mode, in simulated time: `bench.stragglers --virtual`.

The simulator says when which contributions are applied; `tests.sim.training` trains by that.
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench._harness import print_document, print_table
from bench._picture import stacked_bars
from tests.sim.paces import MODES, SLOTS, Mode, Trouble, schedule
from tests.sim.training import HYPER, replay

LOSS = 0.4  # which every mode comes to after about half of 100 rounds


@dataclass(frozen=True, slots=True)
class Run:
    """One seed of one mode with one trouble; ``reached_s`` is None if the loss never was."""

    took_s: float
    reached_s: float | None
    accuracy: float
    staleness: float


@dataclass(frozen=True, slots=True)
class Cell:
    """All seeds of one mode with one trouble."""

    runs: Sequence[Run]

    @property
    def took_s(self) -> float:
        """Seconds for all contributions, mean of the seeds."""
        return statistics.mean(run.took_s for run in self.runs)

    @property
    def reached_s(self) -> float | None:
        """Seconds to the loss, mean of the seeds; None if one never reached it."""
        found = [run.reached_s for run in self.runs if run.reached_s is not None]
        return statistics.mean(found) if len(found) == len(self.runs) else None

    @property
    def accuracy(self) -> float:
        """In the end, mean of the seeds."""
        return statistics.mean(run.accuracy for run in self.runs)

    def text(self) -> str:
        """For the table."""
        reached = "never" if self.reached_s is None else f"{self.reached_s:.0f}"
        return f"{self.took_s:.0f} / {reached} / {self.accuracy:.3f}"

    def document(self) -> dict[str, object]:
        """For the last line."""
        return {
            "seconds": round(self.took_s, 2),
            "seconds of seeds": [round(run.took_s, 2) for run in self.runs],
            "to loss": None if self.reached_s is None else round(self.reached_s, 2),
            "to loss of seeds": [run.reached_s and round(run.reached_s, 2) for run in self.runs],
            "accuracy": round(self.accuracy, 4),
            "accuracy of seeds": [round(run.accuracy, 4) for run in self.runs],
            "staleness": round(statistics.mean(run.staleness for run in self.runs), 2),
        }


def simulate(rounds: int, seeds: int, picture: Path | None) -> None:
    """Every mode with every trouble; prints a table and one line of JSON."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, Cell]] = {}
    for mode in MODES:
        found[mode.name] = {}
        for trouble in Trouble:
            runs = [run_one(mode, trouble, rounds, 1 + seed) for seed in range(seeds)]
            cell = found[mode.name][trouble.value] = Cell(runs)
            print(f"{mode.name}, {trouble.value}: {cell.text()}", file=sys.stderr, flush=True)
    title = f"seconds / to loss {LOSS} / accuracy, {rounds} rounds, mean of {seeds} seeds"
    rows = [[name, *(cell.text() for cell in cells.values())] for name, cells in found.items()]
    print_table(title, ["", *(trouble.value for trouble in Trouble)], rows)
    results = {
        name: {trouble: cell.document() for trouble, cell in cells.items()}
        for name, cells in found.items()
    }
    settings = {"rounds": rounds, "seeds": seeds, "slots": SLOTS, "loss": LOSS, "hyper": HYPER}
    print_document({**settings, "results": results})
    if picture is not None:
        title = f"Simulated time of {rounds} rounds' contributions, eight workers"
        picture.write_text(stacked_bars(title, "s", bars(found)), encoding="utf-8")


def run_one(mode: Mode, trouble: Trouble, rounds: int, seed: int) -> Run:
    """Simulate, then train by what was applied. The seed is that of chance and of the training."""
    made = schedule(mode, trouble, rounds, seed)
    lesson = replay(made.steps, SLOTS, seed)
    reached_ns = lesson.reached_ns(LOSS)
    reached_s = None if reached_ns is None else reached_ns / 1e9
    return Run(made.took_ns / 1e9, reached_s, lesson.accuracy, made.staleness)


def bars(found: dict[str, dict[str, Cell]]) -> dict[str, dict[str, float]]:
    """A bar for each mode and each number of a trouble."""
    made: dict[str, dict[str, float]] = {}
    for mode, cells in found.items():
        for number, cell in enumerate(cells.values()):
            reached_s = cell.took_s if cell.reached_s is None else cell.reached_s
            pieces = {f"to loss {LOSS}": reached_s, "after that": cell.took_s - reached_s}
            made[f"{mode}, {number + 1}"] = pieces
    return made
