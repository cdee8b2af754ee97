"""What the scheduler knows of each member, and the life of a member as a table."""

from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto

from msgspec.structs import replace

from treefold.common.errors import InvariantError
from treefold.wire.exchange import Peer
from treefold.wire.messages import Heartbeat
from treefold.wire.words import Facts, Figure, Member, Outcome, Role

LEADS_MAX = 4


class Life(Enum):
    """Life of a member as the scheduler sees it."""

    LIVE = auto()
    DEAD = auto()
    LEFT = auto()


class Happening(Enum):
    """What can end a member's life in the cluster."""

    SILENCE = auto()
    FAREWELL = auto()


TRANSITIONS: dict[tuple[Life, Happening], Life] = {
    (Life.LIVE, Happening.SILENCE): Life.DEAD,
    (Life.LIVE, Happening.FAREWELL): Life.LEFT,
    (Life.DEAD, Happening.FAREWELL): Life.LEFT,
    (Life.LEFT, Happening.FAREWELL): Life.LEFT,
}


@dataclass(slots=True)
class MemberState:
    """One incarnation of one process.

    Attributes
    ----------
    nonce : int
        What it registered with; the same nonce again is the same registration repeated.
    beat : Heartbeat or None
        Its last heartbeat.
    outcome : Outcome or None
        How it left, None if it did not.
    is_heard : bool
        Whether it ever named its incarnation, so that it is known to have got it.
    slot_time_ns : int
        Predicted time per slot, 0 while unknown.
    least_ns : int
        The least that this ever was, 0 while unknown.
    beat_ns : int
        When its last heartbeat came.
    left_ns : int
        When it was first seen that others have gone on without it from the round that it is in, 0
        if they have not.
    lag_ns : int
        For how long after that its heartbeats have named that round.
    facts : Facts or None
        What it last said of where it runs.
    clock_leads_ns : deque of int
        What its clock showed more than this scheduler's monotonic one, lately; less by as much as
        the message was on its way.
    figures : list of Figure
        The newest statistics of tensors that it told of.
    """

    member: Member
    peer: Peer
    nonce: int
    seen_ns: int
    life: Life = Life.LIVE
    outcome: Outcome | None = None
    beat: Heartbeat | None = None
    is_heard: bool = False
    slot_time_ns: int = 0
    least_ns: int = 0
    beat_ns: int = 0
    left_ns: int = 0
    lag_ns: int = 0
    figures: list[Figure] = field(default_factory=list)
    view_sent_ns: int = 0
    tables: int = 0
    facts: Facts | None = None
    clock_leads_ns: deque[int] = field(default_factory=lambda: deque(maxlen=LEADS_MAX))

    @property
    def is_live(self) -> bool:
        """Whether the cluster counts on it."""
        return self.life is Life.LIVE

    @property
    def name(self) -> str:
        """Such as ``worker-3``."""
        return f"{self.member.role.name.lower()}-{self.member.rank}"

    def take_beat(self, now_ns: int, beat: Heartbeat) -> None:
        """Take in a heartbeat."""
        if self.beat is None or beat.round != self.beat.round:
            self.left_ns = self.lag_ns = 0
        if beat.facts is not None:
            self.facts = beat.facts
            self.clock_leads_ns.append(beat.facts.clock_ns - now_ns)
        self.beat_ns = now_ns
        is_news = self.beat is None or beat.slot_time_ns != self.beat.slot_time_ns
        self.beat = beat
        self.figures = beat.figures or self.figures
        if beat.slot_time_ns and is_news:  # else what is thought of who has no slots stays
            self.slot_time_ns = beat.slot_time_ns
            self.least_ns = min(self.least_ns or beat.slot_time_ns, beat.slot_time_ns)

    def move(self, happening: Happening) -> None:
        """Apply one happening; one that the table lacks is a bug."""
        after = TRANSITIONS.get((self.life, happening))
        if after is None:
            raise InvariantError(f"{self.name} is {self.life.name} and gets {happening.name}", [])
        self.life = after


