"""The launcher's decisions: what to start, what an ended process means, when and how all is over.

Pure: no process, socket, clock or signal. What it must never do: start a worker again whose job has
ended, or end itself while a process is left.
"""

import signal
from dataclasses import dataclass, field
from enum import Enum, auto

from treefold.common.errors import InvariantError
from treefold.common.story import Story
from treefold.launch.effects import (
    AddressKnown,
    AskStatus,
    BeginAttempt,
    Effect,
    EndProcess,
    Event,
    Finish,
    KillProcess,
    ProcessExited,
    Say,
    StartProcess,
    StatusSeen,
    StopAsked,
    Tick,
    describe_exit,
    signal_name,
)

MS = 1_000_000
SETTLE_MS = 500  # after a failure, for other processes' ends that belong to it to be seen as well
STATUS_PATIENCE_MS = 2_000  # how long a decision waits for the scheduler's view of things
VICTIMS_MS = 3_000  # how long workers may take to end when their job has failed
DRAIN_MS = 5_000  # for workers to finish their slot and leave, then they are killed
FAREWELL_MS = 4_000  # for the scheduler to let its members go, then it is killed
SAVING_MAX_MS = 600_000  # the same, if servers write checkpoints, for which it waits itself
SERVERS_MS = 2_000  # for servers that nobody told to stop
SHORT_LIFE_MS = 5_000  # a process that dies sooner may never have begun to work
CRASHED_MAX = 4  # lives in a row without work that end by its own fault, then it is given up
KILLED_MAX = 50  # the same, if somebody else ends them
KILLING = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
OK, FAILED, USAGE, NOT_FORMED = 0, 1, 2, 3
SIGNALLED = 128  # exit codes of a run that was stopped by a signal begin here, as in shells
SCHEDULER = "scheduler"


class Stage(Enum):
    """Where the launch stands."""

    NEW = auto()
    RUNNING = auto()
    CLOSING = auto()  # everything is being ended, in order
    RESTARTING = auto()  # everything is being killed and will be started again
    OVER = auto()


class Turn(Enum):
    """What moves a launch from one stage to the next."""

    BEGUN = auto()
    DECIDED = auto()
    STATE_LOST = auto()
    EMPTIED = auto()


TRANSITIONS: dict[tuple[Stage, Turn], Stage] = {
    (Stage.NEW, Turn.BEGUN): Stage.RUNNING,
    (Stage.RUNNING, Turn.DECIDED): Stage.CLOSING,
    (Stage.RUNNING, Turn.STATE_LOST): Stage.RESTARTING,
    (Stage.RESTARTING, Turn.DECIDED): Stage.CLOSING,
    (Stage.RESTARTING, Turn.EMPTIED): Stage.RUNNING,
    (Stage.CLOSING, Turn.EMPTIED): Stage.OVER,
}


class Role(Enum):
    """What a process is in the cluster."""

    SCHEDULER = auto()
    SERVER = auto()
    WORKER = auto()


@dataclass(slots=True)
class Process:
    """One process of the launch: None as ``code`` while it runs, negative if a signal ended it.

    ``lives`` counts its starts.
    ``idle_lives`` counts how often in a row it died soon after its start and before the job had
    come any further with it as a member: killed by others (True) or by a fault of its own (False).
    ``is_drained``: it left because it was told to.
    """

    name: str
    role: Role
    is_alive: bool = False
    code: int | None = None
    started_ns: int = 0
    lives: int = 0
    first_round: int = 0
    idle_lives: dict[bool, int] = field(default_factory=dict)
    is_drained: bool = False

    @property
    def has_failed(self) -> bool:
        """Whether it ended otherwise than well."""
        return self.code is not None and self.code != OK

    @property
    def is_too_late(self) -> bool:
        """Whether it was started again, and found no cluster any more."""
        return self.code == NOT_FORMED and self.lives > 1

    @property
    def is_done(self) -> bool:
        """Whether it ended well, with nothing left to do."""
        return self.code == OK and not self.is_drained


@dataclass(frozen=True, slots=True)
class LaunchLimits:
    """How many processes there are, and how often a dead one is started again.

    With ``is_safe`` every shard has several servers, or there are checkpoints, and the scheduler
    has a journal: then whatever dies is started again, as often as it takes, and the job goes on.
    With ``is_journaled`` that goes for the scheduler at least. With ``is_saving`` servers may have
    to write a last checkpoint.
    """

    servers: int
    workers: int
    max_restarts: int
    is_safe: bool = False
    is_journaled: bool = False
    is_saving: bool = False


