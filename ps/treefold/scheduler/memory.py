"""What of the scheduler's state is written down, and how it is taken up again from there.

Part of `treefold.scheduler.core` in a file of its own; just as pure. After every event the core
asks what has changed, and that is written down before anything is sent. So whatever a member was
told is there when another scheduler takes up the journal.
"""

from typing import TYPE_CHECKING

from treefold.common.errors import DataError
from treefold.scheduler import records as r
from treefold.scheduler.chains import Chains
from treefold.scheduler.checkpoints import Checkpoints
from treefold.scheduler.declared import Declared, TableState
from treefold.scheduler.members import Life, Roster
from treefold.wire.messages import Stop, View

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from treefold.scheduler.core import SchedulerCore
    from treefold.wire.decisions import HealthDecision, QuorumDecision
    from treefold.wire.words import Outcome, Source

RECORDS_MAX = 2_000  # written since the last snapshot, before the next one takes their place
PARTED_KEPT_MAX = 1_000  # members that are gone and still known after a snapshot


class Memory:
    """What was written down so far."""

    def __init__(self) -> None:
        self._has_begun = False
        self._lives: dict[int, tuple[Life, Outcome | None]] = {}
        self._declared: dict[tuple[int, int], None] = {}
        self._plans: dict[int, None] = {}
        self._view = 0
        self._confirmed: dict[tuple[int, int], int] = {}
        self._draining: dict[int, None] = {}
        self._has_ended = False
        self._rollbacks = 0
        self._begun: tuple[int, Source | None] = (0, None)
        self._saved: dict[tuple[int, int, int], None] = {}
        self._newest = -1
        self._decided: QuorumDecision | None = None
        self._judged: dict[int, HealthDecision] = {}
        self._stamp: tuple[object, ...] = ()
        self.count = 0

    def news(self, core: "SchedulerCore") -> list[r.Record]:
        """What has changed since the last call."""
        stamp = (
            core.roster.changes,
            core.declared.changes,
            core.chains.changes,
            core.checkpoints.changes,
            core.view.number + (core.ending is not None),
            core.quorums.decided,
            tuple(one.round for one in core.health.decided.values()),
        )
        if stamp == self._stamp:
            return []
        self._stamp = stamp
        found = list(self._changes(core))
        self.count += len(found)
        return found

    def snapshot(self, core: "SchedulerCore") -> list[r.Record]:
        """Everything, as if it had just happened."""
        gone = [s.member.incarnation for s in core.roster.by_incarnation.values() if not s.is_live]
        for incarnation in gone[:-PARTED_KEPT_MAX]:
            core.roster.forget(incarnation)
        fresh = Memory()
        found = list(fresh._changes(core))  # of this class
        self.__dict__.update(fresh.__dict__)
        self.count = 0
        return found

    def _changes(self, core: "SchedulerCore") -> "Iterator[r.Record]":
        if not self._has_begun:
            self._has_begun = True
            yield r.JobBegan(core.limits.job, core.limits.replicas)
        yield from self._of_beginnings(core)
        yield from self._of_members(core.roster)
        yield from self._of_declared(core.declared)
        yield from self._of_chains(core.chains, core.view)
        yield from self._of_checkpoints(core.checkpoints)
        if core.quorums.decided is not None and core.quorums.decided != self._decided:
            self._decided = core.quorums.decided
            yield r.QuorumDecided(self._decided)
        for table, decision in core.health.decided.items():
            if self._judged.get(table) != decision:
                self._judged[table] = decision
                yield r.HealthDecided(decision)
        if core.ending is not None and not self._has_ended:
            self._has_ended = True
            yield r.Ended(core.ending.outcome, core.ending.text)

    def _of_beginnings(self, core: "SchedulerCore") -> "Iterator[r.Record]":
        """That the job goes back, and from where it begins: before what follows from it."""
        if core.rollback.count != self._rollbacks:
            self._rollbacks = core.rollback.count
            self._declared.clear()
            self._confirmed.clear()
            self._decided = None
            self._judged.clear()
            yield r.RollingBack(core.rollback.was_done)
        begun = (core.rollback.count, core.checkpoints.source)
        if begun != self._begun and not core.rollback.is_choosing:
            self._begun, source = begun, core.checkpoints.source
            self._saved.clear()
            self._newest = -1
            named = [table for table in core.declared.tables if table.source is not None]
            yield r.BegunAt(source, [(table.spec, table.record) for table in named])

    def _of_members(self, roster: Roster) -> "Iterator[r.Record]":
        for who, state in roster.by_incarnation.items():
            known = self._lives.get(who)
            if known is None:
                yield r.Enrolled(state.member, state.nonce)
                known = (Life.LIVE, None)
            if (state.life, state.outcome) != known:
                yield r.Parted(who, state.outcome)
            self._lives[who] = (state.life, state.outcome)

    def _of_declared(self, declared: Declared) -> "Iterator[r.Record]":
        for number, table in enumerate(declared.tables):
            for who in table.declared_by:
                if (number, who) not in self._declared:
                    is_first = all(key[0] != number for key in self._declared)
                    self._declared[number, who] = None
                    spec, record = (table.spec, table.record) if is_first else (None, b"")
                    yield r.TableDeclared(number, who, spec, record)
        for index, plan in declared.plans.items():
            if index not in self._plans:
                self._plans[index] = None
                yield r.PlanDeclared(plan)

    def _of_chains(self, chains: Chains, view: View) -> "Iterator[r.Record]":
        for who in chains.draining:
            if who not in self._draining:
                self._draining[who] = None
                yield r.Draining(who)
        if view.number != self._view:
            self._view = view.number
            yield r.ViewMade(view)
        for key, (number, servers) in chains.confirmed.items():
            if self._confirmed.get(key) != number:
                self._confirmed[key] = number
                yield r.ChainConfirmed(*key, number, servers)

    def _of_checkpoints(self, checkpoints: Checkpoints) -> "Iterator[r.Record]":
        for key, message in checkpoints.saved.items():
            if key not in self._saved:
                self._saved[key] = None
                yield r.Saved(message)
        for key in [key for key in self._saved if key not in checkpoints.saved]:
            del self._saved[key]
        if checkpoints.newest > self._newest:
            self._newest = checkpoints.newest
            yield r.Written(checkpoints.newest)