class Roster:
    """All members that ever were, by incarnation.

    Attributes
    ----------
    changes : int
        How often anybody came or went.
    lost : dict of Role to int
        How many fell silent.
    """

    def __init__(self) -> None:
        self.by_incarnation: dict[int, MemberState] = {}
        self.changes = 0
        self.lost: dict[Role, int] = dict.fromkeys(Role, 0)
        self._next = 1
        self._live: dict[Role | None, list[MemberState]] = {}

    def enroll(self, member: Member, peer: Peer, nonce: int, now_ns: int) -> MemberState:
        """Give a process its incarnation, higher than any before, and its rank.

        That is the one in ``member`` if it is free and not -1, else the lowest free one.
        """
        taken = {state.member.rank for state in self.live(member.role)}
        free = (number for number in range(len(taken) + 1) if number not in taken)
        rank = next(free) if member.rank in taken or member.rank < 0 else member.rank
        known = replace(member, rank=rank, incarnation=self._next)
        state = MemberState(known, peer, nonce, now_ns)
        self.by_incarnation[self._next] = state
        self._next += 1
        self._change()
        return state

    def part(self, state: MemberState, happening: Happening, outcome: Outcome | None) -> None:
        """A member is gone: it left with an outcome, or fell silent (None)."""
        state.move(happening)
        state.outcome = outcome
        self.lost[state.member.role] += happening is Happening.SILENCE
        self._change()

    def restore_parted(self, incarnation: int, outcome: Outcome | None) -> None:
        """Take up that a member is gone."""
        state = self.by_incarnation.get(incarnation)
        if state is not None:
            state.life = Life.DEAD if outcome is None else Life.LEFT
            state.outcome = outcome
            self._live.clear()

    def restore(self, member: Member, nonce: int) -> None:
        """Take up a member that another scheduler has enrolled; it has not been heard since."""
        state = MemberState(member, None, nonce, 0)
        self.by_incarnation[member.incarnation] = state
        self._next = max(self._next, member.incarnation + 1)
        self._live.clear()

    def forget(self, incarnation: int) -> None:
        """A member that is gone for long is not told of any more."""
        del self.by_incarnation[incarnation]
        self._live.clear()

    def name_of(self, incarnation: int) -> str:
        """Name of a member, its number if it is gone for long."""
        state = self.by_incarnation.get(incarnation)
        return f"incarnation {incarnation}" if state is None else state.name

    def by_nonce(self, nonce: int) -> MemberState | None:
        """The member that registered with this nonce, the last if it had to be enrolled again."""
        states = reversed(self.by_incarnation.values())
        return next((state for state in states if state.nonce == nonce), None)

    @property
    def is_done(self) -> bool:
        """Whether some worker has left because its script was done."""
        return any(state.outcome is Outcome.DONE for state in self.by_incarnation.values())

    def is_awaited(self, now_ns: int, patience_ns: int) -> bool:
        """Whether a worker fell silent so recently that it may yet come back.

        It may have been too busy to speak. One that has come back registered with the next nonce.
        """
        silent = [
            state
            for state in self.by_incarnation.values()
            if state.life is Life.DEAD and now_ns - state.seen_ns < patience_ns
        ]
        workers = [state for state in silent if state.member.role is Role.WORKER]
        return any(self.by_nonce(state.nonce + 1) is None for state in workers)

    def live(self, role: Role | None = None) -> list[MemberState]:
        """Live members (of one role), by rank."""
        found = self._live.get(role)
        if found is None:
            states = self.by_incarnation.values()
            found = [s for s in states if s.is_live and role in (None, s.member.role)]
            found.sort(key=lambda state: (state.member.role, state.member.rank))
            self._live[role] = found
        return list(found)

    def _change(self) -> None:
        self.changes += 1
        self._live.clear()
