"""A worker reads asynchronous tables with the same contributions in all shards.

Part of `treefold.worker.core` in a file of its own; just as pure.

Shards apply contributions in orders of their own. The newest versions of all are read first; if
they have different contributions in them, all shards are asked for what any of them has. Whatever
one has applied was sent to all. Meanwhile they apply nothing beyond that for a moment, or beyond
what they had when the question came: then they are asked for that.
"""

from collections.abc import Collection
from itertools import zip_longest
from typing import Protocol

from treefold.common.errors import LocalProtocolError, UnavailableError
from treefold.common.round_state import decode_applied
from treefold.wire.words import Need
from treefold.worker.effects import Aligned, Complete, Effect, Fail
from treefold.worker.pulls import Table

TRIES_MAX = 40  # two or three are enough unless somebody who has contributed dies


class Rounds(Protocol):
    """What this needs of the `treefold.worker.exchange.Exchange` that it is part of."""

    def trained(self) -> list[Table]:
        """Tables that have rounds."""

    def ask(
        self, now_ns: int, need: Need, attempt: int, refusing: Collection[tuple[int, int]]
    ) -> None:
        """Ask for the newest version of every shard, as soon as something is in it."""


class Alignment:
    """The read that goes on, if there is one.

    Parameters
    ----------
    rounds : Rounds
        The exchange.
    out : list of Effect
        The core's effects.

    Attributes
    ----------
    call : int or None
        What is to be answered; None if nothing is read.
    """

    def __init__(self, rounds: Rounds, out: list[Effect]) -> None:
        self.call: int | None = None
        self._tries = 0
        self._rounds = rounds
        self._out = out

    def begin(self, now_ns: int, call: int) -> None:
        """Read, if this worker waits for nothing else of these tables."""
        tables = self._tables()
        if any(table.pulls for table in tables):
            text = "what all shards have alike is read between two loops, not in a loop body"
            self._out.append(Fail(call, LocalProtocolError(text)))
            return
        self.call, self._tries = call, 0
        if tables:
            self._rounds.ask(now_ns, Need(0, 0), 0, ())
        else:
            self._finish([])

    def on_pulled(self, now_ns: int) -> None:
        """All shards of a table are here."""
        tables = self._tables()
        if any(not table.is_pulled for table in tables):
            return
        pulls = [pull for table in tables for pull in table.pulls.values()]
        known = [decode_applied(pull.state).clocks for pull in pulls]
        most = [max(clocks) for clocks in zip_longest(*known, fillvalue=0)]
        if all(tuple(pair) == tuple(most) for pair in _padded(known, len(most))):
            self._finish(tables)
        elif self._tries == TRIES_MAX:
            text = f"shards have other contributions in them after {TRIES_MAX} tries to read them"
            self._out.append(Fail(self.call or 0, UnavailableError(f"{text} alike; try again")))
            self.call = None
            for table in tables:
                table.snapshot()
        else:
            self._tries += 1
            self._rounds.ask(now_ns, Need(0, 0, exact=most), 1, ())

    def _finish(self, tables: list[Table]) -> None:
        self._out.append(Complete(self.call or 0, Aligned([table.snapshot() for table in tables])))
        self.call = None

    def _tables(self) -> list[Table]:
        return [table for table in self._rounds.trained() if table.spec.is_asynchronous]


def _padded(known: list[list[int]], length: int) -> list[list[int]]:
    return [[*clocks, *([0] * (length - len(clocks)))] for clocks in known]
