"""Messages between the servers of one chain.

The primary relays the root of each part as a `Push` of that node, and a round's hyper-parameters as
`RoundHyper`, both with its own incarnation as ``sender`` and the chain's view as ``view``. See
`treefold.wire.messages` for what holds for all messages.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from treefold.common.plan import SLOTS_MAX, Count
from treefold.common.spec import GROUPS_MAX, Hyper
from treefold.wire.words import (
    PARTS_MAX,
    RUN_PARTS_MAX,
    UNIT_HEADER_BYTES_MAX,
    VERSIONS_KEPT_MAX,
    Active,
    Frame,
    Message,
    PartNumber,
    Round,
    ShardNumber,
    State,
    TableNumber,
)


class ChainRound(Message, tag=45, frozen=True):
    """The primary to another member of the chain: a round is complete with this.

    ``parts`` are those that the member has to make in it, None if all. ``contributors`` are
    ``(level, index, sender)`` of the nodes that came from workers, of part 0. Answered by
    `ChainApplied` when they are made, or by `RoundStatus` if something is missing.
    """

    job: Count
    sender: Count
    view: Count
    table: TableNumber
    shard: ShardNumber
    round: Round
    active: Active
    groups: Annotated[list[Hyper], Meta(max_length=GROUPS_MAX)]
    norm_max: Annotated[float, Meta(ge=0)]
    norm: float
    state: State
    parts: Annotated[list[PartNumber], Meta(max_length=PARTS_MAX)] | None
    contributors: Annotated[list[tuple[Count, Count, Count]], Meta(max_length=SLOTS_MAX)]
    is_checked: bool = False


class ChainAsk(Message, tag=52, frozen=True):
    """The primary to another member of the chain: say which version you hold.

    Answered by `ChainApplied`.
    """

    job: Count
    sender: Count
    view: Count
    table: TableNumber
    shard: ShardNumber


class ChainApplied(Message, tag=46, frozen=True):
    """To the primary: this member of the chain holds ``version``.

    ``began`` is the view in which it was first copied to, 0 if it never was. ``digest`` is that of
    its values and optimizer state, if the round asked for it. ``last`` is, for an asynchronous
    table, which contribution made the version: round, slot, sender.
    """

    job: Count
    sender: Count
    view: Count
    table: TableNumber
    shard: ShardNumber
    began: Count
    version: Annotated[int, Meta(ge=-1, lt=1 << 62)]
    digest: Annotated[bytes, Meta(max_length=32)] = b""
    last: tuple[Count, Count, Count] = (0, 0, 0)


class KeptVersion(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What goes with a version that can be pulled, as in `Published`."""

    version: Count
    state: State
    norm: float


class UnitCopy(Message, tag=47, frozen=True):
    """The primary to a joining member: the state of one unit at ``version``, in slices.

    A unit is what the optimizer steps at once. ``count`` of its ``slices`` follow, from ``part``
    on; none for a version below 0, which has no values yet. ``header`` says what the values are;
    with ``has_older`` they end with what the unit's parts were in the version before. ``base`` is
    the version of the whole shard at that time, and ``kept`` are those that can be pulled. The
    member takes part in the unit's rounds from ``version`` on. ``began`` is the view in which the
    member joined: what it has from before counts for nothing. Answered by `UnitTaken`.
    """

    job: Count
    sender: Count
    view: Count
    table: TableNumber
    shard: ShardNumber
    unit: PartNumber
    began: Count
    version: Annotated[int, Meta(ge=-1, lt=1 << 62)]
    base: Annotated[int, Meta(ge=-1, lt=1 << 62)]
    kept: Annotated[list[KeptVersion], Meta(max_length=VERSIONS_KEPT_MAX)]
    has_older: bool
    header: Annotated[bytes, Meta(max_length=UNIT_HEADER_BYTES_MAX)]
    slices: Annotated[int, Meta(ge=0, le=PARTS_MAX)]
    part: PartNumber
    count: Annotated[int, Meta(ge=0, le=RUN_PARTS_MAX)]
    frame: Frame | None


class UnitTaken(Message, tag=51, frozen=True):
    """To the primary: this member has the copy of a unit at ``version``."""

    job: Count
    sender: Count
    view: Count
    table: TableNumber
    shard: ShardNumber
    unit: PartNumber
    began: Count
    version: Annotated[int, Meta(ge=-1, lt=1 << 62)]
