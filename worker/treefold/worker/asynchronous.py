"""A worker's slots where tables are asynchronous: which one is next, and what has to be in first.

Part of `treefold.worker.core` in a file of its own; just as pure.

Beside a synchronous table, rounds are those of that one. Every slot is applied to the asynchronous
tables by itself, and no worker leaves a round before all of its slots are in them: who is to
compute a slot that somebody lost can do so only while it has that round's version.

Without one, slots are at rounds of their own. A worker takes the one of its slots that is furthest
behind, computes it with the newest version that it has, and asks for a version that has that in it.
What is in is said by clocks, which come with every version of every shard.
"""

from collections.abc import Collection
from typing import Protocol

from treefold.common.plan import LoopPlan, PlanKind
from treefold.common.round_state import decode_applied
from treefold.common.spec import ConsistencyKind
from treefold.wire.membership import Vitals
from treefold.wire.messages import RoundStatus
from treefold.wire.words import Need
from treefold.worker.effects import STANDING_BY, LoopEnd, Task
from treefold.worker.pulls import Table
from treefold.worker.rounds import LocalRound


class Rounds(Protocol):
    """What this needs of the `treefold.worker.exchange.Exchange` that it is part of."""

    local: LocalRound | None

    plan: LoopPlan | None

    def trained(self) -> list[Table]:
        """Tables that have rounds."""

    def folded(self) -> list[Table]:
        """Those of them in which a round is one step."""

    def open_round(self, number: int, plan: LoopPlan) -> LocalRound:
        """Begin this worker's share of a round."""

    def drop_round(self) -> None:
        """Let go of what this worker has of the round it was in."""

    def ask(
        self, now_ns: int, need: Need, attempt: int, refusing: Collection[tuple[int, int]]
    ) -> None:
        """Ask for the newest version of every shard, as soon as something is in it."""

    def stop_asking(self) -> None:
        """Ask for nothing any more."""


