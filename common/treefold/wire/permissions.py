"""Who may send which message: one table, and whatever is not in it is denied.

A sender's role is that of its key, which ZeroMQ has verified; what a message says of its sender
counts for nothing here. Holds in both directions: members take from a listener only what the role
of the listener's key may send.
"""

from enum import StrEnum

from treefold.wire.chain import ChainApplied, ChainAsk, ChainRound, UnitCopy, UnitTaken
from treefold.wire.decisions import (
    HealthDecision,
    HealthReport,
    NormDecision,
    NormReport,
    QuorumDecision,
    QuorumReport,
)
from treefold.wire.messages import (
    Accepted,
    AnyMessage,
    AssignTable,
    ChainDiffers,
    ChainSynced,
    DeclarePlan,
    DeclareTable,
    DrainRequest,
    Fenced,
    Flush,
    Grant,
    Heartbeat,
    HeartbeatSeen,
    Leave,
    LeaveAsked,
    Published,
    Pull,
    Pulled,
    Push,
    Refused,
    Register,
    Registered,
    RoundHyper,
    RoundLate,
    RoundMeta,
    RoundStatus,
    SavedSeen,
    ShardSaved,
    StatusReply,
    StatusRequest,
    Stop,
    View,
)
from treefold.wire.probes import Probe, ProbeSeen
from treefold.wire.segments import SegmentAnswer, SegmentOffer
from treefold.wire.words import Role


class KeyRole(StrEnum):
    """What the holder of a key is."""

    WORKER = "worker"
    SERVER = "server"
    SCHEDULER = "scheduler"
    OBSERVER = "observer"
    ADMIN = "admin"


CURIOUS = (KeyRole.OBSERVER, KeyRole.ADMIN, KeyRole.WORKER)
"""Roles that may ask for the status: workers look whether the scheduler is there."""

_WORKER = frozenset((KeyRole.WORKER,))
_SERVER = frozenset((KeyRole.SERVER,))
_SCHEDULER = frozenset((KeyRole.SCHEDULER,))
_ADMIN = frozenset((KeyRole.ADMIN,))
_MEMBER = _WORKER | _SERVER
_LISTENER = _SCHEDULER | _SERVER

SENDERS: dict[type[AnyMessage], frozenset[KeyRole]] = {
    Register: _MEMBER,  # and only as what the key is
    Registered: _SCHEDULER,
    Refused: _LISTENER,
    Heartbeat: _MEMBER,
    HeartbeatSeen: _SCHEDULER,
    DeclareTable: _WORKER,
    DeclarePlan: _WORKER,
    Accepted: _SCHEDULER,
    View: _SCHEDULER,
    AssignTable: _SCHEDULER,
    Leave: _MEMBER,
    RoundLate: _SERVER,
    Grant: _SCHEDULER,
    Flush: _SCHEDULER,
    NormReport: _SERVER,
    NormDecision: _SCHEDULER,
    QuorumReport: _SERVER,
    QuorumDecision: _SCHEDULER,
    HealthReport: _SERVER,
    HealthDecision: _SCHEDULER,
    StatusRequest: frozenset(CURIOUS),
    StatusReply: _SCHEDULER,
    Probe: frozenset(CURIOUS),
    ProbeSeen: _LISTENER,
    Stop: _SCHEDULER,
    Fenced: _SCHEDULER,
    ChainSynced: _SERVER,
    ChainDiffers: _SERVER,
    ShardSaved: _SERVER,
    SavedSeen: _SCHEDULER,
    LeaveAsked: _SCHEDULER,
    DrainRequest: _ADMIN | _SERVER,  # a server for itself, when it is asked to stop
    Push: _MEMBER,  # servers relay within a chain
    RoundHyper: _MEMBER,
    RoundMeta: _WORKER,
    Pull: _WORKER,
    Pulled: _SERVER,
    Published: _SERVER,
    RoundStatus: _SERVER,
    ChainRound: _SERVER,
    ChainAsk: _SERVER,
    ChainApplied: _SERVER,
    UnitCopy: _SERVER,
    UnitTaken: _SERVER,
    SegmentOffer: _MEMBER,
    SegmentAnswer: _MEMBER,
}
"""Roles that may send each kind of message."""

NAMES = ("sender", "incarnation", "origin")  # fields in which a member says who it is
CLAIMS: dict[type[AnyMessage], str] = {
    kind: name
    for kind, senders in SENDERS.items()
    for name in NAMES
    if senders & _MEMBER and name in kind.__struct_fields__
}
"""The field of each kind of message in which its sender names itself; of some kinds there is none.

What the scheduler tells a member may have the member's number in it: that is no claim.
"""

MEMBER_ROLES = {Role.WORKER: KeyRole.WORKER, Role.SERVER: KeyRole.SERVER}


def claimed(message: AnyMessage) -> int:
    """The incarnation in whose name a message speaks, 0 if in nobody's."""
    name = CLAIMS.get(type(message))
    number: int = 0 if name is None else getattr(message, name)
    return number


def denial(role: KeyRole, message: AnyMessage) -> str:
    """Why a message of a sender with this role is not taken.

    Parameters
    ----------
    role : KeyRole
        Of the key that the sender proved to have.
    message : AnyMessage
        What it sent.

    Returns
    -------
    str
        The reason, empty if the message is allowed.
    """
    kind = type(message)
    senders = SENDERS.get(kind, frozenset())
    if role not in senders:
        named = " or ".join(sorted(senders)) or "nobody"
        return f"a key with the role {role} may not send {kind.__name__}, only {named} may"
    if isinstance(message, Register) and MEMBER_ROLES.get(message.role) is not role:
        return f"a key with the role {role} may not register as a {message.role.name.lower()}"
    if isinstance(message, DrainRequest) and role is KeyRole.SERVER and not message.incarnation:
        return "a server may ask to be drained, with its own incarnation, and for nobody else"
    return ""
