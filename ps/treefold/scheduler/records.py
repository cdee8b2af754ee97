"""What the scheduler writes down: everything that another one needs to go on in its place.

Records are MessagePack arrays whose first element is a tag, like messages: append fields with
defaults, never reorder, remove or reuse.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from treefold.common.errors import DataError
from treefold.common.plan import Count, LoopPlan
from treefold.common.spec import TableSpec, Text
from treefold.wire.decisions import HealthDecision, QuorumDecision
from treefold.wire.messages import ShardSaved, View
from treefold.wire.words import Member, Outcome, Source


class Noted(msgspec.Struct, frozen=True, array_like=True):
    """Base of all records."""


class JobBegan(Noted, tag=1, frozen=True):
    """The first record: which job this is."""

    job: Count
    replicas: Count


class Enrolled(Noted, tag=2, frozen=True):
    """A process became a member. ``nonce`` is what it registered with."""

    member: Member
    nonce: Count


class Parted(Noted, tag=3, frozen=True):
    """A member is gone: it left with ``outcome``, or fell silent (None)."""

    incarnation: Count
    outcome: Outcome | None


class TableDeclared(Noted, tag=4, frozen=True):
    """A worker declared a table; ``spec`` comes with the first declaration of each."""

    number: Count
    incarnation: Count
    spec: TableSpec | None
    record: bytes = b""


class PlanDeclared(Noted, tag=5, frozen=True):
    """A pass over the data is known."""

    plan: LoopPlan


class ViewMade(Noted, tag=6, frozen=True):
    """The newest view."""

    view: View


class ChainConfirmed(Noted, tag=7, frozen=True):
    """A primary has this chain: these servers are in sync in it."""

    table: Count
    shard: Count
    view: Count
    servers: list[Count]


class Draining(Noted, tag=8, frozen=True):
    """A member is to hold nothing, and to leave then."""

    incarnation: Count


class Ended(Noted, tag=9, frozen=True):
    """The job is over."""

    outcome: Annotated[Outcome, Meta()]
    text: Text


class BegunAt(Noted, tag=10, frozen=True):
    """The job begins, or goes on, from a checkpoint with these tables, or again from its start."""

    source: Source | None
    tables: list[tuple[TableSpec, bytes]]


class Saved(Noted, tag=11, frozen=True):
    """A server has saved a shard."""

    message: ShardSaved


class Written(Noted, tag=12, frozen=True):
    """The checkpoint of this version counts."""

    version: Count


class RollingBack(Noted, tag=13, frozen=True):
    """A checkpoint is being looked for that the job can go back to; some script was done or not."""

    was_done: bool


class QuorumDecided(Noted, tag=14, frozen=True):
    """Which slots are in a round; the newest counts."""

    decision: QuorumDecision


class HealthDecided(Noted, tag=15, frozen=True):
    """What counts of a round of a table; the newest of each table counts."""

    decision: HealthDecision


Record = (
    JobBegan | Enrolled | Parted | TableDeclared | PlanDeclared | ViewMade | ChainConfirmed
    | Draining | Ended | BegunAt | Saved | Written | RollingBack | QuorumDecided
    | HealthDecided
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[list[Record]] = msgspec.msgpack.Decoder(list[Record])


def encode(found: list[Record]) -> bytes:
    """Bytes of what one event has changed, which is written at once or not at all."""
    return _encoder.encode(found)


def decode(data: bytes) -> list[Record]:
    """Records from their bytes.

    Raises
    ------
    DataError
        They are not a record of this version.
    """
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"the journal has something that is not a record: {error}") from error
