"""What messages are made of: limits, enumerations, and the structs inside of them."""

from collections.abc import Iterator, Sequence
from enum import IntEnum
from itertools import zip_longest
from typing import Annotated

import msgspec
from msgspec import Meta

from treefold.common.plan import SLOTS_MAX, Count
from treefold.common.spec import Dtype, Name

PROTOCOL_VERSION = 9
MEMBERS_MAX = 65_536
TABLES_MAX = 1_024
SHARDS_MAX = 1_048_576
PARTS_MAX = 1_048_576
STATE_BYTES_MAX = 1 << 20  # LR schedulers and integer buffers of one job
PROGRESS_BYTES_MAX = 32 * SLOTS_MAX  # beside them, what is in a version, and what was late
KEY_LENGTH_MAX = 40  # of a public key, in Z85 as in the allow-list; empty without keys
FRAME_BYTES_MAX = 4 << 20  # one payload frame
VERSIONS_KEPT_MAX = 2  # of one shard, for pulls
REPLICAS_MAX = 16  # servers in one chain
PROBE_BYTES_MAX = 128 << 10  # of one probe or its answer: so long it is in the way of others
UNIT_HEADER_BYTES_MAX = 1 << 21  # description of one unit's optimizer state
RUN_BYTES_MAX = 1 << 30  # payload of one message, all frames together
RUN_PARTS_MAX = 1_024  # parts in one message; so many full ones are RUN_BYTES_MAX of float32
ABSENT_BYTES_MAX = 1 << 17  # one bit per tensor of a part

Slot = Annotated[int, Meta(ge=0, lt=SLOTS_MAX)]
Slots = Annotated[list[Slot], Meta(max_length=SLOTS_MAX)]
TableNumber = Annotated[int, Meta(ge=0, lt=TABLES_MAX)]
ShardNumber = Annotated[int, Meta(ge=0, lt=SHARDS_MAX)]
PartNumber = Annotated[int, Meta(ge=0, lt=PARTS_MAX)]
Parts = Annotated[int, Meta(ge=1, le=RUN_PARTS_MAX)]
Round = Annotated[int, Meta(ge=-1, lt=1 << 62)]
Active = Annotated[int, Meta(ge=1, le=SLOTS_MAX)]
SlotCount = Annotated[int, Meta(ge=0, le=SLOTS_MAX)]
Address = Annotated[str, Meta(max_length=1_024)]
PublicKey = Annotated[str, Meta(max_length=KEY_LENGTH_MAX)]
Spent = Annotated[dict[Annotated[str, Meta(max_length=16)], Count], Meta(max_length=16)]
Norms = Annotated[list[tuple[TableNumber, Round, float]], Meta(max_length=TABLES_MAX)]
LOGGED_MAX, LOGGED_NAME_MAX = 32, 64
Logged = Annotated[
    list[tuple[Annotated[str, Meta(max_length=LOGGED_NAME_MAX)], Round, float]],
    Meta(max_length=LOGGED_MAX),
]
"""Name, round and value of what a script has said."""
FIGURES_MAX = 8_192
FIGURES_TENSORS_MAX = 500  # of a table, from its first one on
STALE_CLASSES = 33  # of staleness: 0, 1, 2 to 3, 4 to 7 and so on
StaleCounts = Annotated[
    list[tuple[TableNumber, Count, Annotated[list[Count], Meta(max_length=STALE_CLASSES)]]],
    Meta(max_length=MEMBERS_MAX),
]
"""Table, worker, and how many of its contributions were of each class of staleness."""
Marks = Annotated[bytes, Meta(max_length=ABSENT_BYTES_MAX)]
State = Annotated[bytes, Meta(max_length=STATE_BYTES_MAX + PROGRESS_BYTES_MAX)]
Incarnations = Annotated[list[Count], Meta(max_length=REPLICAS_MAX)]

FOLDER_LENGTH_MAX = 4_096  # of the name of a folder of checkpoints

INITIAL_ROUND = -1  # the "round" that brings initial values and makes version 0


class Role(IntEnum):
    """What a member is."""

    SCHEDULER = 1
    SERVER = 2
    WORKER = 3


class Code(IntEnum):
    """Why a request was refused. Stable numbers; `treefold.common.errors` has a class for each."""

    PROTOCOL_VERSION = 1
    JOB_MISMATCH = 2
    SPEC_MISMATCH = 3
    UNKNOWN_TABLE = 4
    BAD_PAYLOAD = 5
    STALE_VIEW = 6
    FUTURE_ROUND = 7
    BAD_NODE = 8
    BAD_SPEC = 9
    CLUSTER_FULL = 10
    NOT_MEMBER = 11
    BAD_MESSAGE = 12
    NON_FINITE = 13
    NOT_ALLOWED = 14


class Outcome(IntEnum):
    """How a member left, or how a job ended."""

    DONE = 1
    FAILED = 2
    DRAINED = 3
    NOT_FORMED = 4