@dataclass(slots=True)
class _Job:
    """What the scheduler of this attempt says of the job."""

    phase: str = "forming"
    is_leased: bool = True
    outcome: str = ""
    text: str = ""
    round: int = 0


@dataclass(slots=True)
class _Failures:
    """Failed workers that nothing was decided about yet."""

    names: list[str] = field(default_factory=list)
    first_ns: int = 0
    last_ns: int = 0
    status_ns: int = 0

    def add(self, now_ns: int, name: str) -> None:
        if not self.names:
            self.first_ns = now_ns
        self.names.append(name)
        self.last_ns = now_ns


class LaunchCore:
    """The launch of one script.

    Parameters
    ----------
    limits : LaunchLimits
        Sizes and bounds.
    """

    def __init__(self, limits: LaunchLimits) -> None:
        self.limits = limits
        self.story = Story()
        self.stage = Stage.NEW
        self.verdict = OK
        self.restarts = 0
        self.processes: dict[str, Process] = {}
        self._job = _Job()
        self._failures = _Failures()
        self._asked: dict[Role, int] = {}
        self._stops = 0
        self._out: list[Effect] = []

    # ---- the interface of every core -------------------------------------------------------------

    def handle(self, now_ns: int, event: Event) -> list[Effect]:
        """Take in one event and say what is to be done."""
        self._out = []
        self.story.add(now_ns, str(event))
        match event:
            case AddressKnown():  # of a scheduler that was started again it is known already
                self._start(now_ns, Role.SERVER, Role.WORKER)
            case ProcessExited(name, code):
                self._on_exited(now_ns, self.processes[name], code)
            case StatusSeen():
                self._on_status(event)
            case StopAsked(number):
                self._on_stop_asked(number)
            case Tick():
                if self.stage is Stage.NEW:
                    self._begin(now_ns, Turn.BEGUN)
        self._on_time(now_ns)
        return self._out

    def next_deadline_ns(self) -> int | None:
        """When a `Tick` is needed at the latest."""
        if self.stage is Stage.CLOSING:
            return min(self._asked.values(), default=None)
        if self.stage is Stage.RUNNING and self._failures.names:
            return self._due_ns()
        return None

    def check_invariants(self) -> None:
        """Raise `InvariantError` if the state contradicts itself."""
        alive = [process.name for process in self.processes.values() if process.is_alive]
        if self.stage is Stage.OVER and alive:
            raise InvariantError(f"the launch is over and {alive} are left", self.story.lines())
        if self.restarts > self.limits.max_restarts:
            raise InvariantError(f"{self.restarts} restarts", self.story.lines())

    # ---- starting --------------------------------------------------------------------------------

    def _begin(self, now_ns: int, turn: Turn) -> None:
        self._move(turn)
        self._job = _Job()
        self._failures = _Failures()
        self._asked = {}
        counts = {Role.SERVER: self.limits.servers, Role.WORKER: self.limits.workers}
        self.processes = {SCHEDULER: Process(SCHEDULER, Role.SCHEDULER)}
        for role, count in counts.items():
            names = [f"{role.name.lower()}-{number}" for number in range(count)]
            self.processes |= {name: Process(name, role) for name in names}
        self._out.append(BeginAttempt())
        self._start(now_ns, Role.SCHEDULER)

    def _start(self, now_ns: int, *roles: Role) -> None:
        """Start those that never were."""
        if self.stage is Stage.RUNNING:
            for process in self._of(*roles):
                if not process.is_alive and process.code is None:
                    self._start_one(now_ns, process)

    def _start_one(self, now_ns: int, process: Process) -> None:
        process.is_alive, process.code = True, None
        process.started_ns, process.first_round = now_ns, self._job.round
        process.lives += 1
        self._out.append(StartProcess(process.name))

    def _of(self, *roles: Role) -> list[Process]:
        return [process for process in self.processes.values() if process.role in roles]

    def _alive(self, *roles: Role) -> list[Process]:
        return [process for process in self._of(*roles) if process.is_alive]

    # ---- events ----------------------------------------------------------------------------------

    def _on_exited(self, now_ns: int, process: Process, code: int) -> None:
        process.is_alive, process.code = False, code
        if self.stage is not Stage.RUNNING or not process.has_failed:
            return
        if self._is_revived(now_ns, process):
            self._out.append(Say(f"{_told(process)}: started again, and the others go on"))
            self._start_one(now_ns, process)
        else:
            self._failures.add(now_ns, process.name)
            self._out.append(AskStatus())

    def _is_revived(self, now_ns: int, process: Process) -> bool:
        """Whether a process that failed takes up its place again without further ado."""
        code, is_scheduler = process.code or 0, process.role is Role.SCHEDULER
        is_replaceable = self.limits.is_safe or (is_scheduler and self.limits.is_journaled)
        if not is_replaceable or self._job.outcome or code in (USAGE, NOT_FORMED):
            return False
        if is_scheduler and code > OK:  # it has ended the job itself
            return False
        if process.role is Role.WORKER:
            is_script = code > OK or not self._job.is_leased
            if is_script or self._is_any_done():
                return False
        is_short = now_ns - process.started_ns < SHORT_LIFE_MS * MS
        if not is_short:
            process.idle_lives = {}
        is_killed = -code in KILLING
        count = process.idle_lives[is_killed] = process.idle_lives.get(is_killed, 0) + is_short
        return count <= (KILLED_MAX if is_killed else CRASHED_MAX)

    def _on_status(self, seen: StatusSeen) -> None:
        self._job.phase, self._job.is_leased = seen.phase, seen.is_leased
        self._job.round = max(self._job.round, seen.round)
        self._failures.status_ns = seen.asked_ns
        if seen.outcome:
            self._job.outcome, self._job.text = seen.outcome, seen.text
        for process in self.processes.values():
            process.is_drained |= process.name in seen.drained
            if process.name in seen.members and seen.round > process.first_round:
                process.idle_lives = {}
        # The scheduler is no member, and has worked if anybody has.
        scheduler = self.processes[SCHEDULER]
        if scheduler.is_alive and seen.round > scheduler.first_round:
            scheduler.idle_lives = {}

    def _on_stop_asked(self, number: int) -> None:
        self._stops += 1
        name = signal_name(number)
        if self._stops == 1 and self.stage in (Stage.RUNNING, Stage.RESTARTING):
            self._out.append(Say(f"{name}: ending the job; once more kills it at once"))
            self._close(SIGNALLED + number)
        elif self.stage in (Stage.CLOSING, Stage.RESTARTING):
            self._out.append(Say(f"{name}: killing what is left"))
            self._kill(*Role)

    # ---- time ------------------------------------------------------------------------------------

    def _on_time(self, now_ns: int) -> None:
        if self.stage is Stage.RUNNING:
            self._look_around(now_ns)
        if self.stage is Stage.RESTARTING and not self._alive(*Role):
            self._begin(now_ns, Turn.EMPTIED)
        if self.stage is Stage.CLOSING:
            self._go_on_closing(now_ns)

    def _look_around(self, now_ns: int) -> None:
        """Decide about failures that have settled; end a job whose workers have all ended."""
        if self._failures.names:
            if now_ns < self._due_ns():
                return
            self._decide(now_ns)
        is_over = all(process.code is not None for process in self._of(Role.WORKER))
        if is_over and self.stage is Stage.RUNNING:
            self._close(OK)

    def _due_ns(self) -> int:
        """When to decide about the failures: not before what they belong to can be known."""
        failures = self._failures
        settled_ns = failures.first_ns + SETTLE_MS * MS
        if self._has_failed_job() and self._alive(Role.WORKER):
            return failures.first_ns + VICTIMS_MS * MS
        is_known = failures.status_ns >= failures.last_ns or not self._alive(Role.SCHEDULER)
        return settled_ns if is_known else failures.last_ns + STATUS_PATIENCE_MS * MS

    def _has_failed_job(self) -> bool:
        """Whether the scheduler has ended the job otherwise than well."""
        [scheduler] = self._of(Role.SCHEDULER)
        return self._job.outcome in ("failed", "not_formed") or (scheduler.code or 0) > OK

    def _move(self, turn: Turn) -> None:
        after = TRANSITIONS.get((self.stage, turn))
        if after is None:
            raise InvariantError(f"{turn.name} in stage {self.stage.name}", self.story.lines())
        self.stage = after

    # ---- what a failure means --------------------------------------------------------------------

    def _decide(self, now_ns: int) -> None:
        """Say what the failures that have settled come to."""
        failed = [self.processes[name] for name in self._failures.names]
        self._failures = _Failures()
        workers = [process for process in failed if process.role is Role.WORKER]
        roles = [process for process in self._of(Role.SCHEDULER, Role.SERVER) if process.has_failed]
        if self._job.outcome == "not_formed" or any(p.code in (USAGE, NOT_FORMED) for p in roles):
            why = self._job.text or f"the cluster has not formed: {_named(roles)}"
            self._give_up(NOT_FORMED, why)
        elif self._is_trained():
            self._on_late_failures(workers)
        elif roles or self._has_failed_job() or not self._job.is_leased:
            self._on_job_failed(roles or workers)
        else:
            for process in workers:
                if self.stage is Stage.RUNNING:
                    self._on_worker_failed(now_ns, process)

    def _is_trained(self) -> bool:
        """Whether the job itself is done, so that no process is needed any more."""
        return self._job.outcome in ("done", "drained") or (
            not self._has_failed_job() and not self._alive(Role.WORKER) and self._is_any_done()
        )

    def _is_any_done(self) -> bool:
        return any(process.is_done for process in self._of(Role.WORKER))

    def _on_late_failures(self, workers: list[Process]) -> None:
        """Workers failed when there was nothing left to train: nothing can be started again."""
        codes = [process.code or OK for process in workers if not process.is_too_late]
        failing = next((code for code in codes if code > OK), OK)
        if failing:
            self._give_up(failing, _named(workers))
        for process in workers if not failing else []:
            self._out.append(Say(f"{_told(process)}; the job was done already"))

    def _on_job_failed(self, failed: list[Process]) -> None:
        """Something is gone that nobody can replace: all begins again or ends."""
        killed = [process for process in failed if (process.code or 0) < OK]
        cause = _named(killed) or self._job.text or _named(failed)
        if self._can_restart():
            self.restarts += 1
            again = f"the whole job starts again from the beginning ({self._restarts_text()})"
            lost = "without checkpoints the state of the job is lost"
            self._out.append(Say(f"{cause}: {lost}, and {again}"))
            self._move(Turn.STATE_LOST)
            self._kill(*Role)
            return
        scripts = [process for process in self._of(Role.WORKER) if (process.code or 0) > OK]
        if killed or not scripts:
            self._give_up(FAILED, cause)
        else:
            self._give_up(scripts[0].code or FAILED, _named(scripts))

    def _on_worker_failed(self, now_ns: int, process: Process) -> None:
        """One worker ended badly while the job goes on."""
        code = process.code or 0
        if self._can_restart() and not self._is_any_done():
            self.restarts += 1
            self._out.append(Say(f"{_told(process)}: started again ({self._restarts_text()})"))
            self._start_one(now_ns, process)
        elif code > OK:
            self._give_up(code, _told(process))
        elif self._job.phase == "forming":
            self._give_up(NOT_FORMED, f"{_told(process)} before the cluster had formed")
        elif self._alive(Role.WORKER):
            text = f"{_told(process)}: its slots go to the others and training goes on"
            self._out.append(Say(text))
        elif not self._is_any_done():
            self._give_up(FAILED, f"{_told(process)} and no worker is left")

    def _can_restart(self) -> bool:
        return self.restarts < self.limits.max_restarts

    def _restarts_text(self) -> str:
        return f"restart {self.restarts} of {self.limits.max_restarts}"

    # ---- endings ---------------------------------------------------------------------------------

    def _give_up(self, code: int, why: str) -> None:
        self._out.append(Say(f"{why}; ending the run"))
        self._close(code)

    def _close(self, code: int) -> None:
        self.verdict = code
        self._move(Turn.DECIDED)
        if code >= SIGNALLED or code == OK:
            return
        codes = [process.code or 0 for process in self._of(Role.WORKER)]
        if code == FAILED and any(other > FAILED for other in codes):
            self.verdict = next(other for other in codes if other > FAILED)

    def _go_on_closing(self, now_ns: int) -> None:
        """End workers, then the scheduler, which lets servers go, then servers that are left."""
        farewell_ms = SAVING_MAX_MS if self.limits.is_saving else FAREWELL_MS
        patience = {Role.WORKER: DRAIN_MS, Role.SCHEDULER: farewell_ms, Role.SERVER: SERVERS_MS}
        for role, patience_ms in patience.items():
            if not self._alive(role):
                self._asked.pop(role, None)
                continue
            if role not in self._asked:
                self._asked[role] = now_ns + patience_ms * MS
                self._out += [EndProcess(process.name) for process in self._alive(role)]
            elif now_ns >= self._asked[role]:
                self._asked[role] = now_ns + patience_ms * MS
                self._kill(role)
            return
        is_unformed = self._of(Role.SCHEDULER)[0].code == NOT_FORMED
        if is_unformed and OK < self.verdict < SIGNALLED:
            self.verdict = NOT_FORMED
        self._move(Turn.EMPTIED)
        self._out.append(Finish(self.verdict))

    def _kill(self, *roles: Role) -> None:
        self._out += [KillProcess(process.name) for process in self._alive(*roles)]


def _told(process: Process) -> str:
    return f"{process.name} {describe_exit(process.code or 0)}"


def _named(processes: list[Process]) -> str:
    return ", ".join(_told(process) for process in processes)
