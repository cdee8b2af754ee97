"""The cluster's settings, and how the scheduler answers those who want to join. Pure."""

from dataclasses import dataclass

from treefold.scheduler.members import MemberState, Roster
from treefold.wire.membership import MS
from treefold.wire.messages import Refused, Register, Registered
from treefold.wire.words import PROTOCOL_VERSION, Code, Member


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
    replicas: int = 1
    checkpoint: str = ""
    checkpoint_every: int = 0
    slots: int = 8
    seed: int = 0


def refusal_of(message: Register, known: MemberState | None, key: str) -> Refused | None:
    """Why a process cannot become a member, None if it can.

    Parameters
    ----------
    message : Register
        What it says.
    known : MemberState or None
        Who has registered with this nonce before.
    key : str
        Its public key, empty without keys.
    """
    if message.protocol == PROTOCOL_VERSION:
        if known is None or known.member.key in ("", key):
            return None
        text = f"{known.name} has registered with this nonce, and with another key"
        return Refused(0, Code.NOT_ALLOWED, text)
    text = (
        f"this cluster speaks protocol {PROTOCOL_VERSION}, the {message.role.name.lower()} on "
        f"{message.host} (package {message.package}) speaks {message.protocol}: install the same "
        "version"
    )
    return Refused(0, Code.PROTOCOL_VERSION, text)


def applicant(message: Register, key: str, roster: Roster) -> Member:
    """A member to be, which has no number yet; its first one is known, and was given to its key."""
    rank, where = message.rank, (message.address, message.host, message.pid)
    first = roster.by_incarnation.get(message.origin)
    origin = message.origin if first is not None and first.member.key == key else 0
    return Member(message.role, rank, 0, *where, key, origin)


def registered(state: MemberState, limits: SchedulerLimits) -> Registered:
    """What a member is told when it is one."""
    return Registered(
        state.nonce,
        limits.job,
        state.member.incarnation,
        state.member.rank,
        limits.heartbeat_ns // MS,
        limits.dead_after_ns // MS,
        limits.servers,
        limits.workers,
        limits.checkpoint,
        limits.checkpoint_every,
    )
