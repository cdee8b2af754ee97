"""A version whose parts are handed on as they come, while a loop body computes with those it has.

Part of `treefold.worker.core` in a file of its own; just as pure.

A slot may begin when what goes with its version is known on every shard, with parts still missing.
Until all servers say that the version is whole, the round that makes it may still need this worker:
what was pushed for it is kept, and nothing is pushed for the next one. So what holds for rounds
that begin with everything holds for these: whoever contributed to a round had its version whole.
If the worker is to compute another slot of the round before, or servers have gone on, the body does
not count: `StreamsOver` says so, its contributions are dropped, and the worker begins anew.
"""

from collections.abc import Sequence
from typing import Protocol

from treefold.common.round_state import record_of
from treefold.worker.effects import (
    Arrived,
    Effect,
    ReleasePayload,
    Snapshot,
    StreamBegun,
    StreamsOver,
)
from treefold.worker.pulls import ShardPull, Table
from treefold.worker.rounds import LocalRound


class Sends(Protocol):
    """What a stream needs of the `treefold.worker.sending.Sending` beside it."""

    def push_all(self, local: LocalRound) -> None:
        """Send everything that was held back of a round."""


class Rounds(Protocol):
    """What a stream needs of the `treefold.worker.exchange.Exchange` that it is part of."""

    local: LocalRound | None

    @property
    def sending(self) -> Sends:
        """What sends."""

    def trained(self) -> list[Table]:
        """Tables that have rounds."""

    def folded(self) -> list[Table]:
        """Those of them in which a round is one step."""

    def pull(self, now_ns: int, table: Table, version: int, attempt: int) -> None:
        """Ask for a version of every shard of a table."""

    def has_all_before(self, now_ns: int, table: Table, round_: int) -> bool:
        """Whether what was pulled of an asynchronous table will do; asks for more if not."""

    def begin_anew(self, now_ns: int, position: int) -> None:
        """Drop the round and ask for a version again."""

    def load_anew(self, now_ns: int, position: int) -> None:
        """Ask for all of a version, whatever was pulled before."""

    def is_consistent(self, now_ns: int, table: Table) -> bool:
        """Whether all shards are at one version; pulls those again that lag."""