class Phase(IntEnum):
    """Where the cluster stands."""

    FORMING = 1
    RUNNING = 2
    ENDED = 3


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of all messages."""


class Frame(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Description of a payload: element type and number of elements, all parts of the run together.

    A value is an element times ``scale``, rounded to float32 once. ``segment`` is 0 if the bytes
    follow as a frame; otherwise they begin ``offset`` bytes into that shared segment.
    """

    dtype: Dtype
    elements: Annotated[int, Meta(ge=0, le=RUN_BYTES_MAX // 2)]
    scale: float = 1.0
    segment: Count = 0
    offset: Count = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the whole payload."""
        return self.elements * self.dtype.itemsize


class Source(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where servers find what a table began with: a version in a folder of checkpoints.

    A constant table has one version; ``version`` names the checkpoint all the same.
    """

    folder: Annotated[str, Meta(max_length=FOLDER_LENGTH_MAX)]
    version: Count


class Member(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One live member as a view names it. ``address`` is where a server takes pushes and pulls.

    ``key`` is the public key of the connection by which it registered, and nobody speaks in its
    name without it. ``origin`` is its first incarnation, if it had another one before and the same
    key: a worker goes on in that name.
    """

    role: Role
    rank: Count
    incarnation: Count
    address: Address
    host: Annotated[str, Meta(max_length=256)]
    pid: Count
    key: PublicKey = ""
    origin: Count = 0


class Facts(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where a member runs: versions, how many files may be open, memory that is left, its clock.

    ``clock_ns`` is nanoseconds since 1970 when this was sent. Nothing is decided by any of it.
    """

    package: Annotated[str, Meta(max_length=64)]
    python: Annotated[str, Meta(max_length=64)]
    torch: Annotated[str, Meta(max_length=64)]
    files_max: Count
    memory_free_bytes: Count
    clock_ns: Count


class Figure(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is known of the values of one tensor in one shard: ``kind`` is 0 weights, 1 gradient."""

    table: TableNumber
    shard: ShardNumber
    tensor: Count
    kind: Annotated[int, Meta(ge=0, le=1)]
    count: Count
    sum: float
    squares: float
    least: float
    greatest: float


Figures = Annotated[list[Figure], Meta(max_length=FIGURES_MAX)]


class ShardPlace(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Who holds a shard: a chain of servers, of which ``server`` is the primary.

    ``view`` is the view that made it so: what a push must name. ``chain_view`` is the view that
    last changed the chain: what servers of the chain name to each other. ``backups`` hold what the
    primary holds, in the order in which they are promoted; ``joining`` are being copied to.
    """

    shard: ShardNumber
    view: Count
    first_block: Count
    blocks: Count
    server: Count
    chain_view: Count = 0
    backups: Incarnations = []
    joining: Incarnations = []


class TablePlace(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A declared table: its number and name, who uploads its initial values, its shards.

    With a ``source`` the shards begin with what is there, and nobody uploads anything.
    """

    table: TableNumber
    name: Name
    initializer: Count
    shards: Annotated[list[ShardPlace], Meta(max_length=SHARDS_MAX)]
    source: Source | None = None


class Need(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What must be applied to a shard of an asynchronous table before a pull is answered.

    Of slot ``slot`` all rounds below ``clock``; of each of ``slots`` slots all below ``floor``, and
    of the first ``active`` of them round ``floor`` as well. With ``ends`` no slot needs more than
    the rounds below its end. With ``exact`` nothing but the rounds below that, of each slot: the
    shard applies no more for a moment, and if it has more already it answers with that.
    """

    slot: Slot
    clock: Count
    floor: Count = 0
    active: SlotCount = 0
    slots: SlotCount = 0
    ends: Annotated[list[Count], Meta(max_length=SLOTS_MAX)] = msgspec.field(default_factory=list)
    exact: Annotated[list[Count], Meta(max_length=SLOTS_MAX)] = msgspec.field(default_factory=list)

    def is_met(self, clocks: Sequence[int]) -> bool:
        """Whether clocks, one for every slot that has contributed, satisfy this."""
        if self.exact:
            pairs = list(zip_longest(clocks, self.exact, fillvalue=0))
            is_beyond = any(clock > wanted for clock, wanted in pairs)
            return is_beyond or all(clock == wanted for clock, wanted in pairs)
        if self.clock and (self.slot >= len(clocks) or clocks[self.slot] < self.clock):
            return False
        return next(self.lacking(clocks), None) is None

    def lacking(self, clocks: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Slots that all have to have some rounds in and have not, each with the last of those."""
        known = len(clocks)
        for slot in range(self.slots if self.floor or self.active else 0):
            wanted = self.floor + (slot < self.active)
            if self.ends:
                wanted = min(wanted, self.ends[slot]) if slot < len(self.ends) else 0
            if (clocks[slot] if slot < known else 0) < wanted:
                yield slot, wanted - 1


class Leases(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Which worker (incarnation) computes each slot from a round on. Advice, not ownership."""

    from_round: Round
    workers: Annotated[list[Count], Meta(max_length=SLOTS_MAX)]
