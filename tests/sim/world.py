"""Virtual time: one heap of things to come, one source of chance, and a record of what happened."""

import hashlib
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush

MS = 1_000_000
SECOND = 1_000 * MS
RECENT_MAX = 80  # events told with a failure
EVENTS_PER_SECOND_MAX = 60_000  # of virtual time; the busiest healthy seeds stay below a third


class Violation(AssertionError):
    """A promise was broken; the text is the whole story."""


@dataclass(frozen=True, slots=True)
class Happened:
    """One event, kept until a failure wants to tell of it."""

    now_ns: int
    who: str
    what: object

    def line(self) -> str:
        """The event in words."""
        return f"{self.now_ns / MS:12.3f} ms  {self.who:<14} {str(self.what)[:240]}"


class World:
    """The clock, the heap, chance, and the trace.

    Parameters
    ----------
    seed : int
        Everything random comes from it.

    Attributes
    ----------
    now_ns : int
        Virtual time.
    rng : random.Random
        The one source of chance.
    events : int
        How many things happened.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.now_ns = 0
        self.rng = random.Random(seed)
        self.events = 0
        self.recent: deque[Happened] = deque(maxlen=RECENT_MAX)
        self._trace = hashlib.blake2b(digest_size=16)
        self._heap: list[tuple[int, int, Callable[[object], None], object]] = []
        self._number = 0
        self._second = (0, 0)

    @property
    def trace(self) -> str:
        """Hash of everything that happened so far, in order."""
        return self._trace.hexdigest()

    def at(self, time_ns: int, act: Callable[[object], None], argument: object = None) -> None:
        """Let something happen at a time; what is due at one time happens in the order of calls."""
        self._number += 1
        heappush(self._heap, (time_ns, self._number, act, argument))

    def note(self, who: str, what: object, mark: bytes = b"") -> None:
        """Keep an event for the story of a failure; with ``mark``, let the trace see that."""
        self.recent.append(Happened(self.now_ns, who, what))
        if mark:
            self.see(who, mark)

    def see(self, who: str, mark: bytes) -> None:
        """Let the trace see that something happened."""
        self._trace.update(b"%d %s " % (self.now_ns, who.encode()) + mark)

    def step(self) -> bool:
        """Let the next thing happen; False if there is none."""
        if not self._heap:
            return False
        time_ns, _, act, argument = heappop(self._heap)
        self.now_ns = max(self.now_ns, time_ns)
        self.events += 1
        second, count = self._second
        if self.now_ns // SECOND != second:
            second, count = self.now_ns // SECOND, 0
        self._second = (second, count + 1)
        if count >= EVENTS_PER_SECOND_MAX:
            raise Violation(f"{count} events in one virtual second: nobody makes progress")
        act(argument)
        return True
