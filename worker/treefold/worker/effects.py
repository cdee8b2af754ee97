"""What only a worker's core hears and asks for, beside the vocabulary that all cores share.

A call of the training thread is an event with a number; it is answered by `Complete` or `Fail` with
that number. Tensors are handles: numbers that the shell can turn into tensors.
"""

from dataclasses import dataclass

from treefold.common.plan import LoopPlan
from treefold.common.spec import Hyper, TableSpec
from treefold.wire.exchange import Note, PeerLost, Received, Send, Tick
from treefold.wire.messages import Outcome


@dataclass(frozen=True, slots=True)
class JoinCalled:
    """The script waits until the cluster has formed. Completed with None."""

    call: int


@dataclass(frozen=True, slots=True)
class DeclareCalled:
    """The script declares a table. Completed with its first `Snapshot`."""

    call: int
    spec: TableSpec


@dataclass(frozen=True, slots=True)
class LoopCalled:
    """The script begins a pass over its data. Completed with None."""

    call: int
    plan: LoopPlan


@dataclass(frozen=True, slots=True)
class TaskCalled:
    """The script wants its next slot. Completed with a `Task` or a `LoopEnd`.

    With ``is_torn`` what the last call was completed with could not be read to its end, since this
    worker is so late that the servers have gone on: it is to begin anew with the newest version.
    """

    call: int
    is_torn: bool = False


@dataclass(frozen=True, slots=True)
class LeaveCalled:
    """The script is over. Completed with None."""

    call: int
    outcome: Outcome
    text: str


@dataclass(frozen=True, slots=True)
class Contributed:
    """``count`` adjacent parts of a slot's contribution, from ``part`` on, over all shards.

    ``payloads`` has one handle per part, and is empty if no tensor has a gradient. ``absent`` has a
    bitmap per part, and is empty if every tensor has a gradient.
    """

    table: int
    part: int
    count: int
    round: int
    slot: int
    payloads: tuple[int, ...]
    absent: list[bytes]


@dataclass(frozen=True, slots=True)
class HyperKnown:
    """What slot 0 steps with will not change any more; servers may step what they have."""

    table: int
    round: int
    slot: int
    groups: list[Hyper]
    norm_max: float


@dataclass(frozen=True, slots=True)
class SlotMeta:
    """What slot 0 brings beside its tensors; see `treefold.wire.messages.RoundMeta`."""

    groups: list[Hyper]
    norm_max: float
    state: bytes


@dataclass(frozen=True, slots=True)
class SlotFinished:
    """The loop body of a slot is over. ``metas`` has one entry per table that stepped."""

    round: int
    slot: int
    metas: dict[int, SlotMeta]


@dataclass(frozen=True, slots=True)
class Reported:
    """Figures for the next heartbeat: samples so far, last loss."""

    samples: int
    loss: float | None


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """The operator wants this worker to stop after its current slot."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One version of a table: per part the handle of its tensor."""

    table: int
    version: int
    state: bytes
    norm: float
    payloads: list[int]


@dataclass(frozen=True, slots=True)
class Task:
    """Compute slot ``slot`` of round ``round``, after loading ``snapshots``.

    ``is_kept`` says that the contribution will wait here for that of another slot, while the script
    computes a third one.
    """

    round: int
    slot: int
    snapshots: list[Snapshot]
    is_kept: bool = False


@dataclass(frozen=True, slots=True)
class LoopEnd:
    """The pass over the data is over (or this worker drains); ``version`` is where the job is."""

    version: int
    snapshots: list[Snapshot]
    is_draining: bool = False


@dataclass(frozen=True, slots=True)
class Complete:
    """A call is done."""

    call: int
    value: object


@dataclass(frozen=True, slots=True)
class Fail:
    """A call failed with this error."""

    call: int
    error: Exception


@dataclass(frozen=True, slots=True)
class FoldPayloads:
    """Payload ``left`` becomes ``left + right``; ``right`` is not needed any more."""

    left: int
    right: int


@dataclass(frozen=True, slots=True)
class ReleasePayload:
    """This payload is not needed any more."""

    payload: int


@dataclass(frozen=True, slots=True)
class Initial:
    """Reference to adjacent parts, ``(start, stop)`` each, of the initial values declared."""

    table: int
    parts: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Connect:
    """From now on the server with this incarnation is sent to at this address."""

    server: int
    address: str


Call = JoinCalled | DeclareCalled | LoopCalled | TaskCalled | LeaveCalled
Event = (
    Received
    | PeerLost
    | Tick
    | Call
    | Contributed
    | HyperKnown
    | SlotFinished
    | Reported
    | DrainAsked
)
Effect = Send | Note | Connect | Complete | Fail | FoldPayloads | ReleasePayload
