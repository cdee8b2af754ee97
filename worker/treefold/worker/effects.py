"""What only a worker's core hears and asks for, beside the vocabulary that all cores share.

A call of the training thread is an event with a number; it is answered by `Complete` or `Fail` with
that number. Tensors are handles: numbers that the shell can turn into tensors.
"""

import msgspec

from treefold.common.plan import LoopPlan
from treefold.common.spec import Hyper, TableSpec
from treefold.wire.exchange import Note, PeerLost, Received, Send, Tick
from treefold.wire.words import Outcome


class JoinCalled(msgspec.Struct, frozen=True, gc=False):
    """The script waits until the cluster has formed. Completed with None."""

    call: int


class DeclareCalled(msgspec.Struct, frozen=True, gc=False):
    """The script declares a table. Completed with its first `Snapshot`."""

    call: int
    spec: TableSpec
    record: bytes = b""


class LoopCalled(msgspec.Struct, frozen=True, gc=False):
    """The script begins a pass over its data. Completed with None."""

    call: int
    plan: LoopPlan


class TaskCalled(msgspec.Struct, frozen=True, gc=False):
    """The script wants its next slot. Completed with a `Task` or a `LoopEnd`.

    With ``is_torn`` what the last call was completed with could not be read to its end, since this
    worker is so late that the servers have gone on: it is to begin anew with the newest version.
    With ``is_streaming`` a slot may begin although not all parts of its version are here.
    """

    call: int
    is_torn: bool = False
    is_streaming: bool = False


class AlignedCalled(msgspec.Struct, frozen=True, gc=False):
    """Read all shards of asynchronous tables alike. Completed with an `Aligned`."""

    call: int


class LeaveCalled(msgspec.Struct, frozen=True, gc=False):
    """The script is over. Completed with None."""

    call: int
    outcome: Outcome
    text: str


class Contributed(msgspec.Struct, frozen=True, gc=False):
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


class HyperKnown(msgspec.Struct, frozen=True, gc=False):
    """What slot 0 steps with will not change any more; servers may step what they have."""

    table: int
    round: int
    slot: int
    groups: list[Hyper]
    norm_max: float


class SlotMeta(msgspec.Struct, frozen=True, gc=False):
    """What slot 0 brings beside its tensors; see `treefold.wire.messages.RoundMeta`."""

    groups: list[Hyper]
    norm_max: float
    state: bytes


class SlotFinished(msgspec.Struct, frozen=True, gc=False):
    """The loop body of a slot is over. ``metas`` has one entry per table that stepped."""

    round: int
    slot: int
    metas: dict[int, SlotMeta]


Said = tuple[str, int, float]
"""A name that the script chose, the round, and the value."""


class Reported(msgspec.Struct, frozen=True, gc=False):
    """Figures for the next heartbeat: samples so far, last loss, and what the script has said."""

    samples: int
    loss: float | None
    logged: list[Said] = []


class DrainAsked(msgspec.Struct, frozen=True, gc=False):
    """The operator wants this worker to stop after its current slot."""


class Aligned(msgspec.Struct, frozen=True, gc=False):
    """A version of every asynchronous table; all shards have the same contributions in them."""

    snapshots: list["Snapshot"]


class Snapshot(msgspec.Struct, frozen=True, gc=False):
    """One version of a table: per part the handle of its tensor.

    With ``is_streaming`` there are none: every part is, or will be, in an `Arrived`. ``front`` is
    the round after which an asynchronous table was in ``state``, -1 if there is none.
    """

    table: int
    version: int
    state: bytes
    norm: float
    payloads: list[int]
    is_streaming: bool = False
    front: int = -1


class StreamBegun(msgspec.Struct, frozen=True, gc=False):
    """From now on parts of this version of a table arrive one by one."""

    table: int
    version: int


class Arrived(msgspec.Struct, frozen=True, gc=False):
    """A part of the version being streamed, counted over all shards. Takes over the payload."""

    table: int
    part: int
    payload: int


class Retire(msgspec.Struct, frozen=True, gc=False):
    """Memory that holds contributions is never written to again once they are released.

    A server that was replaced and does not know it yet may still read it, and must not take for a
    contribution to its round what is one to a later round.
    """


class StreamsOver(msgspec.Struct, frozen=True):
    """Nothing more arrives of what is being streamed; what was computed with it does not count.

    With an error nothing more will come at all.
    """

    error: Exception | None = None


STANDING_BY = -1  # the slot of a task that is none: load the snapshots, and ask again


class Task(msgspec.Struct, frozen=True, gc=False):
    """Compute slot ``slot`` of round ``round``, after loading ``snapshots``.

    ``is_kept`` says that the contribution will wait here for that of another slot, while the script
    computes a third one. Where rounds go on without the last slots, ``round`` and ``slot`` are the
    batch's, ``base`` is the round that it is computed in, and with ``is_again`` it was late before.
    Otherwise ``base`` is -1.
    """

    round: int
    slot: int
    snapshots: list[Snapshot]
    is_kept: bool = False
    base: int = -1
    is_again: bool = False


class LoopEnd(msgspec.Struct, frozen=True, gc=False):
    """The pass over the data is over (or this worker drains); ``version`` is where the job is."""

    version: int
    snapshots: list[Snapshot]
    is_draining: bool = False


class Complete(msgspec.Struct, frozen=True):
    """A call is done."""

    call: int
    value: object


class Fail(msgspec.Struct, frozen=True):
    """A call failed with this error."""

    call: int
    error: Exception


class FoldPayloads(msgspec.Struct, frozen=True, gc=False):
    """Payload ``left`` becomes ``left + right``; ``right`` is not needed any more."""

    left: int
    right: int


class ReleasePayload(msgspec.Struct, frozen=True, gc=False):
    """This payload is not needed any more."""

    payload: int


class Initial(msgspec.Struct, frozen=True, gc=False):
    """Reference to adjacent parts, ``(start, stop)`` each, of the initial values declared."""

    table: int
    parts: list[tuple[int, int]]


class Connect(msgspec.Struct, frozen=True, gc=False):
    """From now on the server with this incarnation is sent to at this address."""

    server: int
    address: str


class Disconnect(msgspec.Struct, frozen=True, gc=False):
    """Close the link to a server that is gone; nothing is sent to it any more."""

    server: int


Call = JoinCalled | DeclareCalled | LoopCalled | TaskCalled | AlignedCalled | LeaveCalled
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
Stream = StreamBegun | Arrived | StreamsOver
Link = Connect | Disconnect
Effect = Send | Note | Link | Complete | Fail | FoldPayloads | ReleasePayload | Retire | Stream
