"""What a worker sends to servers of its slots: parts, and what goes with them.

Part of `treefold.worker.core` in a file of its own; just as pure. Effects are appended to the
core's list.
"""

from typing import Protocol

from treefold.common.spec import Dtype
from treefold.wire.exchange import Send
from treefold.wire.membership import Membership
from treefold.wire.messages import Push, RoundHyper, RoundMeta, RoundStatus
from treefold.wire.words import INITIAL_ROUND, Frame
from treefold.worker.asynchronous import Asynchronous
from treefold.worker.effects import Effect, Initial
from treefold.worker.pulls import PartRange, Table
from treefold.worker.rounds import LocalRound, Pushed, runs
from treefold.worker.streams import Stream


class Rounds(Protocol):
    """What this needs of the `treefold.worker.exchange.Exchange` that it is part of."""

    tables: dict[int, Table]
    stream: Stream
    asynchronous: Asynchronous


class Sending:
    """Messages about the slots of this worker.

    Parameters
    ----------
    rounds : Rounds
        The exchange.
    membership : Membership
        Who this worker is.
    out : list of Effect
        The core's effects.
    """

    def __init__(self, rounds: Rounds, membership: Membership, out: list[Effect]) -> None:
        self._rounds = rounds
        self._membership = membership
        self._out = out

    def push(self, pushed: list[tuple[tuple[int, int], Pushed]], local: LocalRound | None) -> None:
        """Send nodes of a round, each for part ``(table, part)``; adjacent parts in one message."""
        if local is None or self._rounds.stream.is_held_back(local):
            return
        for run in runs(pushed, self._is_next):
            self._push_run(run, local)

    def push_all(self, local: LocalRound) -> None:
        """Send everything that was held back of a round."""
        self.push([(key, one) for key, part in local.parts.items() for one in part.pushed], local)
        for number, table in self._rounds.tables.items():
            for shard in table.place.shards if table.place else []:
                if number in local.hypers:
                    self.send_hyper(table, shard.shard, local)
                for slot in [slot for one, slot in local.metas if one == number]:
                    self.send_meta(table, shard.shard, local, slot)

    def _is_next(
        self, one: tuple[tuple[int, int], Pushed], after: tuple[tuple[int, int], Pushed]
    ) -> bool:
        (table, part), pushed = one
        (next_table, next_part), other = after
        parts = self._rounds.tables[table].parts
        return (
            (next_table, next_part) == (table, part + 1)
            and parts[part].shard == parts[next_part].shard
            and parts[part].wire is parts[next_part].wire
            and pushed.node == other.node
            and (pushed.held.payload is None) == (other.held.payload is None)
        )

    def _push_run(self, run: list[tuple[tuple[int, int], Pushed]], local: LocalRound) -> None:
        (number, _), pushed = run[0]
        table = self._rounds.tables[number]
        parts = [table.parts[part] for (_, part), _ in run]
        place = table.shard(parts[0].shard)
        if place is None:
            return
        payloads = tuple(one.held.payload for _, one in run if one.held.payload is not None)
        frame = Frame(parts[0].wire, parts[-1].stop - parts[0].start) if payloads else None
        marks = []
        if any(one.held.absent for _, one in run):
            marks = [
                one.held.absent.to_bytes(-(-part.pieces // 8), "little")
                for (_, one), part in zip(run, parts, strict=True)
            ]
        push = Push(
            self._membership.job, self._membership.origin, place.view, number, parts[0].shard,
            parts[0].number, len(run), local.number, local.active, pushed.node.level,
            pushed.node.index, marks, frame,
        )  # fmt: skip
        self._out.append(Send(place.server, push, payloads or None))

    def send_hyper(self, table: Table, shard: int, local: LocalRound) -> None:
        """Send one shard what slot 0 steps with."""
        place = table.shard(shard)
        if place is None or self._rounds.stream.is_held_back(local):
            return
        known = local.hypers[table.number]
        message = RoundHyper(
            self._membership.job, self._membership.origin, place.view, table.number, shard,
            local.number, local.active, known.groups, known.norm_max,
        )  # fmt: skip
        self._out.append(Send(place.server, message))

    def send_meta(self, table: Table, shard: int, local: LocalRound, slot: int) -> None:
        """Send one shard what goes with a slot, which is slot 0 unless all count."""
        place = table.shard(shard)
        if place is None or self._rounds.stream.is_held_back(local):
            return
        meta = local.metas[table.number, slot]
        message = RoundMeta(
            self._membership.job, self._membership.origin, place.view, table.number, shard,
            local.number, local.active, meta.groups, meta.norm_max, meta.state,
            slot, local.first, self._rounds.asynchronous.bases.get((table.number, shard), 0),
            local.is_again, local.due, *local.samples(slot),
        )  # fmt: skip
        self._out.append(Send(place.server, message))

    def push_initial(self, table: Table, status: RoundStatus) -> None:
        """Send again what a shard lacks of the values that it begins with, if they are ours."""
        place = table.shard(status.shard)
        is_ours = (
            table.place is not None and table.place.initializer == self._membership.incarnation
        )
        if place is None or not is_ours:
            return
        wanted = dict.fromkeys(missing.part for missing in status.missing)
        parts = [p for p in table.parts if p.shard == status.shard and p.number in wanted]
        for run in runs(parts, _is_after):
            frame = Frame(Dtype.FLOAT32, run[-1].stop - run[0].start)
            push = Push(
                self._membership.job, self._membership.origin, place.view, table.number,
                status.shard, run[0].number, len(run), INITIAL_ROUND, 1, 0, 0, [], frame,
            )  # fmt: skip
            ranges = [(part.start, part.stop) for part in run]
            self._out.append(Send(place.server, push, Initial(table.number, ranges)))


def _is_after(one: PartRange, after: PartRange) -> bool:
    """Whether two parts can travel together: only the last one of a run may be short."""
    return after.number == one.number + 1 and after.wire is one.wire
