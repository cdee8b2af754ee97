"""Work that a shell must not wait for: files. One thread does it piece by piece, in order.

A piece of work returns an event for the core, or None. What goes wrong in it on purpose is for it
to turn into an event; anything else is raised where the shell asks for events.
"""

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

EventT = TypeVar("EventT")


class Background(Generic[EventT]):
    """A thread beside a shell's own, started with the first piece of work.

    Parameters
    ----------
    name : str
        The thread's.
    ring : callable
        Called from the thread when an event is there, to wake the shell.
    """

    def __init__(self, name: str, ring: Callable[[], None]) -> None:
        self._name = name
        self._ring = ring
        self._work: queue.SimpleQueue[Callable[[], EventT | None] | None] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[EventT | BaseException] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def do(self, work: Callable[[], EventT | None]) -> None:
        """Let the thread do this after what it was given before."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._work.put(work)

    def events(self) -> list[EventT]:
        """What came of the work since the last call."""
        found: list[EventT] = []
        while not self._events.empty():
            event = self._events.get_nowait()
            if isinstance(event, BaseException):
                raise event
            found.append(event)
        return found

    def close(self, timeout_s: float) -> None:
        """Wait a bounded time until the work is done."""
        if self._thread is not None:
            self._work.put(None)
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                event = work()
            except BaseException as error:  # raised in the shell's own thread
                self._events.put(error)
            else:
                if event is None:
                    continue
                self._events.put(event)
            self._ring()
