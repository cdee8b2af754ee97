"""What everybody's time went into, second by second: the lanes of the live page. Pure.

Members report sums of nanoseconds by activity. A column is the time between two samples; a cell of
it has the share of each activity in percent, and what is left was idle. What took longer than the
column in which it is reported fills up what was idle before it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from treefold.wire.words import Role

ACTIVITIES: dict[Role, dict[str, tuple[str, ...]]] = {
    Role.WORKER: {
        "compute": ("compute",),
        "push": ("push",),
        "pull": ("pull", "await"),
        "wait": ("wait",),
    },
    Role.SERVER: {
        "fold": ("fold",),
        "optimizer": ("optimizer",),
        "publish": ("publish",),
        "checkpoint": ("checkpoint",),
    },
}
"""What is shown of a role, and the names of `treefold.common.process.Spent` that belong to it."""
WAIT = 3  # its place among a worker's activities
RECENT = 120  # columns that are kept as they are
OLDER_MAX = 480  # columns before them; when there are more, each two become one
FILLED_MAX = 10  # columns that one report can fill: longer ones are rare
FULL = 100
Cell = list[int]


@dataclass(slots=True)
class Lane:
    """One member's time; a column in which it was not there has no cell."""

    role: Role
    seen: dict[str, int] | None = None
    who: int = -1
    older: list[Cell | None] = field(default_factory=list)
    recent: list[Cell | None] = field(default_factory=list)
    owed: int = 0  # of waiting that was shown before it was reported

    def add(self, took_ns: int, beat_ns: Mapping[str, int], *, is_waiting: bool) -> None:
        """Add a column."""
        parts = ACTIVITIES[self.role].values()
        cell = [0] * len(parts)
        self.recent.append(cell)
        seen, self.seen = self.seen, dict(beat_ns)
        if seen is None:
            return
        for place, names in enumerate(parts):
            grown = sum(beat_ns.get(name, 0) - seen.get(name, 0) for name in names)
            share = max(0, round(FULL * grown / took_ns))
            if self.role is Role.WORKER and place == WAIT and share:
                share, self.owed = max(0, share - self.owed), 0
            self._fill(place, share)
        if is_waiting and self.role is Role.WORKER:
            left = FULL - sum(cell)
            cell[WAIT] += left
            self.owed += left

    def _fill(self, place: int, share: int) -> None:
        """Put a share where there is room, from the newest column backwards."""
        for cell in self.recent[: -FILLED_MAX - 1 : -1]:
            if cell is None or not share:
                return
            part = min(share, FULL - sum(cell))
            cell[place] += part
            share -= part


class Lanes:
    """All lanes, by the names of members: who takes a place over goes on with its lane."""

    def __init__(self) -> None:
        self.by_name: dict[str, Lane] = {}
        self.older_at: list[float] = []
        self.recent_at: list[float] = []
        self._per_older = 1
        self._unmerged = 0

    def begin(self, at: float) -> None:
        """A column begins for everybody."""
        self.recent_at.append(at)
        for lane in self.by_name.values():
            lane.recent.append(None)
        if len(self.recent_at) > RECENT:
            self._age()

    def see(self, name: str, role: Role, who: int) -> Lane:
        """The lane of a member that is there; what it had spent before it was seen counts not."""
        lane = self.by_name.get(name)
        if lane is None:
            lane = self.by_name[name] = Lane(role)
            lane.older = [None] * len(self.older_at)
            lane.recent = [None] * len(self.recent_at)
        lane.recent.pop()
        if lane.who != who:
            lane.who, lane.seen, lane.owed = who, None, 0
        return lane

    def _age(self) -> None:
        """The oldest column of the recent ones goes to the older ones."""
        at = self.recent_at.pop(0)
        is_new = self._unmerged == 0
        self._unmerged = (self._unmerged + 1) % self._per_older
        if is_new:
            self.older_at.append(at)
        else:
            self.older_at[-1] = at
        for lane in self.by_name.values():
            cell = lane.recent.pop(0)
            if is_new:
                lane.older.append(cell)
            else:
                share = self._unmerged or self._per_older
                lane.older[-1] = _mean(lane.older[-1], cell, share)
        if len(self.older_at) > OLDER_MAX and not self._unmerged:
            self._halve()

    def _halve(self) -> None:
        self._per_older *= 2
        if len(self.older_at) % 2:
            self._unmerged = self._per_older // 2
        self.older_at = [*self.older_at[1::2], *self.older_at[len(self.older_at) & ~1 :]]
        for lane in self.by_name.values():
            pairs = zip(lane.older[::2], lane.older[1::2], strict=False)
            rest = lane.older[len(lane.older) & ~1 :]
            lane.older = [*(_mean(one, other, 2) for one, other in pairs), *rest]


def _mean(known: Cell | None, cell: Cell | None, count: int) -> Cell | None:
    """The mean of ``count`` cells, of which all but the last are in ``known``."""
    if known is None or cell is None:
        return known or cell
    pairs = zip(known, cell, strict=True)
    return [round(((count - 1) * one + other) / count) for one, other in pairs]