class Stream:
    """The version being streamed, if there is one.

    Parameters
    ----------
    rounds : Rounds
        The exchange.
    out : list of Effect
        The core's effects.

    Attributes
    ----------
    version : int or None
        None if nothing is being streamed.
    older : LocalRound or None
        This worker's share of the round that makes the version, until the version is whole.
    """

    def __init__(self, rounds: Rounds, out: list[Effect]) -> None:
        self.version: int | None = None
        self.older: LocalRound | None = None
        self._rounds = rounds
        self._out = out

    @property
    def is_open(self) -> bool:
        """Whether parts are still to come."""
        return self.version is not None

    def can_begin(self, version: int) -> bool:
        """Whether this worker is done with the round before, and knows what goes with a version."""
        local, trained = self._rounds.local, self._rounds.trained()
        if self.is_open or local is None or local.number != version - 1 or not trained:
            return False
        if local.tried is not None:  # others may go on before this worker is done with the version
            return False
        if len(self._rounds.folded()) < len(trained):  # what others lose of it is computed again
            return False
        return local.next_slot() is None and all(_is_begun(table, version) for table in trained)

    def begin(self, now_ns: int, version: int) -> list[Snapshot]:
        """Hand on what is here of a version, and from now on what comes."""
        self.version = version
        self.older, self._rounds.local = self._rounds.local, None
        snapshots: list[Snapshot] = []
        for table in self._rounds.trained():
            table.held = version
            first = table.pulls[0]
            self._out.append(StreamBegun(table.number, version))
            snapshots.append(
                Snapshot(
                    table.number,
                    version,
                    record_of(table.spec, first.state),
                    first.norm,
                    [],
                    is_streaming=True,
                )
            )
            for pull in table.pulls.values():
                pull.stream()
        self.on_taken(now_ns, is_newer=False)
        return snapshots

    def on_taken(self, now_ns: int, *, is_newer: bool) -> None:
        """Something came; ``is_newer`` if it belongs to a later version, as others have gone on."""
        version = self.version
        if version is None:
            return
        if is_newer:
            self._rounds.begin_anew(now_ns, version)
            return
        for table in self._rounds.trained():
            for shard, pull in table.pulls.items():
                self._hand_on(table, shard, pull)
        pulls = [pull for table in self._rounds.trained() for pull in table.pulls.values()]
        if self.older is not None and all(pull.is_whole for pull in pulls):
            self._release(self.older)
            self.older = None
            if self._rounds.local is not None:
                self._rounds.sending.push_all(self._rounds.local)
        if all(pull.is_complete for pull in pulls):
            self.version = None
            for table in self._rounds.trained():
                table.pulls = {}
                self._rounds.pull(now_ns, table, version + 1, attempt=0)

    def turn_back(self, now_ns: int, slots: list[int]) -> int | None:
        """Give up the version for slots of the round that makes it; that round, or None if not."""
        older = self.older
        if older is None:
            return None
        older.assign(slots)
        if older.next_slot() is None:
            return None
        if self._rounds.local is not None:
            self._release(self._rounds.local)
        self._rounds.local, self.older, self.version = older, None, None
        self._out.append(StreamsOver())
        self._rounds.load_anew(now_ns, older.number)
        return older.number

    def drop(self) -> None:
        """Let go of everything, since the round is given up."""
        if self.older is not None:
            self._release(self.older)
            self.older = None
        if self.is_open:
            self._out.append(StreamsOver())
            self.version = None

    def fail(self, error: Exception) -> None:
        """Nothing more will come."""
        if self.is_open:
            self._out.append(StreamsOver(error))
            self.version = None

    def round_of(self, number: int) -> LocalRound | None:
        """This worker's share of a round, if it still has it."""
        both = (self._rounds.local, self.older)
        return next((one for one in both if one is not None and one.number == number), None)

    def is_held_back(self, local: LocalRound) -> bool:
        """Whether nothing of a round may be sent yet."""
        return self.older is not None and local is not self.older

    def _hand_on(self, table: Table, shard: int, pull: ShardPull) -> None:
        for number, payload in pull.fresh:
            part = table.part_id(shard, number)
            if part is None:
                self._out.append(ReleasePayload(payload))
            else:
                self._out.append(Arrived(table.number, part, payload))
        pull.fresh.clear()

    def _release(self, local: LocalRound) -> None:
        self._out += [ReleasePayload(payload) for payload in local.payloads()]


def newest_whole(rounds: Rounds, now_ns: int) -> int | None:
    """The newest version, if every table has all of it; what lags behind is asked for."""
    trained = rounds.trained()
    if not trained or not all(table.is_pulled for table in trained):
        return None
    folded = rounds.folded()
    newest = max(table.pulled_version for table in folded)
    lagging = False
    for table in trained:
        if table not in folded:
            lagging |= not rounds.has_all_before(now_ns, table, newest)
            continue
        if table.pulled_version < newest:
            rounds.pull(now_ns, table, newest, attempt=0)
        lagging |= table.pulled_version < newest or not rounds.is_consistent(now_ns, table)
    if lagging or any(not table.is_pulled for table in trained):
        return None
    return newest


def torn_version(rounds: Rounds, late: Sequence[ShardPull]) -> int | None:
    """The version to begin with where some shards have the next and others may never get it.

    Those who computed the round between may be gone. Every shard still has the version before, so a
    worker that is not in that round itself begins with that and computes the round again.
    """
    complete = [
        pull.version
        for table in rounds.folded()
        for pull in table.pulls.values()
        if pull.is_complete
    ]
    newest = max(complete, default=0)
    lacking = [pull.status.round for pull in late if pull.status is not None]
    if newest == 0 or newest - 1 not in lacking:
        return None
    is_in_round = rounds.local is not None and rounds.local.number >= newest - 1
    return None if is_in_round else newest - 1


def _is_begun(table: Table, version: int) -> bool:
    pulls = table.pulls.values()
    is_known = bool(pulls) and all(p.version == version and p.is_begun for p in pulls)
    return is_known and table.are_buffers_here
