"""What servers ask the scheduler to decide, since it has to be the same for all shards.

See `treefold.wire.messages` for what holds for all messages.
"""

from typing import Annotated

from msgspec import Meta

from treefold.common.plan import Count
from treefold.wire.words import (
    SHARDS_MAX,
    Message,
    Round,
    ShardNumber,
    SlotCount,
    Slots,
    TableNumber,
)


class NormReport(Message, tag=15, frozen=True):
    """A server to the scheduler: sum of squares of the folded gradient, float64, block by block."""

    incarnation: Count
    table: TableNumber
    shard: ShardNumber
    round: Round
    sums: Annotated[list[float], Meta(max_length=SHARDS_MAX)]


class NormDecision(Message, tag=16, frozen=True):
    """The scheduler to servers: the global gradient norm of one round of one table."""

    table: TableNumber
    round: Round
    norm: float


class QuorumReport(Message, tag=27, frozen=True):
    """A server to the scheduler: so far these slots of a round, of ``due``, are in a shard.

    Their batches are those of round ``planned`` of the plan, or of that one and others; so far
    ``missed`` slots were left out of rounds.
    """

    incarnation: Count
    table: TableNumber
    shard: ShardNumber
    round: Round
    slots: Slots
    due: SlotCount
    planned: Count = 0
    missed: Count = 0


class QuorumDecision(Message, tag=28, frozen=True):
    """The scheduler to servers: these slots are in a round, in every shard of every table."""

    round: Round
    slots: Slots
