"""A member's side of membership: register, beat, register again when given up, leave.

Servers and workers hold one of these inside their core. It is as pure as a core: time comes in as
an argument, messages to send go out as a list.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import msgspec

from treefold.common.facts import HostFacts
from treefold.wire.exchange import SCHEDULER, Send
from treefold.wire.messages import (
    Fenced,
    Heartbeat,
    HeartbeatSeen,
    Leave,
    Register,
    Registered,
    Stop,
)
from treefold.wire.words import PROTOCOL_VERSION, Facts, Figure, Outcome, Role

MS = 1_000_000
REGISTER_RETRY_MS = 500
LEAVE_RETRY_MS = 200
LEAVE_TRIES_MAX = 15  # then the scheduler is taken for dead and the member leaves unanswered
STALL_MS = 1_000  # a process that is so late for its own deadline was stopped, not just busy
FACTS_BEATS = 8  # heartbeats from one in which the host is told of to the next
SILENCE_WARNING_BEATS = 10  # heartbeats without an answer before the operator hears of it


class Standing(Enum):
    """Where a member stands with the scheduler."""

    JOINING = auto()
    MEMBER = auto()
    LEAVING = auto()
    GONE = auto()


class Step(Enum):
    """What can happen to a member."""

    REGISTERED = auto()
    FENCED = auto()
    LEAVE_WANTED = auto()
    STOPPED = auto()
    GIVEN_UP = auto()


TRANSITIONS: dict[tuple[Standing, Step], Standing] = {
    (Standing.JOINING, Step.REGISTERED): Standing.MEMBER,
    (Standing.JOINING, Step.LEAVE_WANTED): Standing.LEAVING,
    (Standing.JOINING, Step.STOPPED): Standing.GONE,
    (Standing.JOINING, Step.GIVEN_UP): Standing.GONE,
    (Standing.MEMBER, Step.FENCED): Standing.JOINING,
    (Standing.MEMBER, Step.LEAVE_WANTED): Standing.LEAVING,
    (Standing.MEMBER, Step.STOPPED): Standing.GONE,
    (Standing.LEAVING, Step.STOPPED): Standing.GONE,
    (Standing.LEAVING, Step.GIVEN_UP): Standing.GONE,
}
"""A pair that is missing here changes nothing: the message is late or repeated."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a process says of itself when it registers.

    ``nonce`` is random, from the shell; ``rank`` the one it would like to have, -1 for any.
    """

    role: Role
    nonce: int
    address: str
    host: str
    pid: int
    package: str
    rank: int = -1


@dataclass(slots=True)
class Vitals:
    """What a heartbeat reports; its core fills in what it knows, its shell the process figures."""

    view: int = 0
    tables: int = 0
    round: int = 0
    slot_time_ns: int = 0
    samples: int = 0
    loss: float | None = None
    waiting: str = ""
    rss_bytes: int = 0
    cpu_percent: float = 0.0
    spent_ns: dict[str, int] = field(default_factory=dict)
    norms: list[tuple[int, int, float]] = field(default_factory=list)
    saving: int = 0
    staleness: list[tuple[int, int, list[int]]] = field(default_factory=list)
    spare: list[int] = field(default_factory=list)
    is_idle: bool = False
    metrics: str = ""
    host: HostFacts | None = None
    logged: dict[str, tuple[int, float]] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)

    def report(
        self, samples: int, loss: float | None, logged: Sequence[tuple[str, int, float]]
    ) -> None:
        """Take in what the script of a worker has done and said."""
        self.samples, self.loss = samples, loss
        for name, number, value in logged:
            self.logged[name] = number, value


@dataclass(slots=True)
class Membership:
    """The member's half of the registration and heartbeat protocol.

    Attributes
    ----------
    standing : Standing
        Where this member stands.
    incarnation, rank, job : int
        As the scheduler gave them; 0 before.
    origin : int
        The first incarnation of this process. What it sends to servers and what it writes down bear
        this one, so that they go together even if it had to register again in between.
    heard_ns : int
        When the scheduler last answered anything.
    is_watched : bool
        Whether somebody looks at what this member can tell of tensors.
    """

    identity: Identity
    vitals: Vitals = field(default_factory=Vitals)
    standing: Standing = Standing.JOINING
    incarnation: int = 0
    origin: int = 0
    rank: int = 0
    job: int = 0
    servers: int = 0
    workers: int = 0
    checkpoint: str = ""
    checkpoint_every: int = 0
    heartbeat_ns: int = 500 * MS
    heard_ns: int = 0
    registrations: int = 0
    is_watched: bool = False
    _next_ns: int = 0
    _beats_left: int = 0
    _leave: Leave | None = None
    _leave_tries: int = 0

    @property
    def is_member(self) -> bool:
        """Whether the scheduler counts this process in."""
        return self.standing is Standing.MEMBER

    def next_deadline_ns(self) -> int | None:
        """When `tick` has something to do."""
        return None if self.standing is Standing.GONE else self._next_ns

    def forgive_stall(self, now_ns: int) -> int:
        """How long this process did not run although it was due; 0 if it did.

        Whoever was stopped heard nobody, which is no silence of theirs: the time is taken off here,
        and the core has to take it off its own waits.
        """
        late_ns = now_ns - self._next_ns
        if self.standing is Standing.GONE or late_ns < STALL_MS * MS:
            return 0
        self.heard_ns += late_ns
        return late_ns

    def tick(self, now_ns: int) -> list[Send]:
        """Send what is due: a registration, a heartbeat, a farewell."""
        if self.standing is Standing.GONE or now_ns < self._next_ns:
            return []
        if self.standing is Standing.JOINING:
            self._next_ns = now_ns + REGISTER_RETRY_MS * MS
            return [Send(SCHEDULER, self._register())]
        if self.standing is Standing.LEAVING:
            return self._say_farewell(now_ns)
        self._next_ns = now_ns + self.heartbeat_ns
        self._beats_left -= 1
        facts = self._facts(now_ns) if self._beats_left <= 0 else None
        if facts is not None:
            self._beats_left = FACTS_BEATS
        return [Send(SCHEDULER, msgspec.structs.replace(self.heartbeat(), facts=facts))]

    def on_registered(self, now_ns: int, message: Registered) -> bool:
        """Take in the scheduler's answer; True if this made us a member."""
        self.heard_ns = now_ns
        if (
            message.nonce != self.identity.nonce + self.registrations
            or self.standing is not Standing.JOINING
        ):
            return False
        self._move(Step.REGISTERED)
        self.job = message.job
        self.incarnation = message.incarnation
        self.origin = self.origin or message.incarnation
        self.rank = message.rank
        self.servers = message.servers
        self.workers = message.workers
        self.checkpoint = message.checkpoint
        self.checkpoint_every = message.checkpoint_every
        self.heartbeat_ns = message.heartbeat_ms * MS
        self._next_ns = now_ns
        return True

    def on_heartbeat_seen(self, now_ns: int, message: HeartbeatSeen) -> None:
        """Note that the scheduler is there."""
        if message.incarnation == self.incarnation:
            self.heard_ns = now_ns
            self.is_watched = message.is_watched

    def on_fenced(self, now_ns: int, message: Fenced) -> bool:
        """We were given up: start anew under a fresh nonce. True if it was us."""
        if (
            message.incarnation != self.incarnation
            or (self.standing, Step.FENCED) not in TRANSITIONS
        ):
            return False
        self._move(Step.FENCED)
        self.registrations += 1
        self._next_ns = now_ns
        return True

    def on_stop(self, message: Stop) -> None:
        """The scheduler has let us go."""
        del message
        self._move(Step.STOPPED)

    def leave(self, now_ns: int, outcome: Outcome, text: str) -> list[Send]:
        """Begin to leave; the scheduler's `Stop` ends it. One that was given up says it too."""
        self._move(Step.LEAVE_WANTED if self.incarnation else Step.GIVEN_UP)
        if self.standing is not Standing.LEAVING:
            return []
        self._leave = Leave(self.incarnation, outcome, text)
        return self._say_farewell(now_ns)

    def is_silent(self, now_ns: int, beats: int = SILENCE_WARNING_BEATS) -> bool:
        """Whether the scheduler has not answered for so many heartbeats."""
        return self.is_member and now_ns - self.heard_ns > beats * self.heartbeat_ns

    def give_up(self) -> None:
        """Stop trying to reach the scheduler."""
        self._move(Step.GIVEN_UP)

    def heartbeat(self) -> Heartbeat:
        """The heartbeat as of now; what it takes along once is gone from the vitals."""
        v = self.vitals
        figures, v.figures = v.figures, []
        return Heartbeat(
            self.incarnation,
            v.view,
            v.tables,
            v.round,
            v.slot_time_ns,
            v.samples,
            v.loss,
            v.waiting,
            v.rss_bytes,
            v.cpu_percent,
            dict(v.spent_ns),
            v.norms,
            v.saving,
            v.staleness,
            v.spare,
            v.is_idle,
            v.metrics,
            None,  # facts, which go with few beats
            [(name, *point) for name, point in v.logged.items()],
            figures,
        )

    def _facts(self, now_ns: int) -> Facts | None:
        """What there is to tell of the host, with its clock as of now."""
        host = self.vitals.host
        if host is None:
            return None
        return Facts(
            host.package,
            host.python,
            host.torch,
            host.files_max,
            host.memory_free_bytes,
            max(0, now_ns + host.wall_lead_ns),
        )

    def _register(self) -> Register:
        who = self.identity
        nonce = who.nonce + self.registrations
        where = who.address, who.host, who.pid, who.package
        return Register(PROTOCOL_VERSION, who.role, nonce, *where, who.rank, self.origin)

    def _say_farewell(self, now_ns: int) -> list[Send]:
        self._leave_tries += 1
        if self._leave_tries > LEAVE_TRIES_MAX or self._leave is None:
            self._move(Step.GIVEN_UP)
            return []
        self._next_ns = now_ns + LEAVE_RETRY_MS * MS
        return [Send(SCHEDULER, self.heartbeat()), Send(SCHEDULER, self._leave)]

    def _move(self, step: Step) -> None:
        self.standing = TRANSITIONS.get((self.standing, step), self.standing)
