"""The scheduler's decisions: members, views, leases, placement, and when the job is over.

Pure: no socket, clock, thread or randomness. Only the scheduler makes views, and their numbers only
grow. Nothing here is needed in a normal round, so nothing here may be asked for in one.
"""

from dataclasses import replace

from treefold.checkpoint.manifest import Manifest
from treefold.common.errors import InvariantError
from treefold.common.plan import LoopPlan
from treefold.common.story import Story
from treefold.scheduler import draining, formation
from treefold.scheduler.admission import SchedulerLimits, applicant, refusal_of, registered
from treefold.scheduler.balance import Balance
from treefold.scheduler.chains import Chains
from treefold.scheduler.changes import changes
from treefold.scheduler.checkpoints import Checkpoints
from treefold.scheduler.declared import Declared, TableState
from treefold.scheduler.effects import (
    CheckpointChosen,
    ChooseCheckpoint,
    Effect,
    Event,
    ManifestWritten,
    Persist,
    Rewrite,
    SchedulerStopAsked,
)
from treefold.scheduler.endings import Endings
from treefold.scheduler.eventlog import EventLog, beginning
from treefold.scheduler.farewell import Farewell, Solitude
from treefold.scheduler.health import Health
from treefold.scheduler.members import Happening, MemberState, Roster
from treefold.scheduler.memory import RECORDS_MAX, Memory
from treefold.scheduler.moving import Moves
from treefold.scheduler.norms import NormBook, answers
from treefold.scheduler.quorums import Quorums
from treefold.scheduler.rollback import Rollback
from treefold.scheduler.status import status_of
from treefold.wire.decisions import HealthReport, NormReport, QuorumReport
from treefold.wire.exchange import Level, Note, Peer, PeerLost, Received, Send, Tick
from treefold.wire.membership import MS, STALL_MS
from treefold.wire.messages import (
    Accepted,
    AssignTable,
    ChainDiffers,
    ChainSynced,
    DeclarePlan,
    DeclareTable,
    DrainRequest,
    Fenced,
    Heartbeat,
    HeartbeatSeen,
    Leave,
    Refused,
    Register,
    RoundLate,
    SavedSeen,
    ShardSaved,
    StatusReply,
    StatusRequest,
    Stop,
    View,
)
from treefold.wire.words import Code, Leases, Outcome, Phase, Role, Source

VIEW_RETRY_MS = 300  # a member that beats with an old view gets the new one again, at most so often
LEASE_CHECK_MS = 500
LATE_MS = 20  # a scheduler that is so late for its own deadline has not heard everybody yet


