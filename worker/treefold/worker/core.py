"""The worker's decisions: which slot is next, what is folded here, what is pushed and pulled.

Pure: no socket, clock, thread or tensor. The training thread calls (`DeclareCalled`, `TaskCalled`,
...) and is answered with `Complete` or `Fail`; between calls the core keeps the exchange going.
"""

from treefold.common import errors
from treefold.common.plan import LoopPlan, PlanKind
from treefold.common.spec import Rule
from treefold.common.story import Story
from treefold.wire.exchange import SCHEDULER, Level, Note, PeerLost, Received, Send, Tick
from treefold.wire.membership import MS, Membership, Standing
from treefold.wire.messages import (
    Accepted,
    Fenced,
    Flush,
    Grant,
    HeartbeatSeen,
    Leave,
    LeaveAsked,
    Published,
    Pulled,
    Refused,
    Registered,
    RoundStatus,
    Stop,
    View,
)
from treefold.wire.words import Code, Outcome, Phase
from treefold.worker import quorum
from treefold.worker.declarations import Declarations
from treefold.worker.effects import (
    STANDING_BY,
    AlignedCalled,
    Call,
    Complete,
    Contributed,
    DeclareCalled,
    DrainAsked,
    Effect,
    Event,
    Fail,
    HyperKnown,
    JoinCalled,
    LeaveCalled,
    LoopCalled,
    LoopEnd,
    ReleasePayload,
    Reported,
    SlotFinished,
    Snapshot,
    Task,
)
from treefold.worker.exchange import Exchange
from treefold.worker.forecast import MedianForecast
from treefold.worker.limits import ERRORS, WorkerLimits
from treefold.worker.pulls import Table
from treefold.worker.rounds import LocalRound
from treefold.worker.streams import newest_whole
from treefold.worker.waiting import describe

WAIT_NOTE_S = 30  # a wait this long is told to the operator, with what it waits for


