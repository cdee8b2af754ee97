"""Seeds and hunts that run while other tests wait, by processors that nobody else wants."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass

from tests.sim.hunts import is_found
from tests.sim.runs import PROCESSORS, Tally, tally

BATCHES = 10  # no test may take for ever
FAILURES_MAX = 3  # of each batch, enough to see a pattern


@dataclass(slots=True)
class Job:
    """Something to be done in another process, and its result."""

    function: Callable[..., object]
    arguments: tuple[object, ...]
    future: Future[object]

    def result(self) -> object:
        """What came of it, once it is done."""
        return self.future.result()


class Background:
    """Work in other processes, one for each processor, which give way until it is wanted.

    Parameters
    ----------
    seeds : range
        Seeds to run.
    batches : iterable of int
        Of which tenths of them.
    names : iterable of str
        Planted bugs to look for.
    """

    def __init__(self, seeds: range, batches: Iterable[int], names: Iterable[str]) -> None:
        self._pools = [_pool(give_way)]
        self._tallies: dict[int, list[Job]] = {}
        for batch in batches:
            share = seeds[batch::BATCHES]
            pieces = [share[first :: 2 * PROCESSORS] for first in range(2 * PROCESSORS)]
            self._tallies[batch] = [self._begin(tally, one, FAILURES_MAX) for one in pieces]
        self._hunts = {name: self._begin(is_found, name) for name in names}

    def hasten(self) -> None:
        """Somebody waits for it: what is not done yet is begun again, and gives way to nobody."""
        self._pools[0].shutdown(wait=False, cancel_futures=True)
        self._pools.append(_pool(None))
        jobs = [*(one for of in self._tallies.values() for one in of), *self._hunts.values()]
        for job in jobs:
            if not job.future.done() or job.future.cancelled():
                job.future = self._pools[-1].submit(job.function, *job.arguments)

    def tallies(self, batch: int) -> Iterator[Tally]:
        """What the seeds of a batch came to."""
        for job in self._tallies[batch]:
            found = job.result()
            assert isinstance(found, Tally)
            yield found

    def is_found(self, name: str) -> bool:
        """Whether a planted bug was found."""
        return self._hunts[name].result() is True

    def end(self) -> None:
        """Stop, whether everything is done or not."""
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)

    def _begin(self, function: Callable[..., object], *arguments: object) -> Job:
        return Job(function, arguments, self._pools[0].submit(function, *arguments))


def _pool(initializer: Callable[[], None] | None) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(PROCESSORS, context, initializer)


def give_way() -> None:
    """Run when hardly anybody else wants the processor: tests of real processes have deadlines."""
    os.nice(19)