class SchedulerCore:
    """The one scheduler of a job.

    Parameters
    ----------
    limits : SchedulerLimits
        The cluster's settings.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.story, self.metrics, self.is_watched = Story(), "", False
        self.facts: dict[str, object] = {}
        self.events = EventLog()
        self.roster, self.declared = Roster(), Declared()
        self.balance = Balance(self.roster, self.declared)
        self.chains = Chains(self.roster, self.declared, limits.replicas)
        self.moves = Moves(self.roster, self.chains)
        self.view = View(0, Phase.FORMING, 0, [], [], Leases(0, []), Leases(0, []))
        self.phase = Phase.FORMING
        self.ending: Stop | None = None
        self.norms = NormBook()
        self.quorums = Quorums(self.roster, self.declared)
        self.health = Health(self.roster, self.declared)
        self.checkpoints = Checkpoints(self.declared)
        self.rollback = Rollback(self.roster, self.declared, self.chains, self.checkpoints)
        self.memory = Memory()
        self.solitude = Solitude()
        self.farewell = Farewell(limits.is_lingering)
        self.endings = Endings(self)
        self.out: list[Effect] = []
        self._started_ns: int | None = None
        self._lease_check_ns = 0
        self.forming_ns = 0
        self._handled_ns = 0
        self._is_standby_noted = False

    @property
    def tables(self) -> list[TableState]:
        """Declared tables, by number."""
        return self.declared.tables

    @property
    def plans(self) -> dict[int, LoopPlan]:
        """Passes over the data, by index."""
        return self.declared.plans

    # ---- the interface of every core ----------------------------------------------------------

    def handle(self, now_ns: int, event: Event) -> list[Effect]:
        """Take in one event and say what is to be done."""
        self.out = []
        if self._started_ns is None:
            self._begin(now_ns)
        self._forgive_stall(now_ns)
        match event:
            case Received(peer, message, _, key):
                self._on_message(now_ns, peer, message, key)
            case SchedulerStopAsked(outcome, text):
                self.endings.end(now_ns, outcome, text)
            case ManifestWritten(version, text):
                self.out += self.checkpoints.on_written(version, text)
                self.out += self.checkpoints.write(self.limits, self.view.number)
            case CheckpointChosen():
                self.endings.on_chosen(now_ns, event)
            case PeerLost() | Tick():
                pass
        self._on_time(now_ns)
        return [*self._written(), *self.events.take(now_ns, self.out)]

    def _begin(self, now_ns: int) -> None:
        """The clock starts. Whoever was a member before this scheduler did is to be heard first."""
        self._started_ns = self.forming_ns = now_ns
        self.out.append(beginning(self))
        self.farewell.begin(now_ns)
        for state in self.roster.live():
            state.seen_ns = now_ns + self._patience_ns(state)
        if self.phase is Phase.RUNNING and not self.roster.live(Role.WORKER):
            self.solitude.begin(now_ns, self.limits, is_done=self.roster.is_done)
        if self.rollback.is_choosing:
            self.out.append(ChooseCheckpoint())
        self.out += self.checkpoints.write(self.limits, self.view.number)
        if self.plans:
            self._lease_check_ns = now_ns + LEASE_CHECK_MS * MS
        if self.view.number and self.phase is not Phase.ENDED:  # the last step may be half done
            self._mend(now_ns, is_changed=True)

    def _written(self) -> list[Effect]:
        """What has to be written down before anything is sent."""
        news = self.memory.news(self)
        if self.memory.count > RECORDS_MAX:
            return [Rewrite(self.memory.snapshot(self))]
        return [Persist(news)] if news else []

    def begin_from(self, folder: str, manifest: Manifest) -> None:
        """Begin with a checkpoint, before any event."""
        source = Source(folder, manifest.version)
        tables = [(table.spec, table.record) for table in manifest.tables]
        self.declared.begin_from(source, tables)
        self.declared.plans = {plan.index: plan for plan in manifest.plans}
        self.checkpoints.begin_at(source)

    def take_up_job(self, job: int) -> None:
        """Go on with a job that another scheduler began."""
        self.limits = replace(self.limits, job=job)

    def next_deadline_ns(self) -> int | None:
        """When a `Tick` is needed at the latest."""
        started = self._started_ns
        if started is None:
            return None
        if self.phase is Phase.ENDED:
            return self.farewell.next_deadline_ns()
        times = [state.seen_ns + self._patience_ns(state) for state in self.roster.live()]
        if self.phase is Phase.FORMING:
            times.append(self.forming_ns + self.limits.form_timeout_ns)
        times += [*self.solitude.deadlines_ns(), *self.quorums.deadlines_ns()]
        if self.plans and self.phase is Phase.RUNNING:
            times.append(self._lease_check_ns)
        return min(times, default=None)

    def check_invariants(self) -> None:
        """Raise `InvariantError` if the state contradicts itself."""
        contradiction = self.balance.contradiction(self.view, self.phase)
        if contradiction:
            raise InvariantError(contradiction, self.story.lines())

    # ---- messages -----------------------------------------------------------------------------

    def _on_message(self, now_ns: int, peer: Peer, message: object, key: str) -> None:
        match message:
            case Register():
                self._on_register(now_ns, peer, message, key)
            case StatusRequest():
                self.farewell.watch(now_ns, peer, message, is_over=self.ending is not None)
                self.out.append(Send(peer, StatusReply(message.call, status_of(self, now_ns))))
            case DrainRequest():
                self.out += draining.begin(self.roster, self.chains, peer, message)
                self._mend(now_ns)
            case (
                Heartbeat()
                | DeclareTable()
                | DeclarePlan()
                | Leave()
                | RoundLate()
                | NormReport()
                | QuorumReport()
                | HealthReport()
                | ChainSynced()
                | ChainDiffers()
                | ShardSaved()
            ):
                state = self.roster.by_incarnation.get(message.incarnation)
                if state is None:
                    self.out.append(Send(peer, Fenced(message.incarnation)))
                    return
                state.peer = peer  # a connection made again has another routing identity
                state.is_heard = True
                if isinstance(message, Leave):
                    self.endings.on_leave(now_ns, state, message)
                elif isinstance(message, ShardSaved) and state.is_live:
                    self._on_saved(now_ns, peer, message)
                elif self.ending is not None:
                    self.farewell.hear(now_ns, message)
                    self.out.append(Send(peer, self.ending))
                elif not state.is_live:
                    self.out.append(Send(peer, Fenced(message.incarnation)))
                else:
                    state.seen_ns = now_ns
                    self._on_member(now_ns, state, message)
            case _:
                text = f"the scheduler does not take {type(message).__name__}"
                self.out.append(Send(peer, Refused(0, Code.BAD_MESSAGE, text)))

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
                self.out += answers(self.norms, message, self.declared, self.roster)
            case QuorumReport():
                self.out += self.quorums.on_report(now_ns, state, message)
            case HealthReport():
                self.out += self.health.on_report(state, message)
            case ChainSynced():
                if self.chains.on_synced(message, self.view.number + 1):
                    self._mend(now_ns, is_changed=True)
            case ChainDiffers():
                if self.chains.on_differs(message, self.view.number + 1):
                    self._mend(now_ns, is_changed=True)

    def _on_saved(self, now_ns: int, peer: Peer, message: ShardSaved) -> None:
        self.farewell.stay(now_ns)
        self.out += self.checkpoints.on_saved(self.limits, self.view.number, message)
        self.out.append(Send(peer, SavedSeen(message.table, message.shard, message.version)))

    def _on_register(self, now_ns: int, peer: Peer, message: Register, key: str) -> None:
        state = self.roster.by_nonce(message.nonce)
        refusal = refusal_of(message, state, key)
        if refusal is not None:
            self.out.append(Send(peer, refusal))
            return
        if self.ending is not None:
            self.out.append(Send(peer, self.ending))
            return
        if state is None or not (state.is_live or state.is_heard):
            self._replace(now_ns, message)
            who = applicant(message, key, self.roster)
            state = self.roster.enroll(who, peer, message.nonce, now_ns)
            self.note(now_ns, f"{state.name} joined from {message.host} (process {message.pid})")
            self._on_joined(now_ns, state)
        if state.is_live:
            state.peer = peer  # a connection made again has another routing identity
            state.seen_ns = now_ns
            self.out.append(Send(peer, registered(state, self.limits)))
            self._send_view(now_ns, state)

    def _replace(self, now_ns: int, message: Register) -> None:
        """Where one process listens, another one that did is gone; that need not be waited for."""
        for old in self.roster.live(message.role):
            if message.role is Role.SERVER and old.member.address == message.address:
                self.roster.part(old, Happening.SILENCE, None)
                self.endings.on_gone(now_ns, old, None, "was replaced")

    def _on_joined(self, now_ns: int, state: MemberState) -> None:
        if state.member.role is Role.WORKER:
            self.solitude.end()
            if self.declared.is_loader:
                text = f"{state.name} came while every slot is a worker's own loader: it stands by"
                self.out.append(Note(Level.WARNING, text))
        self.form(now_ns)
        self._note_standby()
        self.place_tables(now_ns)  # those that were declared while no server was there
        self.chains.mend(self.view.number + 1)
        self.new_view(now_ns)

    def form(self, now_ns: int) -> None:
        """Begin, if everybody is there who is waited for."""
        wanted = self._wanted()
        is_waiting = self.rollback.is_choosing or formation.missing(self.roster, wanted)
        if self.phase is Phase.FORMING and not is_waiting:
            self.phase = Phase.RUNNING
            counts = f"{wanted[Role.SERVER]} servers and {wanted[Role.WORKER]} workers"
            how = "goes on" if self.rollback.count or self.view.tables else "begins"
            self.note(now_ns, f"the job {how}: {counts} are there")
            self.place_tables(now_ns)  # those that were declared while it formed

    def _on_heartbeat(self, now_ns: int, state: MemberState, beat: Heartbeat) -> None:
        state.take_beat(now_ns, beat)
        confirmed = beat.view if beat.view == self.view.number else 0
        if confirmed and self.chains.confirm(beat.incarnation, beat.view):
            self._mend(now_ns)
        seen = HeartbeatSeen(beat.incarnation, self.view.number, confirmed, self.is_watched)
        self.out.append(Send(state.peer, seen))
        farewell = draining.farewell(state, self.chains)
        if farewell is not None:
            self.out.append(Send(state.peer, farewell))
        self.norms.learn(beat.norms)
        if state.member.role is Role.SERVER and beat.tables < len(self.tables):
            self._send_tables(state)
        if beat.view < self.view.number and now_ns - state.view_sent_ns >= VIEW_RETRY_MS * MS:
            self._send_view(now_ns, state)

    # ---- declarations -------------------------------------------------------------------------

    def _on_table(self, now_ns: int, state: MemberState, message: DeclareTable) -> None:
        reply = self.declared.table(state.name, message)
        if isinstance(reply, Accepted):
            self.place_tables(now_ns)
        self.out.append(Send(state.peer, reply))

    def place_tables(self, now_ns: int) -> None:
        """Say where tables lie that lie nowhere yet."""
        if self.phase is not Phase.RUNNING:
            return
        servers = self.roster.live(Role.SERVER)
        who = [state.member.incarnation for state in self.roster.live(Role.WORKER)]
        number, able = self.view.number + 1, [s.member.incarnation for s in servers]
        if able and self.declared.place(number, able, who, self.limits.replicas):
            for state in servers:
                self._send_tables(state)
            self._mend(now_ns, is_changed=True)

    def _mend(self, now_ns: int, *, is_changed: bool = False) -> None:
        """Let chains take their steps; whoever is told of a shard knows its table's spec."""
        is_stepping = self.chains.mend(self.view.number + 1)
        if self.chains.lost:
            self.endings.on_lost(now_ns, self.chains.lost_text())
        elif is_stepping or is_changed:
            self.new_view(now_ns)

    def _send_tables(self, state: MemberState) -> None:
        for number, table in enumerate(self.tables):
            self.out.append(Send(state.peer, AssignTable(number, table.spec)))

    def _on_plan(self, now_ns: int, state: MemberState, message: DeclarePlan) -> None:
        is_first = not self.plans
        reply = self.declared.plan(state.name, message, self.limits.workers)
        self.out.append(Send(state.peer, reply))
        if not is_first or not self.plans:
            return
        self._lease_check_ns = now_ns + LEASE_CHECK_MS * MS
        self._note_standby()
        self.new_view(now_ns)
        self.out += self.checkpoints.doubts(self.limits)
        self.out += self.checkpoints.write(self.limits, self.view.number)

    def _note_standby(self) -> None:
        """Say once that there are more workers than slots."""
        workers, slots = len(self.roster.live(Role.WORKER)), self.declared.slots
        if 0 < slots < workers and not self._is_standby_noted:
            self._is_standby_noted = True
            idle = f"{workers - slots} stand by and take backup tasks"
            self.out.append(Note(Level.WARNING, f"{workers} workers for {slots} slots: {idle}"))

    # ---- views and leases ---------------------------------------------------------------------

    def new_view(self, now_ns: int, better: Leases | None = None, why: str = "") -> None:
        """Make the next view and tell everybody; without ``better`` leases, only mend them."""
        workers = self.roster.live(Role.WORKER)
        current = self.view.leases
        found = better or Leases(0, self.balance.mended(current.workers))
        wanted, from_round = found.workers, found.from_round
        previous, leased = self.view.previous, current
        if wanted != current.workers:
            previous = current if from_round else Leases(0, wanted)
            leased = found
        previous = self.balance.repaired(previous, wanted)
        chief = self._chief(workers)
        places = self.declared.places
        members = [state.member for state in self.roster.live()]
        old, number, era = self.view, self.view.number + 1, self.view.era
        self.view = View(number, self.phase, chief, members, places, leased, previous, era)
        self.out += changes(old, self.view, self.roster.name_of, self.chains.moving, why)
        self.story.add(now_ns, f"view {self.view.number}: leases {wanted} from round {from_round}")
        # While the cluster forms, a view for everybody that joins would be a cube of the members.
        for state in [] if self.phase is Phase.FORMING else self.roster.live():
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
        if self.moves.begin(now_ns, self.view.number + 1) or better is not None:
            self.new_view(now_ns, better)

    def _send_view(self, now_ns: int, state: MemberState) -> None:
        state.view_sent_ns = now_ns
        self.out.append(Send(state.peer, self.view))

    # ---- rounds that need help ----------------------------------------------------------------

    def _on_round_late(self, now_ns: int, late: RoundLate) -> None:
        lacking = self.balance.unfinished(late, self.view.leases.workers)
        if lacking:
            self.endings.end(now_ns, Outcome.FAILED, lacking)
        for state, message in self.balance.help(now_ns, late, self.view):
            self.out.append(Send(state.peer, message))

    # ---- time ---------------------------------------------------------------------------------

    def _forgive_stall(self, now_ns: int) -> None:
        """A scheduler that was stopped itself heard nobody, which is no silence of theirs.

        What they said meanwhile may wait behind the message that is handled now.
        """
        slept_ns, self._handled_ns = now_ns - self._handled_ns, now_ns
        due_ns = self.next_deadline_ns() if slept_ns > LATE_MS * MS else None
        late_ns = 0 if due_ns is None else now_ns - due_ns
        for state in self.roster.live() if late_ns > LATE_MS * MS else []:
            left_ns = self._patience_ns(state) - self.limits.heartbeat_ns
            waits_ns = max(0, left_ns) if late_ns <= STALL_MS * MS else 0
            state.seen_ns = max(state.seen_ns, now_ns - waits_ns)

    def _patience_ns(self, state: MemberState) -> int:
        """How long a member may be silent: for ever so long if nobody could take its place."""
        is_alone = state.member.role is Role.SERVER and self.limits.replicas == 1
        return self.limits.server_dead_after_ns if is_alone else self.limits.dead_after_ns

    def _on_time(self, now_ns: int) -> None:
        if self.phase is Phase.ENDED:
            self._on_ended(now_ns)
            return
        for state in self.roster.live():
            is_silent = now_ns - state.seen_ns >= self._patience_ns(state)
            if is_silent and state.is_live and self.ending is None:  # else its end was that of all
                self.roster.part(state, Happening.SILENCE, None)
                self.endings.on_gone(now_ns, state, None, "")
        waited_ns = now_ns - self.forming_ns
        if self.phase is Phase.FORMING and waited_ns >= self.limits.form_timeout_ns:
            text = formation.missing_text(self.roster, self._wanted(), waited_ns)
            trained = (Outcome.DONE, "the job is done")
            how = trained if self.rollback.was_done else (Outcome.NOT_FORMED, text)
            self.endings.end(now_ns, *how)
        given_up = self.solitude.given_up(now_ns, is_done=self.roster.is_done)
        if given_up is not None:
            self.endings.end(now_ns, *given_up)
        if self.plans and now_ns >= self._lease_check_ns and self.phase is Phase.RUNNING:
            self._check_leases(now_ns)
        self.out += self.quorums.on_time(now_ns)

    def _on_ended(self, now_ns: int) -> None:
        if self.ending is not None:
            is_busy = bool(self.roster.live()) or self.checkpoints.is_writing
            self.out += self.farewell.end(now_ns, self.ending, is_busy=is_busy)

    def _wanted(self) -> dict[Role, int]:
        # After a way back one worker is enough to begin: the others join as they come.
        workers = 1 if self.rollback.count else self.limits.workers
        return {Role.SERVER: self.limits.servers, Role.WORKER: workers}

    def note(self, now_ns: int, text: str) -> None:
        """Tell the operator, and remember it for errors."""
        self.story.add(now_ns, text)
        self.out.append(Note(Level.INFO, text))