def take_up(core: "SchedulerCore", found: "Sequence[r.Record]") -> None:
    """Let a new core go on where the writer of these records stopped.

    Raises
    ------
    DataError
        They contradict each other, or are of a job with other settings.
    """
    for number, record in enumerate(found):
        if (number == 0) != isinstance(record, r.JobBegan):
            raise DataError(f"record {number} of the journal is {record}")
        _apply(core, record)
    core.memory.snapshot(core)


def _apply(core: "SchedulerCore", record: r.Record) -> None:
    match record:
        case r.JobBegan(job, replicas):
            if replicas != core.limits.replicas:
                text = f"the journal is of a job with replicas={replicas}"
                raise DataError(f"{text}, this scheduler has replicas={core.limits.replicas}")
            core.take_up_job(job)
        case r.Enrolled(member, nonce):
            core.roster.restore(member, nonce)
        case r.Parted(incarnation, outcome):
            core.roster.restore_parted(incarnation, outcome)
        case r.TableDeclared() | r.PlanDeclared():
            _declare(core.declared, record)
        case r.ViewMade(view):
            core.view, core.phase = view, view.phase
            for place in view.tables:
                core.declared.tables[place.table].place = place
        case r.ChainConfirmed(table, shard, number, servers):
            core.chains.confirmed[table, shard] = (number, servers)
        case r.Draining(incarnation):
            core.chains.draining[incarnation] = None
        case r.Ended(outcome, text):
            core.ending = Stop(outcome, text)
        case _:
            _go_on(core, record)


def _go_on(core: "SchedulerCore", record: r.Record) -> None:
    """Take up what is known of checkpoints, and of the newest rounds."""
    match record:
        case r.RollingBack(was_done):
            core.rollback.take_up(was_done)
            core.quorums.forget()
            core.health.forget()
        case r.BegunAt(source, tables):
            core.rollback.is_choosing = False
            if source is not None:
                core.declared.begin_from(source, tables)
            core.checkpoints.begin_at(source)
        case r.Saved(message):
            core.checkpoints.take_up(message)
        case r.Written(version):
            core.checkpoints.take_up_newest(version)
        case r.QuorumDecided(decision):
            core.quorums.decided = decision
        case r.HealthDecided(decision):
            core.health.decided[decision.table] = decision


def _declare(declared: Declared, record: r.TableDeclared | r.PlanDeclared) -> None:
    if isinstance(record, r.PlanDeclared):
        declared.plans[record.plan.index] = record.plan
        return
    if record.spec is not None and record.number == len(declared.tables):
        declared.tables.append(TableState(record.spec, record=record.record))
    declared.tables[record.number].declared_by.append(record.incarnation)
