"""What happened to the cluster, in plain words: what the scheduler logs, and what its status lists.

Part of `treefold.scheduler.core` in a file of its own; just as pure. An event is a `Note` of the
core that an operator is to see. So that a storm cannot flood the log and push everything else out
of the list, notes about one matter have a bound; those beyond it are counted, and told in one event
when the bound allows one again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from treefold.wire.exchange import Halt, Level, Note
from treefold.wire.membership import MS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from treefold.scheduler.core import SchedulerCore
    from treefold.scheduler.effects import Effect

EVENTS_MAX = 300  # kept; with 200 workers that join there is room for what follows

SLOTS, SHARDS, CHECKPOINT, QUORUM = "slots", "shards", "checkpoint", "quorum"
"""What notes are about that can be many in a job where nothing is wrong."""

BOUNDS: dict[str, tuple[int, int]] = {
    SLOTS: (10, 10_000 * MS),
    SHARDS: (60, 1_000 * MS),
    CHECKPOINT: (20, 30_000 * MS),
    QUORUM: (3, 30_000 * MS),
    "": (240, 1_000 * MS),
}
"""How many at once, and the time in which one more is allowed; "" is everything else."""


class Happened(NamedTuple):
    """One event: its number, from 1 on, the monotonic time, and what happened."""

    number: int
    at_ns: int
    text: str


@dataclass(slots=True)
class _Bound:
    """Lets so many pass at once, and one more after each ``every_ns``; holds the others back."""

    most: int
    every_ns: int
    free_ns: int = 0
    held: int = 0
    since_ns: int = 0
    newest: Note | None = None

    def admits(self, now_ns: int) -> bool:
        """Whether one more may pass now; if so, it counts."""
        free_ns = max(self.free_ns, now_ns)
        if free_ns - now_ns > (self.most - 1) * self.every_ns:
            return False
        self.free_ns = free_ns + self.every_ns
        return True

    def hold(self, now_ns: int, note: Note) -> None:
        """Keep one back: of several only the newest."""
        self.since_ns = self.since_ns if self.held else now_ns
        self.held += 1
        self.newest = note

    def told(self, now_ns: int) -> list[Note]:
        """What was held back, as one note."""
        held, newest, self.held, self.newest = self.held, self.newest, 0, None
        if newest is None or held == 1:
            return [] if newest is None else [newest]
        seconds = (now_ns - self.since_ns) / 1e9
        text = f"{held} times in {seconds:.0f} s something like this: {newest.text}"
        return [Note(newest.level, text, newest.about)]


class EventLog:
    """The newest events.

    Attributes
    ----------
    wall_s : float
        What is to be added to a monotonic time to get seconds since 1970. The shell knows it;
        nothing is decided by it.
    """

    def __init__(self) -> None:
        self.wall_s = 0.0
        self._events: deque[Happened] = deque(maxlen=EVENTS_MAX)
        self._count = 0
        self._bounds = {about: _Bound(*bound) for about, bound in BOUNDS.items()}

    def take(self, now_ns: int, effects: Sequence[Effect]) -> list[Effect]:
        """Keep what is told to the operator; returns the effects, with notes within bounds."""
        found: list[Effect] = [*self._summaries(now_ns, is_last=False)]
        for effect in effects:
            if isinstance(effect, Note) and effect.level >= Level.INFO:
                bound = self._bounds[effect.about]
                # What is no mere news is rare by itself, and never held back.
                if effect.level == Level.INFO and not bound.admits(now_ns):
                    bound.hold(now_ns, effect)
                    continue
                self._add(now_ns, effect.text)
            found.append(effect)
        if any(isinstance(effect, Halt) for effect in effects):
            found = [*self._summaries(now_ns, is_last=True), *found]
        return found

    def document(self) -> list[dict[str, object]]:
        """The events as a status lists them, oldest first."""
        return [
            {"number": one.number, "at": round(self.wall_s + one.at_ns / 1e9, 3), "text": one.text}
            for one in self._events
        ]

    def _summaries(self, now_ns: int, *, is_last: bool) -> list[Note]:
        notes = [
            note
            for bound in self._bounds.values()
            if bound.held and (is_last or bound.admits(now_ns))
            for note in bound.told(now_ns)
        ]
        for note in notes:
            self._add(now_ns, note.text)
        return notes

    def _add(self, now_ns: int, text: str) -> None:
        self._count += 1
        self._events.append(Happened(self._count, now_ns, text))


def beginning(core: SchedulerCore) -> Note:
    """The first event of a scheduler: events of one before it are not known."""
    source = core.checkpoints.source
    if core.view.number:
        text = f"the scheduler began anew and goes on with view {core.view.number}"
        return Note(Level.INFO, f"{text}; events before that are not listed")
    if source is not None:
        text = f"the job goes on from version {source.version} in {source.folder}"
        return Note(Level.INFO, text)
    counts = f"{core.limits.servers} servers and {core.limits.workers} workers"
    return Note(Level.INFO, f"the scheduler began, and waits for {counts}")
