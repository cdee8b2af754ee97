"""The last events of a core, kept so that a broken invariant can tell how it came about."""

from collections import deque

STORY_EVENTS_MAX = 64  # enough for the last few rounds of a small job, cheap to print


class Story:
    """A bounded record of what a core saw and decided, oldest first."""

    def __init__(self) -> None:
        self._lines: deque[tuple[int, str]] = deque(maxlen=STORY_EVENTS_MAX)

    def add(self, now_ns: int, text: str) -> None:
        """Note one thing that happened at ``now_ns``."""
        self._lines.append((now_ns, text))

    def lines(self) -> list[str]:
        """The record as text, one line an event, with milliseconds since the clock's start."""
        return [f"{now_ns / 1e6:12.3f} ms  {text}" for now_ns, text in self._lines]
