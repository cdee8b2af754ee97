"""The running process: random numbers of its own, its memory, and what its time went into."""

import ctypes
import secrets
import time
from types import TracebackType
from typing import TYPE_CHECKING

import psutil

from treefold.common.host import host_facts

if TYPE_CHECKING:
    from treefold.common.facts import HostFacts
    from treefold.common.timeline import Timeline

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc
ALLOCATION_BYTES_MAX = 64 << 20  # larger allocations are rare, and go back when they are freed
HEAP_BYTES = 64 << 20  # what the allocator of a thread asks the system for at once
SAMPLE_NS = 500_000_000  # as often as a heartbeat by default; more would only cost
FACTS_SAMPLES = 8  # samples for which what is told of the host counts


def random_number() -> int:
    """A number that no other process will draw, for nonces and job numbers; 62 bits, never 0."""
    return secrets.randbits(62) or 1


def keep_freed_memory(*, is_received: bool = False) -> None:
    """Let the C allocator keep freed memory instead of giving it back to the system at once.

    Otherwise every temporary of a part's size is mapped, zeroed and unmapped anew: 1.3 to 1.5 times
    the time of an AdamW step of torch. Does nothing where the C library is not glibc.

    Parameters
    ----------
    is_received : bool
        Also what threads of ZeroMQ have received into, for those who get a whole model in every
        round. It lies in heaps of their own, and one that is empty goes back whatever the
        threshold, unless it is padded.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "gnu_get_libc_version"):
        library.mallopt(M_MMAP_THRESHOLD, ALLOCATION_BYTES_MAX)
        library.mallopt(M_TRIM_THRESHOLD, ALLOCATION_BYTES_MAX)
        if is_received:
            library.mallopt(M_TOP_PAD, HEAP_BYTES)


def give_back_freed_memory() -> None:
    """Give the system what the C allocator keeps, after work that took more than what follows it.

    Does nothing where the C library is not glibc.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


class ProcessFigures:
    """Resident memory and processor share of this process, looked up at most twice a second.

    What there is to tell of the host is looked up less often.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._next_ns = 0
        self.rss_bytes = 0
        self.cpu_percent = 0.0
        self.host: HostFacts | None = None
        self._samples = 0

    def sample(self, now_ns: int) -> bool:
        """Look again if it is time; True if it was."""
        if now_ns < self._next_ns:
            return False
        self._next_ns = now_ns + SAMPLE_NS
        self.rss_bytes = self._process.memory_info().rss
        self.cpu_percent = self._process.cpu_percent()
        if self._samples % FACTS_SAMPLES == 0:
            self.host = host_facts()
        self._samples += 1
        return True


class Spent:
    """How long a process did what, in nanoseconds by name. Only one thread adds to each name.

    Attributes
    ----------
    ns : dict of str to int
        The sums.
    timeline : Timeline or None
        Where every span goes as well.
    """

    def __init__(self) -> None:
        self.ns: dict[str, int] = {}
        self.timeline: Timeline | None = None

    def add(self, what: str, ns: int) -> None:
        """Count ``ns`` more for ``what``."""
        self.ns[what] = self.ns.get(what, 0) + ns

    def mark(self, what: str, began_ns: int, **args: int) -> None:
        """Show in the timeline that something has taken from then until now."""
        if self.timeline is not None:
            self.timeline.span(what, began_ns, time.monotonic_ns(), args)

    def on(self, what: str) -> "Stopwatch":
        """A context that counts the time spent in it."""
        return Stopwatch(self, what)


class Stopwatch:
    """Counts the time between entering and leaving for one name of a `Spent`."""

    __slots__ = ("_began_ns", "_spent", "_what")

    def __init__(self, spent: Spent, what: str) -> None:
        self._spent = spent
        self._what = what
        self._began_ns = 0

    def __enter__(self) -> None:
        """Start counting."""
        self._began_ns = time.monotonic_ns()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop counting."""
        ended_ns = time.monotonic_ns()
        self._spent.add(self._what, ended_ns - self._began_ns)
        if self._spent.timeline is not None:
            self._spent.timeline.span(self._what, self._began_ns, ended_ns)
