"""What the scheduler knows of each member, and the life of a member as a table."""

from dataclasses import dataclass
from enum import Enum, auto

from treefold.common.errors import InvariantError
from treefold.wire.exchange import Peer
from treefold.wire.messages import Heartbeat, Member, Outcome, Role


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
    view_sent_ns: int = 0
    tables: int = 0

    @property
    def is_live(self) -> bool:
        """Whether the cluster counts on it."""
        return self.life is Life.LIVE

    @property
    def name(self) -> str:
        """Such as ``worker-3``."""
        return f"{self.member.role.name.lower()}-{self.member.rank}"

    def move(self, happening: Happening) -> None:
        """Apply one happening; one that the table lacks is a bug."""
        after = TRANSITIONS.get((self.life, happening))
        if after is None:
            raise InvariantError(f"{self.name} is {self.life.name} and gets {happening.name}", [])
        self.life = after


class Roster:
    """All members that ever were, by incarnation."""

    def __init__(self) -> None:
        self.by_incarnation: dict[int, MemberState] = {}
        self._next = 1

    def enroll(self, member: Member, peer: Peer, nonce: int, now_ns: int) -> MemberState:
        """Give a process its incarnation, higher than any before, and its rank.

        That is the one in ``member`` if it is free and not -1, else the lowest free one.
        """
        taken = {state.member.rank for state in self.live(member.role)}
        free = (number for number in range(len(taken) + 1) if number not in taken)
        rank = next(free) if member.rank in taken or member.rank < 0 else member.rank
        known = Member(member.role, rank, self._next, member.address, member.host, member.pid)
        state = MemberState(known, peer, nonce, now_ns)
        self.by_incarnation[self._next] = state
        self._next += 1
        return state

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
        found = [
            state
            for state in self.by_incarnation.values()
            if state.is_live and (role is None or state.member.role is role)
        ]
        return sorted(found, key=lambda state: (state.member.role, state.member.rank))
