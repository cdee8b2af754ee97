"""When a running job's rounds begin, as its workers say: what `bench.failover` measures from."""

import re
import time
from collections.abc import Callable
from itertools import pairwise

from bench._link import BenchError
from tests.support.processes import Cluster, Process

SAID = re.compile(r"^round (\d+) at (\d+)$")
LOOK_S = 0.02
PATIENCE_S = 120.0  # for one event


class Begun:
    """Rounds of one job, by the first worker that began each.

    Parameters
    ----------
    job : Cluster
        Its workers run `bench._failover_worker`.

    Attributes
    ----------
    said : list of (int, int)
        Nanoseconds on the clock that all processes share, and the round that some worker began.
    """

    def __init__(self, job: Cluster) -> None:
        self.said: list[tuple[int, int]] = []
        self._job = job
        self._read: dict[Process, int] = {}

    def until(self, happened: Callable[[], bool], what: str) -> None:
        """Read what workers say until something is so.

        Raises
        ------
        BenchError
            It does not come, or the scheduler or a worker has ended.
        """
        deadline_s = time.monotonic() + PATIENCE_S
        while not happened():
            over = [one for one in (self._job.scheduler, *self._job.workers) if one.is_over]
            if over or time.monotonic() > deadline_s:
                raise BenchError(f"{what}: not reached\n{self._job.transcript()}")
            time.sleep(LOOK_S)
            self._look()

    def reach(self, number: int) -> None:
        """Wait until some worker begins a round, or one after it."""
        self.until(lambda: self.newest() >= number, f"round {number}")

    def newest(self, at_ns: int | None = None) -> int:
        """The last round of those that were begun up to a moment, or so far."""
        return max((n for when_ns, n in self.said if at_ns is None or when_ns <= at_ns), default=-1)

    def first_ns(self, after_ns: int, wanted: Callable[[int], bool]) -> int | None:
        """When the first such round after a moment was begun, None if none was yet."""
        found = (when_ns for when_ns, n in self.said if when_ns > after_ns and wanted(n))
        return min(found, default=None)

    def gaps_s(self, from_ns: int, to_ns: int) -> list[float]:
        """Seconds from each round to the next, of those that end between two moments."""
        times: dict[int, int] = {}
        for when_ns, number in self.said:
            times[number] = min(when_ns, times.get(number, when_ns))
        pairs = pairwise(sorted(times.values()))
        return [(late - early) / 1e9 for early, late in pairs if from_ns < late <= to_ns]

    def _look(self) -> None:
        for worker in self._job.workers:
            lines = worker.lines[self._read.get(worker, 0) :]
            self._read[worker] = self._read.get(worker, 0) + len(lines)
            matches = (SAID.search(line) for line in lines)
            self.said += [(int(match[2]), int(match[1])) for match in matches if match]
