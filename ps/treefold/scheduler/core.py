"""The scheduler's decisions: members, views, leases, placement, and when the job is over.

Pure: no socket, clock, thread or randomness. Only the scheduler makes views, and their numbers only
grow. Nothing here is needed in a normal round, so nothing here may be asked for in one.
"""

from dataclasses import dataclass

from treefold.common.errors import InvariantError
from treefold.common.plan import LoopPlan
from treefold.common.story import Story
from treefold.scheduler import formation
from treefold.scheduler.balance import Balance
from treefold.scheduler.declared import Declared, TableState
from treefold.scheduler.members import Happening, MemberState, Roster
from treefold.scheduler.norms import NormBook
from treefold.scheduler.status import status_of
from treefold.wire.exchange import Halt, Level, Note, Peer, PeerLost, Received, Send, Tick
from treefold.wire.membership import MS, STALL_MS
from treefold.wire.messages import (
    PROTOCOL_VERSION,
    Accepted,
    AssignTable,
    Code,
    DeclarePlan,
    DeclareTable,
    Fenced,
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
    StatusReply,
    StatusRequest,
    Stop,
    View,
)

VIEW_RETRY_MS = 300  # a member that beats with an old view gets the new one again, at most so often
LEASE_CHECK_MS = 500
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
        self.declared = Declared()
        self.balance = Balance(self.roster, self.declared)
        self.view = View(0, Phase.FORMING, 0, [], [], Leases(0, []), Leases(0, []))
        self.phase = Phase.FORMING
        self.ending: Stop | None = None
        self.norms = NormBook()
        self._out: list[Effect] = []
        self._started_ns: int | None = None
        self._lease_check_ns = 0
        self._alone_since_ns: int | None = None
        self._alone_grace_ns = 0
        self._ended_ns = 0
        self._handled_ns = 0
        self._is_over_noted = False
        self._is_standby_noted = False

    @property
    def tables(self) -> list[TableState]:
        """Declared tables, by number."""
        return self.declared.tables

    @property
    def round_rate(self) -> float:
        """Rounds per second, as heartbeats told."""
        return self.balance.round_rate

    @property
    def plans(self) -> dict[int, LoopPlan]:
        """Passes over the data, by index."""
        return self.declared.plans

    # ---- the interface of every core ----------------------------------------------------------

    def handle(self, now_ns: int, event: Event) -> list[Effect]:
        """Take in one event and say what is to be done."""
        self._out = []
        if self._started_ns is None:
            self._started_ns = now_ns
        self._forgive_stall(now_ns)
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
            return None if self.limits.is_lingering else self._ended_ns + FAREWELL_MS * MS
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
        is_leasing = self.plans and live and not self.declared.is_loader
        if self.phase is Phase.RUNNING and is_leasing:
            holders = [*self.view.leases.workers, *self.view.previous.workers]
            if any(who not in live for who in holders):
                raise InvariantError(
                    "a slot is leased to a worker that is gone", self.story.lines()
                )
            if len(self.view.leases.workers) != self.declared.slots:
                raise InvariantError("the leases do not cover the slots", self.story.lines())
        for table in self.view.tables:
            if any(place.view > self.view.number for place in table.shards):
                raise InvariantError("a shard's view lies in the future", self.story.lines())

    # ---- messages -----------------------------------------------------------------------------

    def _on_message(self, now_ns: int, peer: Peer, message: object) -> None:
        match message:
            case Register():
                self._on_register(now_ns, peer, message)
            case StatusRequest(call):
                self._out.append(Send(peer, StatusReply(call, status_of(self, now_ns))))
            case (
                Heartbeat() | DeclareTable() | DeclarePlan() | Leave() | RoundLate() | NormReport()
            ):
                state = self.roster.by_incarnation.get(message.incarnation)
                if state is None:
                    self._out.append(Send(peer, Fenced(message.incarnation)))
                    return
                state.peer = peer  # a connection made again has another routing identity
                state.is_heard = True
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
                self._on_round_late(now_ns, message)
            case NormReport():
                self._on_norm_report(message)

    def _on_register(self, now_ns: int, peer: Peer, message: Register) -> None:
        if message.protocol != PROTOCOL_VERSION:
            text = (
                f"this cluster speaks protocol {PROTOCOL_VERSION}, the "
                f"{message.role.name.lower()} on {message.host} (package {message.package}) "
                f"speaks {message.protocol}: install the same version"
            )
            self._out.append(Send(peer, Refused(0, Code.PROTOCOL_VERSION, text)))
            return
        if self.ending is not None:
            self._out.append(Send(peer, self.ending))
            return
        state = self.roster.by_nonce(message.nonce)
        if state is None or not (state.is_live or state.is_heard):
            servers = len(self.roster.live(Role.SERVER))
            if message.role is Role.SERVER and servers >= self.limits.servers:
                text = f"all {servers} servers of this cluster are there already"
                self._out.append(Send(peer, Refused(0, Code.CLUSTER_FULL, text)))
                return
            who = Member(message.role, message.rank, 0, message.address, message.host, message.pid)
            state = self.roster.enroll(who, peer, message.nonce, now_ns)
            self._note(now_ns, f"{state.name} joined from {message.host} (process {message.pid})")
            self._on_joined(now_ns, state)
        if state.is_live:
            state.peer = peer  # a connection made again has another routing identity
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
            if self.declared.is_loader:
                text = f"{state.name} came while every slot is a worker's own loader: it stands by"
                self._out.append(Note(Level.WARNING, text))
        if self.phase is Phase.FORMING and not formation.missing(self.roster, self._wanted()):
            self.phase = Phase.RUNNING
            there = f"{self.limits.servers} servers and {self.limits.workers} workers are there"
            self._note(now_ns, there)
            self._place_tables(now_ns)  # those that were declared while it formed
        self._note_standby()
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

    # ---- declarations -------------------------------------------------------------------------

    def _on_table(self, now_ns: int, state: MemberState, message: DeclareTable) -> None:
        reply = self.declared.table(state.name, message)
        if isinstance(reply, Accepted):
            self._place_tables(now_ns)
        self._out.append(Send(state.peer, reply))

    def _place_tables(self, now_ns: int) -> None:
        if self.phase is not Phase.RUNNING:
            return
        servers = self.roster.live(Role.SERVER)
        who = [state.member.incarnation for state in self.roster.live(Role.WORKER)]
        number = self.view.number + 1
        if self.declared.place(number, [s.member.incarnation for s in servers], who):
            for state in servers:
                self._send_tables(state)
            self._new_view(now_ns)

    def _send_tables(self, state: MemberState) -> None:
        for number, table in enumerate(self.tables):
            self._out.append(Send(state.peer, AssignTable(number, table.spec)))

    def _on_plan(self, now_ns: int, state: MemberState, message: DeclarePlan) -> None:
        is_first = not self.plans
        reply = self.declared.plan(state.name, message, self.limits.workers)
        self._out.append(Send(state.peer, reply))
        if not is_first or not self.plans:
            return
        self._lease_check_ns = now_ns + LEASE_CHECK_MS * MS
        self._note_standby()
        self._new_view(now_ns)

    def _note_standby(self) -> None:
        """Say once that there are more workers than slots."""
        workers, slots = len(self.roster.live(Role.WORKER)), self.declared.slots
        if 0 < slots < workers and not self._is_standby_noted:
            self._is_standby_noted = True
            idle = f"{workers - slots} stand by and take backup tasks"
            self._out.append(Note(Level.WARNING, f"{workers} workers for {slots} slots: {idle}"))

    # ---- views and leases ---------------------------------------------------------------------

    def _new_view(self, now_ns: int, wanted: list[int] | None = None, from_round: int = 0) -> None:
        """Make the next view and tell everybody; without ``wanted``, only mend the leases."""
        workers = self.roster.live(Role.WORKER)
        current = self.view.leases
        if wanted is None:
            wanted = self.balance.mended(current.workers)
        previous = self.view.previous
        leased = current
        if wanted != current.workers:
            previous = current if from_round else Leases(0, wanted)
            leased = Leases(from_round, wanted)
        previous = self.balance.repaired(previous, wanted)
        chief = self._chief(workers)
        places = self.declared.places
        members = [state.member for state in self.roster.live()]
        self.view = View(self.view.number + 1, self.phase, chief, members, places, leased, previous)
        self.story.add(now_ns, f"view {self.view.number}: leases {wanted} from round {from_round}")
        for state in self.roster.live():
            self._send_view(now_ns, state)

    def _chief(self, workers: list[MemberState]) -> int:
        """The live worker of the lowest rank; one that is done with its script stays chief."""
        old = self.roster.by_incarnation.get(self.view.chief)
        if old is not None and old.outcome is Outcome.DONE:
            return self.view.chief
        return workers[0].member.incarnation if workers else 0

    def _check_leases(self, now_ns: int) -> None:
        self._lease_check_ns = now_ns + LEASE_CHECK_MS * MS
        better = self.balance.check(now_ns, self.view.leases.workers)
        if better is not None:
            self._new_view(now_ns, *better)

    def _send_view(self, now_ns: int, state: MemberState) -> None:
        state.view_sent_ns = now_ns
        self._out.append(Send(state.peer, self.view))

    # ---- rounds that need help ----------------------------------------------------------------

    def _on_round_late(self, now_ns: int, late: RoundLate) -> None:
        lacking = self.balance.unfinished(late, self.view.leases.workers)
        if lacking:
            self._end(now_ns, Outcome.FAILED, lacking)
        for state, message in self.balance.help(now_ns, late, self.view):
            self._out.append(Send(state.peer, message))

    def _on_norm_report(self, report: NormReport) -> None:
        place = self.tables[report.table].place if report.table < len(self.tables) else None
        if place is None:
            return
        decision = self.norms.add(report, len(place.shards))
        if decision is None:
            return
        for who in {shard.server: None for shard in place.shards}:
            state = self.roster.by_incarnation[who]
            self._out.append(Send(state.peer, decision))

    # ---- endings ------------------------------------------------------------------------------

    def _on_leave(self, now_ns: int, state: MemberState, message: Leave) -> None:
        was_live = state.is_live
        state.move(Happening.FAREWELL)
        state.outcome = message.outcome
        if was_live:
            text = f"{state.name} left: {message.outcome.name.lower()} {message.text}"
            self._note(now_ns, text.rstrip())
            self._on_gone(now_ns, state, message.outcome, message.text)
        elif message.outcome is Outcome.DONE and not self.roster.live(Role.WORKER):
            self._end(now_ns, Outcome.DONE, "the job is done")
        self._out.append(Send(state.peer, self.ending or Stop(message.outcome, "you have left")))

    def _on_gone(self, now_ns: int, state: MemberState, outcome: Outcome | None, text: str) -> None:
        """A member is gone: it said farewell with ``outcome``, or fell silent (None)."""
        if self.phase is Phase.ENDED:
            return
        if state.member.role is Role.SERVER:
            how = "fell silent" if outcome is None else f"left ({text})"
            held = self.declared.shards_of(state.member.incarnation)
            if held:
                text = f"{state.name} {how} and its {held} shards with it"
                self._end(now_ns, Outcome.FAILED, text)
                return
        elif not self.roster.live(Role.WORKER):
            self._on_last_worker(now_ns, state, outcome, text)
            return
        elif self.declared.is_loader and outcome is not Outcome.DONE:
            who = f"{state.name}, one slot with its own loader,"
            self._end(now_ns, Outcome.FAILED, f"{who} is gone: {text or 'fell silent'}")
            return
        self._place_tables(now_ns)
        self._new_view(now_ns)

    def _on_last_worker(
        self, now_ns: int, state: MemberState, outcome: Outcome | None, text: str
    ) -> None:
        is_done, patience_ns = self.roster.is_done, self.limits.dead_after_ns
        if is_done and not self.roster.is_awaited(now_ns, 2 * patience_ns):
            self._end(now_ns, Outcome.DONE, "the job is done")
        elif outcome is Outcome.FAILED and not self.limits.is_restarting and not is_done:
            self._end(now_ns, Outcome.FAILED, f"{state.name} failed and no worker is left: {text}")
        else:
            self._alone_since_ns = now_ns
            self._alone_grace_ns = patience_ns if is_done else self.limits.rejoin_grace_ns
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

    # ---- time ---------------------------------------------------------------------------------

    def _forgive_stall(self, now_ns: int) -> None:
        """A scheduler that was stopped itself heard nobody, which is no silence of theirs."""
        slept_ns = now_ns - self._handled_ns
        self._handled_ns = now_ns
        due_ns = self.next_deadline_ns() if slept_ns > STALL_MS * MS else None
        if due_ns is not None and now_ns - due_ns > STALL_MS * MS:
            for state in self.roster.live():
                state.seen_ns = now_ns

    def _patience_ns(self, state: MemberState) -> int:
        is_server = state.member.role is Role.SERVER
        return self.limits.server_dead_after_ns if is_server else self.limits.dead_after_ns

    def _on_time(self, now_ns: int) -> None:
        if self.phase is Phase.ENDED:
            self._on_ended(now_ns)
            return
        for state in self.roster.live():
            silent_ns = now_ns - state.seen_ns
            if silent_ns >= self._patience_ns(state) and self.ending is None:
                state.move(Happening.SILENCE)
                text = f"{state.name} has been silent for {silent_ns / 1e9:.1f} s"
                self._note(now_ns, f"{text} and is given up")
                self._on_gone(now_ns, state, None, "")
        started = self._started_ns or 0
        if self.phase is Phase.FORMING and now_ns - started >= self.limits.form_timeout_ns:
            text = formation.missing_text(self.roster, self._wanted(), now_ns - started)
            self._end(now_ns, Outcome.NOT_FORMED, text)
        alone = self._alone_since_ns
        if alone is not None and now_ns - alone >= self._alone_grace_ns:
            text = f"no worker is left and none came back within {(now_ns - alone) / 1e9:.0f} s"
            is_done = self.roster.is_done
            outcome = Outcome.DONE if is_done else Outcome.FAILED
            self._end(now_ns, outcome, "the job is done" if is_done else text)
        if self.plans and now_ns >= self._lease_check_ns and self.phase is Phase.RUNNING:
            self._check_leases(now_ns)

    def _on_ended(self, now_ns: int) -> None:
        if self._is_over_noted or self.ending is None or self.limits.is_lingering:
            return
        if now_ns - self._ended_ns >= FAREWELL_MS * MS or not self.roster.live():
            self._is_over_noted = True
            status = {Outcome.FAILED: 1, Outcome.NOT_FORMED: 3}.get(self.ending.outcome, 0)
            self._out.append(Halt(status, self.ending.text))

    def _wanted(self) -> dict[Role, int]:
        return {Role.SERVER: self.limits.servers, Role.WORKER: self.limits.workers}

    def _note(self, now_ns: int, text: str) -> None:
        self.story.add(now_ns, text)
        self._out.append(Note(Level.INFO, text))
