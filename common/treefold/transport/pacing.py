"""A cap on what leaves this process over each connection, and who goes first.

What waits is sent in the order in which the next forward needs it: what is urgent, then earlier
rounds, then what lies first. A message has arrived when the time that its bytes take has passed.
Pure: told the time, never looks at a clock.
"""

import heapq
import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

SECOND_NS = 1_000_000_000
Priority = tuple[int, ...]
Send = Callable[[], None]


@dataclass(slots=True)
class _Lane:
    """One connection: what is leaving, until when, and what waits."""

    free_ns: int = 0
    leaving: Send | None = None
    waiting: list[tuple[Priority, int, int, Send]] = field(default_factory=list)


class Pacer:
    """Paces payloads connection by connection.

    Parameters
    ----------
    bytes_per_s : int
        What passes over each connection; 0 for no limit.
    """

    def __init__(self, bytes_per_s: int) -> None:
        self._bytes_per_s = bytes_per_s
        self._lanes: dict[Hashable, _Lane] = {}
        self._numbers = itertools.count()

    @property
    def is_on(self) -> bool:
        """Whether there is a limit."""
        return self._bytes_per_s > 0

    def add(self, lane: Hashable, priority: Priority, nbytes: int, send: Send) -> None:
        """Let something be sent when its turn comes; `pump` begins with it.

        Parameters
        ----------
        lane : hashable
            The connection.
        priority : tuple of int
            The least goes first; among equals the one that came first.
        nbytes : int
            How long it takes.
        send : callable
            Sends it.
        """
        item = (priority, next(self._numbers), nbytes, send)
        heapq.heappush(self._lanes.setdefault(lane, _Lane()).waiting, item)

    def pump(self, now_ns: int) -> None:
        """Send what has left by now, and begin with what is next."""
        for lane in list(self._lanes.values()):
            begin_ns = now_ns if lane.leaving is None else lane.free_ns
            while lane.leaving is not None or lane.waiting:
                if lane.leaving is None:
                    _, _, nbytes, lane.leaving = heapq.heappop(lane.waiting)
                    lane.free_ns = begin_ns + nbytes * SECOND_NS // self._bytes_per_s
                if lane.free_ns > now_ns:
                    break
                send, lane.leaving, begin_ns = lane.leaving, None, lane.free_ns
                send()

    def next_deadline_ns(self) -> int | None:
        """When something has left, None if nothing is to leave."""
        lanes = self._lanes.values()
        return min((lane.free_ns for lane in lanes if lane.leaving is not None), default=None)
