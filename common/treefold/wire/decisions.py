"""What servers ask the scheduler to decide, since it has to be the same for all shards.

See `treefold.wire.messages` for what holds for all messages.
"""

from typing import Annotated

from msgspec import Meta

from treefold.common.plan import SLOTS_MAX, Count
from treefold.common.spec import WINDOW_MAX
from treefold.wire.words import (
    SHARDS_MAX,
    Message,
    Round,
    ShardNumber,
    SlotCount,
    Slots,
    TableNumber,
)

PAIRED_SLOTS_MAX = 128  # slots of a table that needs to know how far they are apart
PAIRS_MAX = max(SLOTS_MAX, PAIRED_SLOTS_MAX * (PAIRED_SLOTS_MAX + 1) // 2)
NODES_MAX = 128  # of a tree over a shard's blocks; two of a level


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


Coefficients = Annotated[list[float], Meta(max_length=SLOTS_MAX)]
PairSums = Annotated[list[float], Meta(max_length=PAIRS_MAX)]


class HealthReport(Message, tag=29, frozen=True):
    """A server to the scheduler: how large the contributions of a round are in a shard.

    ``sums`` are ``(level, index, sums)`` of the nodes of the tree over all blocks of the table that
    the shard's blocks make up: sums of squares slot by slot, or of the products of each slot with
    itself and the later ones. ``senders`` and ``samples`` are of each slot, of ``total`` in the
    round; ``norms`` went with the version that the round begins with.
    """

    incarnation: Count
    table: TableNumber
    shard: ShardNumber
    round: Round
    senders: Annotated[list[Count], Meta(max_length=SLOTS_MAX)]
    samples: Annotated[list[Count], Meta(max_length=SLOTS_MAX)]
    total: Count
    sums: Annotated[list[tuple[Count, Count, PairSums]], Meta(max_length=NODES_MAX)]
    norms: Annotated[list[float], Meta(max_length=WINDOW_MAX)]


class HealthDecision(Message, tag=30, frozen=True):
    """The scheduler to servers: what counts of a round of one table.

    Contributions are multiplied with their ``coefficients``, 0 for those that are left out, and
    what they make together with ``factor``. ``norms`` go with the version that the round makes.
    """

    table: TableNumber
    round: Round
    coefficients: Coefficients
    factor: float
    norms: Annotated[list[float], Meta(max_length=WINDOW_MAX)]


class QuorumDecision(Message, tag=28, frozen=True):
    """The scheduler to servers: these slots are in a round, in every shard of every table."""

    round: Round
    slots: Slots
