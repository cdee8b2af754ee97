"""Runs of many seeds one after the other, and what they come to."""

import gc
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from tests.sim.cluster import Report, simulate
from tests.sim.drawing import draw
from tests.sim.scenario import Kind, Theme
from tests.sim.world import Violation

PROCESSORS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
COLLECTED_EVERY = 20  # seeds; what one leaves behind is a few MB
HOUR_NS = 3_600 * 10**9
FAULTS = (
    *(kind.name for kind in Kind),
    "dropped",
    "repeated",
    "delayed",
    "cut off",
    "torn journal",
)


@dataclass(slots=True)
class Tally:
    """What seeds came to.

    Attributes
    ----------
    kinds : Counter
        Messages and faults, by kind.
    stories : list of str
        Of the seeds that broke a promise.
    """

    seeds: int = 0
    events: int = 0
    simulated_ns: int = 0
    seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    stories: list[str] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        """Count in what other seeds came to."""
        self.seeds += other.seeds
        self.events += other.events
        self.simulated_ns += other.simulated_ns
        self.seconds += other.seconds
        self.kinds.update(other.kinds)
        self.stories += other.stories

    def line(self) -> str:
        """All of it in words."""
        faults = {kind: self.kinds[kind] for kind in FAULTS}
        by_kind = ", ".join(f"{kind.lower()} {count:,}" for kind, count in faults.items())
        hours = self.simulated_ns / HOUR_NS
        return (
            f"{self.seeds:,} seeds, {len(self.stories)} broke a promise; "
            f"{sum(faults.values()):,} faults ({by_kind}); {hours:.1f} simulated hours, "
            f"{self.events:,} events in {self.seconds:.0f} s of processor time"
        )


TALLY = pytest.StashKey[Tally]()
"""Where the seeds of a whole test run leave what they came to, for its summary."""


@contextmanager
def collected_by_hand() -> Iterator[None]:
    """Within this context garbage is collected where the caller says so: a tenth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def each(seeds: Iterable[int], theme: Theme | None = None) -> Iterator[Report]:
    """Run seeds, of one theme or of those that they draw.

    Raises
    ------
    Violation
        One of them broke a promise.
    """
    with collected_by_hand():
        for number, seed in enumerate(seeds, 1):
            yield simulate(draw(seed, theme))
            if number % COLLECTED_EVERY == 0:
                gc.collect()


def tally(seeds: Iterable[int], stories_max: int) -> Tally:
    """Run seeds until so many of them have broken a promise."""
    found = Tally()
    began = time.process_time()
    with collected_by_hand():
        for seed in seeds:
            found.seeds += 1
            try:
                report = simulate(draw(seed))
            except Violation as violation:
                found.stories.append(str(violation))
                if len(found.stories) == stories_max:
                    break
            else:
                found.events += report.events
                found.simulated_ns += report.now_ns
                found.kinds.update(report.kinds)
            if found.seeds % COLLECTED_EVERY == 0:
                gc.collect()
    found.seconds = time.process_time() - began
    return found
