"""Virtual time: one heap of things to come, one source of chance, and a record of what happened."""

import hashlib
import random
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush

MS = 1_000_000
SECOND = 1_000 * MS
RECENT_MAX = 400  # events kept for a failure
TOLD_MAX = 80  # of them, how many are told of
EVENTS_PER_SECOND_MAX = 60_000  # of virtual time; the busiest healthy seeds stay below a third


class Violation(AssertionError):
    """A promise was broken; the text is the whole story."""


class World:
    """The clock, the heap, chance, and the trace.

    Parameters
    ----------
    seed : int
        Everything random comes from it.
    is_traced : bool
        Whether everything that happens goes into the trace, which takes a little time.

    Attributes
    ----------
    now_ns : int
        Virtual time.
    rng : random.Random
        The one source of chance.
    events : int
        How many things happened.
    """

    def __init__(self, seed: int, *, is_traced: bool = False) -> None:
        self.seed = seed
        self.is_traced = is_traced
        self.now_ns = 0
        self.rng = random.Random(seed)
        self.events = 0
        self.recent: deque[tuple[int, str, object]] = deque(maxlen=RECENT_MAX)
        self._trace = hashlib.blake2b(digest_size=16)
        self._heap: list[tuple[int, int, Callable[[object], None], object]] = []
        self._number = 0
        self._second_ns = self._events_then = 0

    @property
    def trace(self) -> str:
        """Hash of everything that happened so far, in order; empty if it is not traced."""
        return self._trace.hexdigest() if self.is_traced else ""

    def at(self, time_ns: int, act: Callable[[object], None], argument: object = None) -> None:
        """Let something happen at a time; what is due at one time happens in the order of calls."""
        self._number += 1
        heappush(self._heap, (time_ns, self._number, act, argument))

    def note(self, who: str, what: object, mark: bytes = b"") -> None:
        """Keep an event for the story of a failure; with ``mark``, let the trace see that."""
        self.recent.append((self.now_ns, who, what))
        if mark:
            self.see(who, mark)

    def see(self, who: str, mark: bytes) -> None:
        """Let the trace see that something happened."""
        if self.is_traced:
            self._trace.update(b"%d %s " % (self.now_ns, who.encode()) + mark)

    def step(self) -> bool:
        """Let the next thing happen; False if there is none."""
        if not self._heap:
            return False
        time_ns, _, act, argument = heappop(self._heap)
        if time_ns > self.now_ns:
            self.now_ns = time_ns
        self.events += 1
        if self.now_ns >= self._second_ns + SECOND:
            self._second_ns, self._events_then = self.now_ns, self.events
        elif self.events - self._events_then >= EVENTS_PER_SECOND_MAX:
            raise Violation(f"{EVENTS_PER_SECOND_MAX} events in one virtual second, no progress")
        act(argument)
        return True
