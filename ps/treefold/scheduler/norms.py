"""Global gradient norms: every shard's sums of squares, added in block order."""

import math

from treefold.scheduler.declared import Declared
from treefold.scheduler.members import Roster
from treefold.wire.decisions import NormDecision, NormReport
from treefold.wire.exchange import Send

ROUNDS_KEPT = 4  # decisions kept for servers that ask again


class NormBook:
    """Collects reports and makes one decision per table and round."""

    def __init__(self) -> None:
        self._reports: dict[tuple[int, int], dict[int, list[float]]] = {}
        self._decisions: dict[tuple[int, int], NormDecision] = {}

    def add(self, report: NormReport, shards: int) -> NormDecision | None:
        """Take in one shard's sums; the decision once all ``shards`` are there, or were before.

        The norm is the root of the blocks' sums, float64, added in block order, which is shard
        order.
        """
        key = (report.table, report.round)
        if key in self._decisions:
            return self._decisions[key]
        if report.round < max((r for t, r in self._decisions if t == report.table), default=-1):
            return None
        reports = self._reports.setdefault(key, {})
        reports[report.shard] = report.sums
        if len(reports) < shards:
            return None
        total = 0.0
        for shard in sorted(reports):
            for block in reports[shard]:
                total += block
        del self._reports[key]
        norm = math.nan if math.isnan(total) else math.sqrt(total)
        self._decisions[key] = NormDecision(report.table, report.round, norm)
        self._forget(report.table, report.round - ROUNDS_KEPT)
        return self._decisions[key]

    def learn(self, known: list[tuple[int, int, float]]) -> None:
        """Take over decisions ``(table, round, norm)`` that another scheduler has made."""
        for table, round_, norm in known:
            newest = max((r for t, r in self._decisions if t == table), default=-1)
            if round_ > newest:
                self._decisions[table, round_] = NormDecision(table, round_, norm)
                self._forget(table, round_ - ROUNDS_KEPT)

    def _forget(self, table: int, before: int) -> None:
        for old in [key for key in self._decisions if key[0] == table and key[1] <= before]:
            del self._decisions[old]
        for stale in [key for key in self._reports if key[0] == table and key[1] <= before]:
            del self._reports[stale]


def answers(book: NormBook, report: NormReport, declared: Declared, roster: Roster) -> list[Send]:
    """Take in one shard's sums; what servers are told once all are there."""
    tables = declared.tables
    place = tables[report.table].place if report.table < len(tables) else None
    decision = None if place is None else book.add(report, len(place.shards))
    if place is None or decision is None:
        return []
    servers = {shard.server: None for shard in place.shards}
    return [Send(roster.by_incarnation[who].peer, decision) for who in servers]