class WorkerCore:
    """One worker: its membership, its tables, its place in the rounds.

    Parameters
    ----------
    membership : Membership
        The scheduler's side of this process's life.
    limits : WorkerLimits
        Times.
    """

    def __init__(self, membership: Membership, limits: WorkerLimits) -> None:
        self.membership = membership
        self.limits = limits
        self.story = Story()
        self.view: View | None = None
        self.plan: LoopPlan | None = None
        self.position = 0
        self.failure: Exception | None = None
        self.is_draining = False
        self._task_call: int | None = None
        self._leave_call: int | None = None
        self._join_call: int | None = None
        self._task_ns = 0
        self._forecast = MedianForecast()
        self._wait_note_ns: int | None = None
        self._started_ns: int | None = None
        self._server_ns = 0
        self._is_silence_noted = self._is_streaming = False
        self._out: list[Effect] = []
        self.exchange = Exchange(membership, limits.retry_ns, self._out)
        self.declarations = Declarations(membership, self._out)

    @property
    def tables(self) -> dict[int, Table]:
        """Declared tables, by number."""
        return self.exchange.tables

    @property
    def local(self) -> LocalRound | None:
        """The round being computed."""
        return self.exchange.local

    # ---- the interface of every core ----------------------------------------------------------

    def handle(self, now_ns: int, event: Event) -> list[Effect]:
        """Take in one event and say what is to be done."""
        if self._started_ns is None:
            self._started_ns = self._server_ns = now_ns
        else:
            stalled_ns = self.membership.forgive_stall(now_ns)
            self._started_ns += stalled_ns
            self._server_ns += stalled_ns
            self._task_ns += stalled_ns
        match event:
            case Received(peer, message) if peer == SCHEDULER:
                self._on_control(now_ns, message)
            case Received(_, message, payloads):
                self._server_ns = now_ns
                self._on_server(now_ns, message, payloads)
            case Contributed():
                self.exchange.contribute(event)
            case HyperKnown():
                self.exchange.know_hyper(event)
            case SlotFinished():
                self._on_finished(now_ns, event)
            case Reported(samples, loss, logged):
                self.membership.vitals.report(samples, loss, logged)
            case DrainAsked():
                self.is_draining = True
                self._serve_task(now_ns)
            case PeerLost() | Tick():
                pass
            case _:
                self._on_call(now_ns, event)
        self._on_time(now_ns)
        effects = list(self._out)
        self._out.clear()
        return effects

    def next_deadline_ns(self) -> int | None:
        """When a `Tick` is needed at the latest."""
        times = [self.membership.next_deadline_ns(), self._wait_note_ns]
        times += (self.exchange.next_deadline_ns(), self.declarations.next_deadline_ns())
        return min([time_ns for time_ns in times if time_ns is not None], default=None)

    def check_invariants(self) -> None:
        """Raise `InvariantError` if the state contradicts itself."""
        wrong = "" if self.local is None else self.local.contradiction(self.position)
        if wrong:
            raise errors.InvariantError(wrong, self.story.lines())

    # ---- calls of the training thread ---------------------------------------------------------

    def _on_call(self, now_ns: int, event: Call) -> None:
        if isinstance(event, LeaveCalled):
            self._on_leave_called(now_ns, event)
        elif self.failure is not None:
            self._out.append(Fail(event.call, self.failure))
        elif isinstance(event, JoinCalled):
            self._join_call = event.call
            self._serve_join()
        elif isinstance(event, DeclareCalled):
            self.declarations.add(now_ns, event)
        elif isinstance(event, LoopCalled):
            self.plan = self.exchange.plan = event.plan
            self.exchange.local = None
            self.declarations.add(now_ns, event)
        elif isinstance(event, AlignedCalled):
            self.exchange.alignment.begin(now_ns, event.call)
        else:
            self._task_call = event.call
            self._is_streaming = event.is_streaming
            self._wait_note_ns = now_ns + WAIT_NOTE_S * 1000 * MS
            if event.is_torn:
                self.exchange.begin_anew(now_ns, self.position)
            self._serve_task(now_ns)

    def _serve_join(self) -> None:
        is_formed = self.view is not None and self.view.phase is Phase.RUNNING
        if self._join_call is not None and is_formed and self.membership.is_member:
            self._out.append(Complete(self._join_call, None))
            self._join_call = None

    def _on_leave_called(self, now_ns: int, event: LeaveCalled) -> None:
        self._leave_call = event.call
        self._out += self.membership.leave(now_ns, event.outcome, event.text)

    # ---- the scheduler ------------------------------------------------------------------------

    def _on_control(self, now_ns: int, message: object) -> None:
        match message:
            case Registered():
                self._on_registered(now_ns, message)
            case HeartbeatSeen():
                self.membership.on_heartbeat_seen(now_ns, message)
            case Fenced():
                if self.membership.on_fenced(now_ns, message):
                    text = "the scheduler had given this worker up; it registers again and goes on"
                    self._out.append(Note(Level.WARNING, text))
            case Accepted():
                self._on_accepted(now_ns, message)
            case View():
                self._on_view(now_ns, message)
            case LeaveAsked(who):
                self.is_draining |= who == self.membership.incarnation
                self._serve_task(now_ns)
            case Grant() | Flush():
                self._on_late_round(now_ns, message)
            case Refused():
                self._on_refused(message)
            case Stop():
                self._on_stop(message)
            case _:
                text = f"the scheduler sent {type(message).__name__}: ignored"
                self._out.append(Note(Level.WARNING, text))

    def _on_late_round(self, now_ns: int, message: Grant | Flush) -> None:
        older = self.exchange.stream.older
        if isinstance(message, Grant) and older is not None and message.round == older.number:
            self._turn_back(now_ns, message.slots)
        local = self.local
        if local is None or message.round != local.number or self.exchange.asynchronous.is_on:
            return
        if isinstance(message, Grant):
            local.assign(message.slots)
            self._serve_task(now_ns)
            return
        self.exchange.sending.push(local.flush(), local)

    def _on_registered(self, now_ns: int, message: Registered) -> None:
        if self.membership.job not in (0, message.job):
            self._fail(errors.JobFailedError("the scheduler at this address runs another job now"))
            return
        if not self.membership.on_registered(now_ns, message):
            return
        self.membership.job = message.job
        self.declarations.renew(now_ns)
        self._serve_join()  # the view may have overtaken the answer that names us

    def _on_accepted(self, now_ns: int, message: Accepted) -> None:
        declared = self.declarations.pop(message.call)
        if isinstance(declared, LoopCalled):
            self._out.append(Complete(declared.call, None))
        elif declared is not None:
            known = self.tables.get(message.number)
            if known is None:
                known = Table(declared.spec, message.number, declared.call)
                self.tables[message.number] = known
            elif known.declare_call is None:  # the first version could not be read to its end
                known.declare_call = declared.call
                known.pulls = {}
            self.exchange.settle(now_ns, self.view)

    def _on_view(self, now_ns: int, view: View) -> None:
        if self.view is not None and view.number <= self.view.number:
            return
        if self.view is not None and view.era != self.view.era:
            self._fail(errors.RolledBackError("the job has gone back to a checkpoint: begin anew"))
        self.view = view
        self.exchange.link(view)
        if self.failure is not None:
            return
        self.membership.vitals.view = view.number
        self.story.add(now_ns, f"view {view.number}")
        self._serve_join()
        self.exchange.settle(now_ns, self.view)
        if self.exchange.stream.older is not None:
            self._turn_back(now_ns, self._leased(self.position - 1))
        self._serve_task(now_ns)

    def _on_refused(self, message: Refused) -> None:
        if message.code is Code.STALE_VIEW:
            return  # the newer view is on its way, and the next retry names it
        error = ERRORS[message.code](message.text)
        declared = self.declarations.pop(message.call) if message.call else None
        if declared is not None:
            self._out.append(Fail(declared.call, error))
        elif not message.call:
            self._fail(error)

    def _on_stop(self, message: Stop) -> None:
        is_told_twice = self.membership.standing is Standing.GONE
        self.membership.on_stop(message)
        if self._leave_call is not None:
            self._finish_leaving()
            return
        if is_told_twice:
            return
        self._out.append(Send(SCHEDULER, Leave(self.membership.incarnation, message.outcome, "")))
        is_formed = message.outcome is not Outcome.NOT_FORMED
        self._fail((errors.JobFailedError if is_formed else errors.FormationError)(message.text))

    def _finish_leaving(self) -> None:
        call, self._leave_call = self._leave_call, None
        self._out += [] if call is None else [Complete(call, None)]

    def _fail(self, error: Exception) -> None:
        """Nothing can go on: every call that waits fails now, every later one at once."""
        self.failure = error
        waiting = [*self.declarations.clear(), self._task_call, self._join_call]
        waiting += self.exchange.calls
        for call in dict.fromkeys(call for call in waiting if call is not None):
            self._out.append(Fail(call, error))
        self._task_call = self._join_call = self._wait_note_ns = None
        self.exchange.fail(error)

    # ---- servers ------------------------------------------------------------------------------

    def _on_server(self, now_ns: int, message: object, payloads: tuple[int, ...]) -> None:
        if isinstance(message, Pulled):
            self._on_pulled(now_ns, self.exchange.take(now_ns, message, payloads))
            return
        self._out += [ReleasePayload(payload) for payload in payloads]
        if isinstance(message, Published):
            self._on_pulled(now_ns, self.exchange.take_word(now_ns, message))
        elif isinstance(message, RoundStatus):
            self.exchange.on_status(now_ns, message)
        elif isinstance(message, Refused):
            self._on_refused(message)

    def _on_pulled(self, now_ns: int, table: Table | None) -> None:
        """A table has all of a version."""
        if table is None:
            return
        if table.declare_call is None:
            self._serve_task(now_ns)
        elif self.exchange.is_consistent(now_ns, table):
            call, table.declare_call = table.declare_call, None
            if table.spec.rule is Rule.OPTIMIZER and not table.spec.is_asynchronous:
                self.position = max(self.position, table.pulled_version)
            self._out.append(Complete(call, table.snapshot()))

    # ---- rounds -------------------------------------------------------------------------------

    def _serve_task(self, now_ns: int) -> None:
        """Answer the script's call for its next slot, if there is an answer."""
        if self._task_call is None or self.view is None:
            return
        if self.exchange.asynchronous.is_on:
            self._serve_slot(now_ns)
            return
        self.exchange.catch_up(now_ns, self.position)
        snapshots = self._advance(now_ns)
        if not self.exchange.is_at(self.position):
            return
        plan, trained = self.plan, self.exchange.trained()
        if self.is_draining or plan is None or quorum.is_over(trained, plan, self.position):
            self.exchange.sending.push(self.local.flush() if self.local else [], self.local)
            end = quorum.end_round(trained, self.position)
            self._answer_task(LoopEnd(end, snapshots, self.is_draining))
            return
        local = self._open_round(now_ns)
        slot = local.next_slot()
        if slot is not None:
            self._task_ns = now_ns
            self._answer_task(local.task(slot, snapshots))
        elif snapshots:
            self._answer_task(Task(self.position, STANDING_BY, snapshots))

    def _serve_slot(self, now_ns: int) -> None:
        own, leased = self.exchange.asynchronous, self._leased(1 << 62)
        reply = own.reply(now_ns, self.plan, leased, is_draining=self.is_draining)
        if isinstance(reply, Task) and reply.slot != STANDING_BY:
            self.position = self.membership.vitals.round = reply.round
            self._task_ns = now_ns
        self._answer_task(reply)

    def _answer_task(self, value: Task | LoopEnd | None) -> None:
        if self._task_call is not None and value is not None:
            self._out.append(Complete(self._task_call, value))
            self._task_call = self._wait_note_ns = None

    def _advance(self, now_ns: int) -> list[Snapshot]:
        """Move on to the newest version that every table is at, if it is a newer one."""
        newest = newest_whole(self.exchange, now_ns)
        if newest is None:
            return self._begin_early(now_ns)
        if self.local is None or self.local.number != newest:  # else it was loaded once more
            self.exchange.drop_round()
        self.position = self.membership.vitals.round = newest
        return self.exchange.hand_over()

    def _begin_early(self, now_ns: int) -> list[Snapshot]:
        """Move on to a version that is not all here, if the script can compute with that."""
        plan, version = self.plan, self.position + 1
        if plan is None or plan.kind is not PlanKind.SLOTS or version >= plan.end_round:
            return []
        is_able = self._is_streaming and not self.is_draining
        if not is_able or not self.exchange.stream.can_begin(version):
            return []
        if not any(slot < plan.active_slots(version) for slot in self._leased(version)):
            return []
        self.position = self.membership.vitals.round = version
        return self.exchange.stream.begin(now_ns, version)

    def _turn_back(self, now_ns: int, slots: list[int]) -> None:
        """Compute more slots of the round before, if that is what others wait for."""
        position = self.exchange.stream.turn_back(now_ns, slots)
        if position is not None:
            self.position = self.membership.vitals.round = position

    def _open_round(self, now_ns: int) -> LocalRound:
        """The round being computed, with the slots that this worker leases in it."""
        if self.plan is None or self.view is None:
            raise errors.InvariantError("a round without a plan", self.story.lines())
        local, trained = self.exchange.local, self.exchange.trained()
        if local is None:
            tried = quorum.tried(trained, self.plan)
            local = self.exchange.open_round(self.position, self.plan, tried)
        for table in trained:
            if not table.pulls:
                self.exchange.pull(now_ns, table, self.position + 1, attempt=0)
        local.assign(self._leased(self.position))
        return local

    def _leased(self, round_: int) -> list[int]:
        """The slots of a round that are leased to this worker."""
        view, me = self.view, self.membership.incarnation
        if view is None:
            return []
        leases = view.leases if round_ >= view.leases.from_round else view.previous
        return [slot for slot, who in enumerate(leases.workers) if who == me]

    def _on_finished(self, now_ns: int, event: SlotFinished) -> None:
        self.membership.vitals.slot_time_ns = self._forecast.add(now_ns - self._task_ns)
        self.exchange.finish(event)
        if self.exchange.asynchronous.is_on and self.plan is not None:
            self.exchange.asynchronous.finish(now_ns, self.plan, self._leased(1 << 62))

    # ---- time ---------------------------------------------------------------------------------

    def _on_time(self, now_ns: int) -> None:
        due_ns = self.membership.next_deadline_ns()
        if due_ns is not None and now_ns >= due_ns:
            self.membership.vitals.tables = len(self.tables)
            self.membership.vitals.waiting = self._waiting_for()
            own, leased = self.exchange.asynchronous, self._leased(1 << 62)
            own.report(self.membership.vitals, self.plan, leased, self._task_call is not None)
            if self.local is not None and self.local.in_hand is not None:
                so_far_ns = now_ns - self._task_ns
                self.membership.vitals.slot_time_ns = self._forecast.while_in_hand(so_far_ns)
            self._out += self.membership.tick(now_ns)
        self.declarations.retry(now_ns)
        self.exchange.retry(now_ns)
        if self.membership.standing is Standing.GONE:
            self._finish_leaving()
        self._check_waits(now_ns)

    def _check_waits(self, now_ns: int) -> None:
        waited_ns = now_ns - (self._started_ns or 0)
        is_named = self.membership.standing is not Standing.JOINING or self.membership.incarnation
        if not is_named and waited_ns > self.limits.connect_timeout_ns and self.failure is None:
            self.membership.give_up()
            waited = f"no scheduler answered within {waited_ns / 1e9:.0f} s"
            self._fail(errors.SchedulerLostError(f"{waited}; is it running at this address?"))
        is_silent = self.membership.is_silent(now_ns)
        if is_silent and not self._is_silence_noted:
            text = "the scheduler does not answer; training goes on, changes wait for it"
            self._out.append(Note(Level.WARNING, text))
        self._is_silence_noted = is_silent
        self._check_scheduler(now_ns)
        self._check_servers(now_ns)

    def _check_scheduler(self, now_ns: int) -> None:
        """What only the scheduler can answer is not waited for without end."""
        quiet_ns = now_ns - self.membership.heard_ns
        if quiet_ns <= self.limits.unreachable_ns or self.membership.incarnation == 0:
            return
        is_waiting = self.declarations.is_waiting or self.exchange.is_unplaced
        if is_waiting or self._join_call is not None:
            text = f"the scheduler has not answered for {quiet_ns / 1e9:.0f} s; is it still there?"
            self._fail(errors.SchedulerLostError(text))

    def _check_servers(self, now_ns: int) -> None:
        quiet_ns = now_ns - max(self._server_ns, self.exchange.asked_ns)
        is_quiet = quiet_ns > self.limits.unreachable_ns and self.exchange.is_asking
        if now_ns - self.membership.heard_ns > self.limits.unreachable_ns:
            quiet_ns = self.exchange.quiet_ns(now_ns)  # nobody replaces a server that is silent
            is_quiet |= quiet_ns > self.limits.unreachable_ns
        if is_quiet and (self._task_call is not None or self.exchange.is_waited_for):
            text = f"no server answered for {quiet_ns / 1e9:.0f} s; {self._waiting_for()}"
            self._fail(errors.UnavailableError(text))
        elif self._wait_note_ns is not None and now_ns >= self._wait_note_ns:
            self._wait_note_ns = now_ns + WAIT_NOTE_S * 1000 * MS
            self._out.append(Note(Level.WARNING, f"still waiting: {self._waiting_for()}"))

    def _waiting_for(self) -> str:
        """What this worker waits for, in words; empty while it computes."""
        if self.membership.standing is Standing.JOINING:
            return "the scheduler's answer"
        if self._task_call is None and not self.exchange.is_declaring:
            return ""
        return describe(self.tables.values(), self.view) or "a slot"