class Asynchronous:
    """Slots at rounds of their own.

    Parameters
    ----------
    rounds : Rounds
        The exchange.

    Attributes
    ----------
    is_moved : bool
        Whether a shard has another primary than when this worker pushed to it.
    bases : dict of (table, shard) to int
        Versions that the script has.
    """

    def __init__(self, rounds: Rounds) -> None:
        self.is_moved = False
        self.bases: dict[tuple[int, int], int] = {}
        self._rounds = rounds
        self._clocks: dict[int, list[int]] = {}
        self._pushed: tuple[int, int] | None = None
        self._last: int | None = None
        self._asked: Need | None = None
        self._refusing: dict[tuple[int, int], None] = {}

    @property
    def is_on(self) -> bool:
        """Whether slots are at rounds of their own: no table of the job is synchronous."""
        return bool(self._rounds.trained()) and not self._rounds.folded()

    # ---- beside synchronous tables ------------------------------------------------------------

    def before(self, round_: int) -> Need | None:
        """All that is in the tables when a round begins; None where nobody has to wait for it."""
        plan = self._rounds.plan
        if plan is None or round_ < plan.first_round or not self._rounds.folded():
            return None
        if plan.is_over(round_):
            return _end_of(plan)
        is_first = round_ == plan.first_round  # what came before ended with everything in
        if is_first and plan.kind is not PlanKind.LOADER:
            return None
        return Need(0, 0, round_, 0, _most_slots(plan), plan.ends)

    def has_all_before(self, round_: int) -> bool:
        """Whether what the script has of these tables has in it what a round begins with."""
        need = self.before(round_)
        return need is None or all(need.is_met(clocks) for clocks in self._clocks.values())

    def is_met(self, table: Table, round_: int) -> bool:
        """Whether what was pulled of one of these tables has that in it on every shard."""
        need, pulls = self.before(round_), table.pulls.values()
        return need is None or all(need.is_met(decode_applied(p.state).clocks) for p in pulls)

    def end_at(self, version: int) -> Need | None:
        """What a synchronous version has in it if a pass ends with it, beside other tables."""
        plan = self._rounds.plan
        is_end = plan is not None and plan.is_over(version) and version == plan.end_round
        is_beside = is_end and len(self._rounds.folded()) < len(self._rounds.trained())
        return self.before(version) if is_beside else None

    # ---- by themselves ------------------------------------------------------------------------

    def clock(self, slot: int) -> int:
        """The round after the last one of a slot that is in all shards, as far as is known."""
        known = self._clocks.values()
        return min((clocks[slot] if slot < len(clocks) else 0 for clocks in known), default=0)

    def learn(self, table: Table) -> None:
        """Take in what is in the version of a table that was pulled."""
        shards = [decode_applied(pull.state).clocks for pull in table.pulls.values()]
        slots = range(max(map(len, shards), default=0))
        self._clocks[table.number] = [
            min(clocks[slot] if slot < len(clocks) else 0 for clocks in shards) for slot in slots
        ]

    def handed_over(self, table: Table) -> None:
        """The script gets what was pulled of a table."""
        self.learn(table)
        self._note_bases(table)

    def _note_bases(self, table: Table) -> None:
        for shard, pull in table.pulls.items():
            self.bases[table.number, shard] = pull.version

    def reply(
        self, now_ns: int, plan: LoopPlan | None, leased: list[int], *, is_draining: bool
    ) -> Task | LoopEnd | None:
        """Answer the script's call for its next slot, if there is an answer by now."""
        if plan is None:
            return LoopEnd(0, [], is_draining)
        trained = self._rounds.trained()
        is_here = all(not table.pulls or table.is_pulled for table in trained)
        if is_here:
            self._take_in(trained)
        chosen = None if is_draining else self._choose(plan, leased)
        if not is_here and (self._pushed or not (is_draining or chosen)):
            wanted = self._wanted(plan, leased, is_draining=is_draining)
            if wanted != self._asked:  # the slot to wait for may be ours by now
                self._ask_for(now_ns, wanted)
            return None
        is_over = is_draining or self._is_over(plan)
        if chosen is None and is_here and not is_draining and self._owes_end(plan):
            self._ask(now_ns, plan, leased)
            return None
        if not is_here:
            self._rounds.stop_asking()  # slots of others have come, and what is here will do
        for table in [table for table in trained if table.pulls]:
            self._note_bases(table)
        snapshots = [table.snapshot() for table in trained if table.pulls]
        if chosen is None and not is_over:
            if snapshots:  # the script has to have what this knows of
                return Task(plan.first_round, STANDING_BY, snapshots)
            if plan.kind is not PlanKind.LOADER:
                self._ask(now_ns, plan, leased)
            return None
        if chosen is None:
            return LoopEnd(plan.end_round, snapshots, is_draining)
        self._open(plan, chosen)
        return Task(*chosen, snapshots)

    def finish(self, now_ns: int, plan: LoopPlan, leased: list[int]) -> None:
        """The loop body is over and on its way: ask for a version that has it in it."""
        local = self._rounds.local
        if local is None:
            return
        self._pushed = (local.number, next(iter(local.assigned)))
        self._ask(now_ns, plan, leased)

    def report(
        self, vitals: Vitals, plan: LoopPlan | None, leased: list[int], is_waiting: bool
    ) -> None:
        """Say what others may take of this pass, or that nothing is left."""
        vitals.spare, vitals.is_idle = [], False
        if plan is None or not self.is_on:
            return
        first, todo = plan.first_round, self._todo(plan, leased)
        vitals.spare = [slot for round_, slot in todo if round_ == first and slot != self._last]
        vitals.is_idle = is_waiting and not todo and not self._is_over(plan)

    def on_too_stale(self, now_ns: int, status: RoundStatus) -> None:
        """A shard wants a contribution computed anew, with its newest version.

        Before that all others have to say that they have it, or do not want it either: otherwise
        one could put it together from parts of both.
        """
        meant = [(status.round, slot) for missing in status.missing for slot in missing.slots]
        key = status.table, status.shard
        if self._pushed in meant and key not in self._refusing:
            self._refusing[key] = None
            self._ask_for(now_ns, Need(self._pushed[1], self._pushed[0] + 1))

    # ---- insides ------------------------------------------------------------------------------

    def _take_in(self, trained: list[Table]) -> None:
        """Everything that was asked for is here: what this worker has pushed may be in."""
        for table in [table for table in trained if table.pulls]:
            self.learn(table)
        if self._pushed is None:
            return
        if self._refusing or self.clock(self._pushed[1]) > self._pushed[0]:
            self._rounds.drop_round()
            self._pushed = None
            self._refusing.clear()

    def _choose(self, plan: LoopPlan, leased: list[int]) -> tuple[int, int] | None:
        """Round and slot of the next loop body; None if there is none, or none may begin."""
        found = self._following(plan, leased)
        return found if found is not None and self._is_within(plan, found[0]) else None

    def _open(self, plan: LoopPlan, chosen: tuple[int, int]) -> None:
        """Begin a loop body."""
        self.is_moved, self._last = False, chosen[1]
        local = self._rounds.open_round(chosen[0], plan)
        local.assign([chosen[1]])
        local.in_hand = chosen[1]

    def _is_over(self, plan: LoopPlan) -> bool:
        """Whether the whole pass over the data is in."""
        if plan.kind is PlanKind.LOADER:
            return False
        count = max(map(len, self._clocks.values()), default=0)
        return _end_of(plan).is_met([self.clock(slot) for slot in range(count)])

    def _owes_end(self, plan: LoopPlan) -> bool:
        """Whether a pass is over in which servers were asked for less than its end.

        They save the version that is the first answer to that.
        """
        asked = self._asked
        is_of_pass = asked is not None and max(asked.clock, asked.floor) > plan.first_round
        return is_of_pass and asked is not None and not asked.active and self._is_over(plan)

    def _ask(self, now_ns: int, plan: LoopPlan, leased: list[int]) -> None:
        self._ask_for(now_ns, self._wanted(plan, leased))

    def _ask_for(self, now_ns: int, need: Need) -> None:
        self._asked = need
        self._rounds.ask(now_ns, need, int(self.is_moved), self._refusing)

    def _wanted(self, plan: LoopPlan, leased: list[int], *, is_draining: bool = False) -> Need:
        """What must be in the version that this worker goes on with.

        With nothing left to do that is the whole pass, so that it is the version with which the
        pass ends, and not one that others have gone on from.
        """
        following = self._following(plan, leased)
        floor = 0 if following is None else self._floor(plan, following[0])
        slots = _most_slots(plan) if floor else 0
        ends = plan.ends if floor else []
        if self._pushed is not None:
            own = self._pushed[1], self._pushed[0] + 1
            if is_draining or self._refusing:
                return Need(*own)
            if following is not None or plan.kind is PlanKind.LOADER:
                return Need(*own, floor, 0, slots, ends)
            end = _end_of(plan)
            return Need(*own, end.floor, end.active, end.slots, end.ends)
        return _end_of(plan) if following is None else Need(0, 0, floor, 0, slots, ends)

    def _following(self, plan: LoopPlan, leased: list[int]) -> tuple[int, int] | None:
        """Round and slot to compute next: of the slot that is furthest behind.

        Data shards are read one after the other, unless slots must not be far apart.
        """
        todo = self._todo(plan, leased)
        rules = [table.spec.consistency.kind for table in self._rounds.trained()]
        if not plan.shards or ConsistencyKind.SSP in rules:
            return min(todo, default=None)
        first, last = plan.first_round, self._last
        return min(todo, key=lambda one: (one[1] != last, one[0] == first, one), default=None)

    def _todo(self, plan: LoopPlan, leased: list[int]) -> list[tuple[int, int]]:
        """The next round of each leased slot that has any left."""
        found: list[tuple[int, int]] = []
        for slot in leased:
            round_ = max(self.clock(slot), plan.first_round)
            if self._pushed is not None and self._pushed[1] == slot:
                round_ = max(round_, self._pushed[0] + 1)
            is_endless = plan.kind is PlanKind.LOADER
            if is_endless or (round_ < plan.end_round and slot < plan.active_slots(round_)):
                found.append((round_, slot))
        return found

    def _floor(self, plan: LoopPlan, round_: int) -> int:
        """Every slot has to have this many rounds in before one may begin; 0 for any number."""
        rules = [table.spec.consistency for table in self._rounds.trained()]
        bounds = [rule.staleness for rule in rules if rule.kind is ConsistencyKind.SSP]
        floor = round_ - min(bounds, default=round_)
        return floor if floor > plan.first_round else 0  # the pass before is all in

    def _is_within(self, plan: LoopPlan, round_: int) -> bool:
        floor = self._floor(plan, round_)
        if not floor:
            return True
        need = Need(0, 0, floor, 0, _most_slots(plan), plan.ends)
        return need.is_met([self.clock(slot) for slot in range(_most_slots(plan))])


def _end_of(plan: LoopPlan) -> Need:
    """What is in a version with which a pass over the data ends.

    A slot that the last round left out has all before that; in a pass of one round, nothing.
    """
    last = plan.end_round - 1
    active = plan.active_slots(last)
    if plan.shards:  # every slot has an end of its own
        return Need(0, 0, last, _most_slots(plan), _most_slots(plan), plan.ends)
    return Need(0, 0, last, active, _most_slots(plan) if plan.rounds > 1 else active)


def _most_slots(plan: LoopPlan) -> int:
    """How many slots take part in a pass; later rounds may have fewer."""
    return plan.active_slots(plan.first_round)
