"""What the live page shows of the past: curves and lanes, in bounded memory. Pure.

Sampled about once a second between two events. A page that is opened late gets all of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from treefold.scheduler.lanes import ACTIVITIES, FILLED_MAX, Lanes
from treefold.scheduler.tensors import tensors_of
from treefold.wire.words import Role

if TYPE_CHECKING:
    from treefold.scheduler.core import SchedulerCore
    from treefold.scheduler.members import MemberState
    from treefold.wire.words import Figure

POINTS_MAX = 1_200  # of a curve; when there are more, every other one is left out
SERIES_MAX = 64
ROUNDS, SAMPLES, LOSS = "rounds/s", "samples/s", "loss"
Point = tuple[float, int, float]
"""When (Unix seconds), in which round, and the value."""


@dataclass(slots=True)
class Series:
    """One curve."""

    points: list[Point] = field(default_factory=list)
    _every: int = 1
    _seen: int = 0

    def add(self, point: Point) -> bool:
        """Add a point; False if it is one of those that are left out."""
        self._seen += 1
        if (self._seen - 1) % self._every:
            return False
        self.points.append(point)
        if len(self.points) > POINTS_MAX:
            self._every *= 2
            self.points = self.points[::2]
        return True


class History:
    """What was, as far as it is shown.

    Attributes
    ----------
    series : dict of str to Series
        Curves by name; those of a script have a name of `ps.log`.
    lanes : Lanes
        What time went into.
    newest : dict of str to Point
        What the last sample brought.
    tensors : list of dict
        Statistics, the newest.
    """

    def __init__(self) -> None:
        self.series: dict[str, Series] = {}
        self.lanes = Lanes()
        self.newest: dict[str, Point] = {}
        self._samples: dict[int, int] = {}
        self._sampled_ns: int | None = None
        self.tensors: list[dict[str, object]] = []
        self._figures: list[list[Figure]] = []
        self._is_told = False
        self._logged: dict[str, tuple[int, float]] = {}

    def sample(self, now_ns: int, at: float, core: SchedulerCore) -> None:
        """Look at everybody.

        Parameters
        ----------
        now_ns : int
            Now, monotonic.
        at : float
            The same as Unix seconds, for people.
        core : SchedulerCore
            Is read.
        """
        before_ns, self._sampled_ns = self._sampled_ns, now_ns
        states = core.roster.live()
        workers = [state for state in states if state.member.role is Role.WORKER]
        samples = self._new_samples(workers)
        self.newest = {}
        if before_ns is None or now_ns <= before_ns:
            return
        took_ns = now_ns - before_ns
        newest = max((state.beat.round for state in workers if state.beat), default=0)
        self._add(ROUNDS, (at, newest, round(core.balance.round_rate, 3)))
        self._add(SAMPLES, (at, newest, round(samples * 1e9 / took_ns, 1)))
        losses = _losses(core, workers)
        if losses is not None:
            self._add(LOSS, (at, newest, losses))
        self._take_logged(at, workers)
        self._take_figures(core)
        self.lanes.begin(at)
        for state in states:
            lane = self.lanes.see(state.name, state.member.role, state.member.incarnation)
            spent = state.beat.spent_ns if state.beat else {}
            lane.add(took_ns, spent, is_waiting=bool(state.beat and state.beat.waiting))

    def document(self) -> dict[str, object]:
        """Everything, for a page that begins."""
        lanes = self.lanes
        return {
            "tensors": self.tensors,
            "series": {name: one.points for name, one in self.series.items()},
            "columns": [*lanes.older_at, *lanes.recent_at],
            "activities": {role.name.lower(): list(names) for role, names in ACTIVITIES.items()},
            "lanes": {
                name: {"role": lane.role.name.lower(), "cells": [*lane.older, *lane.recent]}
                for name, lane in lanes.by_name.items()
            },
        }

    def news(self) -> dict[str, object]:
        """What the last sample brought, for a page that has everything before it."""
        lanes = self.lanes
        tensors = {"tensors": self.tensors} if self._is_told else {}
        return tensors | {
            "points": self.newest,
            "columns": lanes.recent_at[-FILLED_MAX:],
            "lanes": {
                name: {"role": lane.role.name.lower(), "cells": lane.recent[-FILLED_MAX:]}
                for name, lane in lanes.by_name.items()
            },
        }

    def _add(self, name: str, point: Point) -> None:
        if name not in self.series:
            if len(self.series) >= SERIES_MAX:
                return
            self.series[name] = Series()
        self.series[name].add(point)
        self.newest[name] = point

    def _take_figures(self, core: SchedulerCore) -> None:
        """Put statistics of tensors together when a server has told of new ones."""
        newest = [state.figures for state in core.roster.live(Role.SERVER) if state.figures]
        known = self._figures
        self._is_told = len(newest) != len(known) or any(
            one is not other for one, other in zip(newest, known, strict=True)
        )
        if self._is_told and newest:
            self._figures, self.tensors = newest, tensors_of(core)

    def _new_samples(self, workers: list[MemberState]) -> int:
        """Samples since the last time, of those who were there then."""
        found = {s.member.incarnation: s.beat.samples for s in workers if s.beat}
        known, self._samples = self._samples, found
        return sum(max(0, n - known[who]) for who, n in found.items() if who in known)

    def _take_logged(self, at: float, workers: list[MemberState]) -> None:
        """What scripts have said: of each name the mean of those who are furthest."""
        said: dict[str, dict[int, list[float]]] = {}
        for state in workers:
            for name, number, value in state.beat.logged if state.beat else ():
                said.setdefault(name, {}).setdefault(number, []).append(value)
        for name, by_round in said.items():
            newest = max(by_round)
            found = by_round[newest]
            point = newest, sum(found) / len(found)
            if self._logged.get(name) != point:
                self._logged[name] = point
                self._add(name, (at, *point))


def _losses(core: SchedulerCore, workers: list[MemberState]) -> float | None:
    """The loss, every worker counting with its slots."""
    held = core.view.leases.workers
    found = [
        (state.beat.loss, held.count(state.member.incarnation))
        for state in workers
        if state.beat and state.beat.loss is not None
    ]
    slots = sum(count for _, count in found)
    return sum(loss * count for loss, count in found) / slots if slots else None
