"""The scheduler's decisions: members, views, leases, placement, backup tasks, and when the job is over.

Pure: no socket, clock, thread or randomness. Only the scheduler makes views, and their numbers only grow.
Nothing here is needed in a normal round, so nothing here may be asked for in one.
"""

from dataclasses import dataclass, field

from treefold.common.errors import InvariantError
from treefold.common.plan import LoopPlan, PlanKind
from treefold.common.spec import Rule, TableSpec, differences
from treefold.common.story import Story
from treefold.scheduler import leases, placement
from treefold.scheduler.members import Happening, Life, MemberState, Roster
from treefold.scheduler.norms import NormBook
from treefold.scheduler.status import status_of
from treefold.wire.exchange import Halt, Level, Note, Peer, PeerLost, Received, Send, Tick
from treefold.wire.membership import MS
from treefold.wire.messages import (
    PROTOCOL_VERSION,
    Accepted,
    AssignTable,
    Code,
    DeclarePlan,
    DeclareTable,
    Fenced,
    Flush,
    Grant,
    Heartbeat,
    HeartbeatSeen,
    Leases,
    Leave,
    Member,
    NormReport,
    Outcome,
    Phase,
    Refused,
    Register,
    Registered,
    Role,
    RoundLate,
    ShardPlace,
    StatusReply,
    StatusRequest,
    Stop,
    TablePlace,
    View,
)

VIEW_RETRY_MS = 300  # a member that beats with an old view gets the new one again, at most so often
LEASE_CHECK_MS = 500
LEASE_LEAD_MS = 100  # new leases begin so far ahead that they arrive before their first round
PLANS_KEPT_MAX = 4096  # passes over the data whose plan is remembered for late joiners
UNMEASURED_DECAY = 0.9  # per lease check: a worker without slots is slowly given the benefit of the doubt
FAREWELL_MS = 3_000  # after the end, how long members are answered before the scheduler goes


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """The cluster's settings; times in nanoseconds.

    Attributes
    ----------
    job : int
        A random number that tells this job's messages from another's.
    """

    job: int
    servers: int
    workers: int
    heartbeat_ns: int
    dead_after_ns: int
    server_dead_after_ns: int
    form_timeout_ns: int
    rejoin_grace_ns: int
    is_lingering: bool = False
    is_restarting: bool = False


@dataclass(frozen=True, slots=True)
class SchedulerStopAsked:
    """The operator wants the cluster to end."""

    outcome: Outcome
    text: str


Event = Received | PeerLost | Tick | SchedulerStopAsked
Effect = Send | Note | Halt


@dataclass(slots=True)
class TableState:
    """A declared table, who declared it, and where it lies."""

    spec: TableSpec
    declared_by: list[int] = field(default_factory=list)
    place: TablePlace | None = None


class SchedulerCore:
    """The one scheduler of a job.

    Parameters
    ----------
    limits : SchedulerLimits
        The cluster's settings.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.story = Story()
        self.roster = Roster()
        self.tables: list[TableState] = []
        self.plans: dict[int, LoopPlan] = {}
        self.view = View(0, Phase.FORMING, 0, [], [], Leases(0, []), Leases(0, []))
        self.phase = Phase.FORMING
        self.ending: Stop | None = None
        self.norms = NormBook()
        self.granted: dict[int, dict[int, int]] = {}
        self.round_rate = 0.0
        self._out: list[Effect] = []
        self._started_ns: int | None = None
        self._lease_check_ns = 0
        self._round_seen = (0, 0)
        self._alone_since_ns: int | None = None
        self._alone_grace_ns = 0
        self._ended_ns = 0
        self._is_over_noted = False

    # ---- the interface of every core -----------------------------------------------------------------

    def handle(self, now_ns: int, event: Event) -> list[Effect]:
        """Take in one event and say what is to be done."""
        self._out = []
        if self._started_ns is None:
            self._started_ns = now_ns
        match event:
            case Received(peer, message, _):
                self._on_message(now_ns, peer, message)
            case SchedulerStopAsked(outcome, text):
                self._end(now_ns, outcome, text)
            case PeerLost() | Tick():
                pass
        self._on_time(now_ns)
        return self._out

    def next_deadline_ns(self) -> int | None:
        """When a `Tick` is needed at the latest."""
        started = self._started_ns
        if started is None:
            return None
        if self.phase is Phase.ENDED:
            return self._ended_ns + FAREWELL_MS * MS
        times = [state.seen_ns + self._patience_ns(state) for state in self.roster.live()]
        if self.phase is Phase.FORMING:
            times.append(started + self.limits.form_timeout_ns)
        if self._alone_since_ns is not None:
            times.append(self._alone_since_ns + self._alone_grace_ns)
        if self.plans:
            times.append(self._lease_check_ns)
        return min(times, default=None)

    def check_invariants(self) -> None:
        """Raise `InvariantError` if the state contradicts itself."""
        live = [state.member.incarnation for state in self.roster.live(Role.WORKER)]
        if self.phase is Phase.RUNNING and self.plans and live:
            if any(who not in live for who in self.view.leases.workers) and not self._is_loader():
                raise InvariantError("a slot is leased to a worker that is gone", self.story.lines())
            if len(self.view.leases.workers) != self._slots():
                raise InvariantError("the leases do not cover the slots", self.story.lines())
        for table in self.view.tables:
            if any(place.view > self.view.number for place in table.shards):
                raise InvariantError("a shard's view lies in the future", self.story.lines())

    # ---- messages ------------------------------------------------------------------------------------

    def _on_message(self, now_ns: int, peer: Peer, message: object) -> None:
        match message:
            case Register():
                self._on_register(now_ns, peer, message)
            case StatusRequest(call):
                self._out.append(Send(peer, StatusReply(call, status_of(self, now_ns))))
            case Heartbeat() | DeclareTable() | DeclarePlan() | Leave() | RoundLate() | NormReport():
                state = self.roster.by_incarnation.get(message.incarnation)
                if state is None:
                    self._out.append(Send(peer, Fenced(message.incarnation)))
                    return
                state.peer = peer  # a connection made again has another routing identity
                if isinstance(message, Leave):
                    self._on_leave(now_ns, state, message)
                elif self.ending is not None:
                    self._out.append(Send(peer, self.ending))
                elif not state.is_live:
                    self._out.append(Send(peer, Fenced(message.incarnation)))
                else:
                    state.seen_ns = now_ns
                    self._on_member(now_ns, state, message)
            case _:
                text = f"the scheduler does not take {type(message).__name__}"
                self._out.append(Send(peer, Refused(0, Code.BAD_MESSAGE, text)))

    def _on_member(self, now_ns: int, state: MemberState, message: object) -> None:
        match message:
            case Heartbeat():
                self._on_heartbeat(now_ns, state, message)
            case DeclareTable():
                self._on_table(now_ns, state, message)
            case DeclarePlan():
                self._on_plan(now_ns, state, message)
            case RoundLate():
                self._on_round_late(message)
            case NormReport():
                self._on_norm_report(message)

    def _on_register(self, now_ns: int, peer: Peer, message: Register) -> None:
        if message.protocol != PROTOCOL_VERSION:
            text = (
                f"this cluster speaks protocol {PROTOCOL_VERSION}, the {message.role.name.lower()} on "
                f"{message.host} (package {message.package}) speaks {message.protocol}: install the same version"
            )
            self._out.append(Send(peer, Refused(0, Code.PROTOCOL_VERSION, text)))
            return
        if self.ending is not None:
            self._out.append(Send(peer, self.ending))
            return
        state = self.roster.by_nonce(message.nonce)
        if state is None:
            servers = len(self.roster.live(Role.SERVER))
            if message.role is Role.SERVER and servers >= self.limits.servers:
                text = f"all {servers} servers of this cluster are there already"
                self._out.append(Send(peer, Refused(0, Code.CLUSTER_FULL, text)))
                return
            who = Member(message.role, 0, 0, message.address, message.host, message.pid)
            state = self.roster.enroll(who, peer, message.nonce, now_ns)
            self._note(now_ns, f"{state.name} joined from {message.host} (process {message.pid})")
            self._on_joined(now_ns, state)
        if state.peer == peer and state.is_live:
            state.seen_ns = now_ns
            self._out.append(Send(peer, self._registered(state)))
            self._send_view(now_ns, state)

    def _registered(self, state: MemberState) -> Registered:
        limits = self.limits
        return Registered(
            state.nonce,
            limits.job,
            state.member.incarnation,
            state.member.rank,
            limits.heartbeat_ns // MS,
            limits.dead_after_ns // MS,
            limits.servers,
            limits.workers,
        )

    def _on_joined(self, now_ns: int, state: MemberState) -> None:
        if state.member.role is Role.WORKER:
            self._alone_since_ns = None
            if self._is_loader():
                text = f"{state.name} came while each worker's own loader is one slot: nothing to do for it"
                self._out.append(Note(Level.WARNING, text))
        if self.phase is Phase.FORMING and not self._missing():
            self.phase = Phase.RUNNING
            self._note(now_ns, f"{self.limits.servers} servers and {self.limits.workers} workers are there")
        self._new_view(now_ns)

    def _on_heartbeat(self, now_ns: int, state: MemberState, beat: Heartbeat) -> None:
        state.beat = beat
        if beat.slot_time_ns:
            state.slot_time_ns = beat.slot_time_ns
        self._out.append(Send(state.peer, HeartbeatSeen(beat.incarnation, self.view.number)))
        if state.member.role is Role.SERVER and beat.tables < len(self.tables):
            self._send_tables(state)
        if beat.view < self.view.number and now_ns - state.view_sent_ns >= VIEW_RETRY_MS * MS:
            self._send_view(now_ns, state)

    # ---- declarations --------------------------------------------------------------------------------

    def _on_table(self, now_ns: int, state: MemberState, message: DeclareTable) -> None:
        spec = message.spec
        number = next((n for n, table in enumerate(self.tables) if table.spec.name == spec.name), None)
        if number is None:
            if self.plans and spec.rule is Rule.OPTIMIZER:
                text = f"table {spec.name!r} is declared after training began; declare all tables before"
                self._out.append(Send(state.peer, Refused(message.call, Code.BAD_SPEC, text)))
                return
            number = len(self.tables)
            self.tables.append(TableState(spec))
        table = self.tables[number]
        if table.spec != spec:
            lines = "; ".join(differences(table.spec, spec))
            text = f"table {spec.name!r} is declared otherwise by {state.name} (there) than by the first worker (here): {lines}"
            self._out.append(Send(state.peer, Refused(message.call, Code.SPEC_MISMATCH, text)))
            return
        if state.member.incarnation not in table.declared_by:
            table.declared_by.append(state.member.incarnation)
        self._place_tables(now_ns)
        self._out.append(Send(state.peer, Accepted(message.call, number)))

    def _place_tables(self, now_ns: int) -> None:
        """Cut and place every table that can be placed, and see to it that each has a live initializer."""
        if self.phase is not Phase.RUNNING:
            return
        load = {state.member.incarnation: 0 for state in self.roster.live(Role.SERVER)}
        for table in self.tables:
            for shard in table.place.shards if table.place else []:
                load[shard.server] = load.get(shard.server, 0) + shard.blocks
        is_changed = False
        for number, table in enumerate(self.tables):
            initializer = self._initializer(table)
            if table.place is not None and table.place.initializer == initializer:
                continue
            shards = table.place.shards if table.place else self._shards(table.spec, load)
            table.place = TablePlace(number, table.spec.name, initializer, shards)
            is_changed = True
        if is_changed:
            for state in self.roster.live(Role.SERVER):
                self._send_tables(state)
            self._new_view(now_ns)

    def _initializer(self, table: TableState) -> int:
        live = [s.member.incarnation for s in self.roster.live(Role.WORKER)]
        able = [who for who in live if who in table.declared_by]
        if table.place is not None and table.place.initializer in able:
            return table.place.initializer
        return able[0] if able else 0

    def _shards(self, spec: TableSpec, load: dict[int, int]) -> list[ShardPlace]:
        spans = placement.cut(spec, len(load))
        owners = placement.place([span.blocks for span in spans], load)
        view = self.view.number + 1
        return [
            ShardPlace(number, view, span.first_block, span.blocks, owner)
            for number, (span, owner) in enumerate(zip(spans, owners, strict=True))
        ]

    def _send_tables(self, state: MemberState) -> None:
        for number, table in enumerate(self.tables):
            self._out.append(Send(state.peer, AssignTable(number, table.spec)))

    def _on_plan(self, now_ns: int, state: MemberState, message: DeclarePlan) -> None:
        plan = message.plan
        known = self.plans.get(plan.index)
        first = next(iter(self.plans.values()), plan)
        if known is not None and known != plan:
            lines = "; ".join(differences(known, plan))
            text = f"pass {plan.index} over the data differs between {state.name} (there) and the first worker (here): {lines}"
        elif (first.slots, first.kind) != (plan.slots, plan.kind):
            lines = "; ".join(differences(first, plan))
            text = f"slots and kind of loader are fixed for the life of a job: {lines}"
        elif plan.kind is PlanKind.LOADER and plan.slots != self.limits.workers:
            text = f"with own loaders each worker is one slot: {self.limits.workers} workers, {plan.slots} slots"
        else:
            self._accept_plan(now_ns, state, message)
            return
        self._out.append(Send(state.peer, Refused(message.call, Code.SPEC_MISMATCH, text)))

    def _accept_plan(self, now_ns: int, state: MemberState, message: DeclarePlan) -> None:
        is_first = not self.plans
        self.plans.setdefault(message.plan.index, message.plan)
        while len(self.plans) > PLANS_KEPT_MAX:
            del self.plans[min(self.plans)]
        self._out.append(Send(state.peer, Accepted(message.call, message.plan.index)))
        if is_first:
            self._lease_check_ns = now_ns + LEASE_CHECK_MS * MS
            workers = len(self.roster.live(Role.WORKER))
            if workers > message.plan.slots:
                idle = workers - message.plan.slots
                text = f"{workers} workers for {message.plan.slots} slots: {idle} stand by and take backup tasks"
                self._out.append(Note(Level.WARNING, text))
            self._new_view(now_ns)

    # ---- views and leases ----------------------------------------------------------------------------

    def _slots(self) -> int:
        return next(iter(self.plans.values())).slots if self.plans else 0

    def _is_loader(self) -> bool:
        return any(plan.kind is PlanKind.LOADER for plan in self.plans.values())

    def _new_view(self, now_ns: int, wanted: list[int] | None = None, from_round: int = 0) -> None:
        """Make the next view and tell everybody. Without ``wanted``, leases are mended where holders went."""
        workers = self.roster.live(Role.WORKER)
        current = self.view.leases
        if wanted is None:
            wanted = self._mended(current.workers)
        previous = self.view.previous
        leased = current
        if wanted != current.workers:
            previous = current if from_round else Leases(0, wanted)
            leased = Leases(from_round, wanted)
        chief = workers[0].member.incarnation if workers else 0
        places = [table.place for table in self.tables if table.place is not None]
        members = [state.member for state in self.roster.live()]
        self.view = View(self.view.number + 1, self.phase, chief, members, places, leased, previous)
        self.story.add(now_ns, f"view {self.view.number}: leases {wanted} from round {from_round}")
        for state in self.roster.live():
            self._send_view(now_ns, state)

    def _mended(self, current: list[int]) -> list[int]:
        """Leases with every slot at a live worker; a newcomer waits for the next check of the leases."""
        if not self.plans:
            return []
        live = {state.member.incarnation: state for state in self.roster.live(Role.WORKER)}
        if self._is_loader():
            by_rank = [state.member.incarnation for state in live.values()]
            return current or by_rank[: self._slots()]
        if not live:
            return current
        if not current or any(who not in live for who in current):
            return leases.lay_out(leases.counts(self._slots(), self._speeds()))
        return current

    def _speeds(self) -> dict[int, int]:
        """Predicted time per slot of each live worker; the mean of the measured ones where unknown."""
        workers = self.roster.live(Role.WORKER)
        measured = [state.slot_time_ns for state in workers if state.slot_time_ns]
        usual = sum(measured) // len(measured) if measured else 1
        return {state.member.incarnation: max(1, state.slot_time_ns or usual) for state in workers}

    def _check_leases(self, now_ns: int) -> None:
        """Move slots to where they are done sooner; begin far enough ahead that nobody is surprised."""
        self._lease_check_ns = now_ns + LEASE_CHECK_MS * MS
        self._measure_rate(now_ns)
        if self._is_loader() or not self.roster.live(Role.WORKER):
            return
        current = self.view.leases.workers
        for state in self.roster.live(Role.WORKER):
            if state.member.incarnation not in current:
                state.slot_time_ns = int(state.slot_time_ns * UNMEASURED_DECAY)
        speeds = self._speeds()
        wanted = leases.lay_out(leases.counts(self._slots(), speeds))
        idle = any(who not in current for who in speeds) and len(current) >= len(speeds)
        is_better = leases.is_worth_it(current, wanted, speeds)
        if wanted != current and (is_better or (idle and self._is_unmeasured_idle(current))):
            lead = int(self.round_rate * LEASE_LEAD_MS / 1e3) + 1
            self._new_view(now_ns, wanted, self._round_seen[0] + lead)

    def _is_unmeasured_idle(self, current: list[int]) -> bool:
        """Whether a worker without slots has never been timed: it should get some and be."""
        workers = self.roster.live(Role.WORKER)
        return any(s.slot_time_ns == 0 for s in workers if s.member.incarnation not in current)

    def _measure_rate(self, now_ns: int) -> None:
        rounds = [s.beat.round for s in self.roster.live(Role.WORKER) if s.beat is not None]
        newest = max(rounds, default=0)
        seen, at_ns = self._round_seen
        if newest > seen:
            self.round_rate = (newest - seen) * 1e9 / max(1, now_ns - at_ns)
        self._round_seen = (newest, now_ns)

    def _send_view(self, now_ns: int, state: MemberState) -> None:
        state.view_sent_ns = now_ns
        self._out.append(Send(state.peer, self.view))

    # ---- rounds that need help -----------------------------------------------------------------------

    def _on_round_late(self, late: RoundLate) -> None:
        """Give the missing slots to workers that have none of them, one each, the last slots first."""
        if self._is_loader() or not self.view.leases.workers:
            return
        for round_ in [number for number in self.granted if number < late.round]:
            del self.granted[round_]
        granted = self.granted.setdefault(late.round, {})
        owners = [self.view.leases.workers[slot] for slot in late.missing if slot < self._slots()]
        live = self.roster.live(Role.WORKER)
        idle = [s for s in live if s.member.incarnation not in owners]
        todo = [slot for slot in reversed(late.missing) if slot not in granted]
        for state, slot in zip(sorted(idle, key=lambda s: s.slot_time_ns), todo, strict=False):
            granted[slot] = state.member.incarnation
            self._out.append(Send(state.peer, Grant(late.round, [slot])))
        for state in live:
            if state.member.incarnation in owners and granted:
                self._out.append(Send(state.peer, Flush(late.round)))

    def _on_norm_report(self, report: NormReport) -> None:
        place = self.tables[report.table].place if report.table < len(self.tables) else None
        if place is None:
            return
        decision = self.norms.add(report, len(place.shards))
        if decision is None:
            return
        holders = {shard.server: None for shard in place.shards}
        for who in holders:
            state = self.roster.by_incarnation[who]
            self._out.append(Send(state.peer, decision))

    # ---- endings -------------------------------------------------------------------------------------

    def _on_leave(self, now_ns: int, state: MemberState, message: Leave) -> None:
        was_live = state.is_live
        state.move(Happening.FAREWELL)
        state.outcome = message.outcome
        if was_live:
            self._note(now_ns, f"{state.name} left: {message.outcome.name.lower()} {message.text}".rstrip())
            self._on_gone(now_ns, state, message.outcome, message.text)
        self._out.append(Send(state.peer, self.ending or Stop(message.outcome, "you have left")))

    def _on_gone(self, now_ns: int, state: MemberState, outcome: Outcome | None, text: str) -> None:
        """A member is gone: it said farewell with ``outcome``, or fell silent (None)."""
        if self.phase is Phase.ENDED:
            return
        if state.member.role is Role.SERVER:
            how = "fell silent" if outcome is None else f"left ({text})"
            held = sum(1 for t in self.tables if t.place for s in t.place.shards if s.server == state.member.incarnation)
            if held:
                self._end(now_ns, Outcome.FAILED, f"{state.name} {how} and its {held} shards with it")
                return
        elif not self.roster.live(Role.WORKER):
            self._on_last_worker(now_ns, state, outcome, text)
            return
        elif self._is_loader() and not self._has_finished(state, outcome):
            why = text or "fell silent"
            self._end(now_ns, Outcome.FAILED, f"{state.name}, one slot with its own loader, is gone: {why}")
            return
        self._place_tables(now_ns)
        self._new_view(now_ns)

    def _has_finished(self, state: MemberState, outcome: Outcome | None) -> bool:
        """Whether a worker with its own loader may be gone: its script is done and so is everybody's round."""
        if outcome is not Outcome.DONE:
            return False
        rounds = [s.beat.round for s in [*self.roster.live(Role.WORKER), state] if s.beat is not None]
        return not rounds or max(rounds) <= (state.beat.round if state.beat else 0)

    def _on_last_worker(self, now_ns: int, state: MemberState, outcome: Outcome | None, text: str) -> None:
        if any(s.outcome is Outcome.DONE for s in self.roster.by_incarnation.values()):
            self._end(now_ns, Outcome.DONE, "the job is done")
        elif outcome is Outcome.FAILED and not self.limits.is_restarting:
            self._end(now_ns, Outcome.FAILED, f"{state.name} failed and no worker is left: {text}")
        else:
            self._alone_since_ns = now_ns
            self._alone_grace_ns = self.limits.rejoin_grace_ns
            self._new_view(now_ns)

    def _end(self, now_ns: int, outcome: Outcome, text: str) -> None:
        if self.phase is Phase.ENDED:
            return
        self.phase = Phase.ENDED
        self.ending = Stop(outcome, text)
        self._ended_ns = now_ns
        self._note(now_ns, f"the job has ended: {outcome.name.lower()}, {text}")
        self._new_view(now_ns)
        for state in self.roster.live():
            self._out.append(Send(state.peer, self.ending))

    # ---- time ----------------------------------------------------------------------------------------

    def _patience_ns(self, state: MemberState) -> int:
        is_server = state.member.role is Role.SERVER
        return self.limits.server_dead_after_ns if is_server else self.limits.dead_after_ns

    def _on_time(self, now_ns: int) -> None:
        if self.phase is Phase.ENDED:
            self._on_ended(now_ns)
            return
        for state in self.roster.live():
            silent_ns = now_ns - state.seen_ns
            if silent_ns >= self._patience_ns(state) and self.phase is not Phase.ENDED:
                state.move(Happening.SILENCE)
                self._note(now_ns, f"{state.name} has been silent for {silent_ns / 1e9:.1f} s and is given up")
                self._on_gone(now_ns, state, None, "")
        started = self._started_ns or 0
        if self.phase is Phase.FORMING and now_ns - started >= self.limits.form_timeout_ns:
            self._end(now_ns, Outcome.NOT_FORMED, self._missing_text(now_ns - started))
        alone = self._alone_since_ns
        if alone is not None and now_ns - alone >= self._alone_grace_ns:
            waited = self._alone_grace_ns / 1e9
            self._end(now_ns, Outcome.FAILED, f"no worker is left and none came back within {waited:.0f} s")
        if self.plans and now_ns >= self._lease_check_ns and self.phase is Phase.RUNNING:
            self._check_leases(now_ns)

    def _on_ended(self, now_ns: int) -> None:
        if self._is_over_noted or self.ending is None or self.limits.is_lingering:
            return
        if now_ns - self._ended_ns >= FAREWELL_MS * MS or not self.roster.live():
            self._is_over_noted = True
            status = {Outcome.FAILED: 1, Outcome.NOT_FORMED: 3}.get(self.ending.outcome, 0)
            self._out.append(Halt(status, self.ending.text))

    def _missing(self) -> dict[Role, int]:
        """How many of each role have not registered."""
        wanted = {Role.SERVER: self.limits.servers, Role.WORKER: self.limits.workers}
        lacking = {role: count - len(self.roster.live(role)) for role, count in wanted.items()}
        return {role: count for role, count in lacking.items() if count > 0}

    def _missing_text(self, waited_ns: int) -> str:
        wanted = {Role.SERVER: self.limits.servers, Role.WORKER: self.limits.workers}
        words = [
            f"{count - self._missing().get(role, 0)} of {count} {role.name.lower()}s registered"
            for role, count in wanted.items()
        ]
        names = []
        for role in self._missing():
            there = {state.member.rank for state in self.roster.live(role)}
            names += [f"{role.name.lower()}-{n}" for n in range(wanted[role]) if n not in there]
        return (
            f"the cluster did not form within {waited_ns / 1e9:.0f} s: {', '.join(words)}; "
            f"missing: {', '.join(names)}"
        )

    def _note(self, now_ns: int, text: str) -> None:
        self.story.add(now_ns, text)
        self._out.append(Note(Level.INFO, text))
