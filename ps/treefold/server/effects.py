"""What only a server's core hears and asks for, beside the vocabulary that all cores share."""

import msgspec

from treefold.common.layout import ShardSpan
from treefold.common.spec import Hyper, TableSpec
from treefold.wire.exchange import Halt, Note, PeerLost, Received, Send, Tick
from treefold.wire.words import Frame


class NormComputed(msgspec.Struct, frozen=True, gc=False):
    """The sums of squares that `ComputeNorm` asked for, one per block."""

    table: int
    shard: int
    round: int
    sums: list[float]


class ProductsComputed(msgspec.Struct, frozen=True, gc=False):
    """What `ComputeProducts` asked for, a row of each block of the part."""

    table: int
    shard: int
    round: int
    part: int
    slots: tuple[int, ...]
    rows: list[list[float]]


class DigestComputed(msgspec.Struct, frozen=True, gc=False):
    """The checksum that `ComputeDigest` asked for."""

    table: int
    shard: int
    version: int
    digest: bytes


class UnitCopied(msgspec.Struct, frozen=True, gc=False):
    """The copy that `CopyUnit` asked for: what its values are, and a payload per slice."""

    table: int
    shard: int
    member: int
    unit: int
    header: bytes = b""
    payloads: tuple[int, ...] = ()
    frame: Frame | None = None
    has_older: bool = False


class ShardStored(msgspec.Struct, frozen=True, gc=False):
    """The file that `SaveShard` asked for is there, or ``text`` says why not."""

    table: int
    shard: int
    version: int
    path: str
    nbytes: int
    sha256: bytes
    text: str = ""


class ShardRestored(msgspec.Struct, frozen=True, gc=False):
    """What `RestoreShard` asked for is here: the values of this version, and what goes with it."""

    table: int
    shard: int
    version: int
    state: bytes
    norm: float


class ServerDrainAsked(msgspec.Struct, frozen=True, gc=False):
    """The operator wants this server to stop."""


class ServerFailed(msgspec.Struct, frozen=True, gc=False):
    """What the job asks for cannot be done here, for this reason."""

    text: str


class OpenShard(msgspec.Struct, frozen=True, gc=False):
    """Make the tensors of a shard."""

    table: int
    shard: int
    spec: TableSpec
    span: ShardSpan


class FoldPayloads(msgspec.Struct, frozen=True, gc=False):
    """Payload ``left`` becomes ``left + right``; ``right`` is not needed any more."""

    left: int
    right: int


class ReleasePayload(msgspec.Struct, frozen=True, gc=False):
    """This payload is not needed (any more)."""

    payload: int


class ReadyPart(msgspec.Struct, frozen=True, gc=False):
    """A part of which the root is there: its payload, None if no tensor has a gradient.

    ``absent`` is the bitmap of tensors without a gradient.
    """

    part: int
    root: int | None
    absent: bytes


class ComputeNorm(msgspec.Struct, frozen=True, gc=False):
    """Sum the squares of the folded gradient block by block; answered by `NormComputed`."""

    table: int
    shard: int
    round: int
    parts: list[ReadyPart]


class ComputeProducts(msgspec.Struct, frozen=True, gc=False):
    """Sum the products of contributions with themselves and with later ones, block by block.

    ``payloads`` are what slots have sent of a part, None for nothing. A block's row is NaN if
    anything of it is not finite, buffers included. Answered by `ProductsComputed`.
    """

    table: int
    shard: int
    round: int
    part: int
    slots: tuple[int, ...]
    payloads: tuple[int | None, ...]


class ScalePayload(msgspec.Struct, frozen=True, gc=False):
    """Multiply what a slot has sent of a part: parameters with one factor, buffers with another.

    The payload stays, with other values.
    """

    table: int
    shard: int
    part: int
    payload: int
    factor: float
    buffers: float


class CombinePayloads(msgspec.Struct, frozen=True, gc=False):
    """Make the first of these payloads their trimmed mean, coordinate by coordinate.

    Each is multiplied with its factor first, and so many of all are left out at each end; those
    that have ``nothing`` count as zeros. All payloads stay.
    """

    payloads: list[int]
    factors: list[float]
    nothing: int
    trimmed: int


class MakeParts(msgspec.Struct, frozen=True, gc=False):
    """Make parts of ``version`` from their roots and keep them for pulls. Takes over the roots.

    ``groups`` are the round's hyper-parameters, None for initial values. ``norm`` is the global
    gradient norm and ``norm_max`` its limit, 0 for none. With ``keeps_roots`` the roots are not
    taken over, but stay as they are until they are released.
    """

    table: int
    shard: int
    version: int
    parts: list[ReadyPart]
    groups: list[Hyper] | None
    norm_max: float
    norm: float
    keeps_roots: bool = False


class CorrectParts(msgspec.Struct, frozen=True, gc=False):
    """Correct the only contribution to a version for what moved since version ``base``.

    It has its share of a round of ``active`` slots. Its payloads stay, with other values.
    """

    table: int
    shard: int
    parts: list[ReadyPart]
    base: int
    active: int


class ScaleParts(msgspec.Struct, frozen=True, gc=False):
    """Multiply what parts have of buffers, or ``is_all`` of them: some slots are not in the folds.

    Payloads stay, with other values.
    """

    table: int
    shard: int
    parts: list[ReadyPart]
    factor: float
    is_all: bool


class ComputeDigest(msgspec.Struct, frozen=True, gc=False):
    """Sum up values and optimizer state of a shard; answered by `DigestComputed`."""

    table: int
    shard: int
    version: int


class CopyUnit(msgspec.Struct, frozen=True, gc=False):
    """Copy the state of a unit for a member; answered by `UnitCopied`.

    With ``older`` what its ``parts`` were in that version too, None for nothing.
    """

    table: int
    shard: int
    member: int
    unit: int
    parts: list[int]
    older: int | None


class LoadUnit(msgspec.Struct, frozen=True, gc=False):
    """Take over a unit's state at ``version`` and keep its ``parts`` for pulls; frees payloads.

    With ``has_older`` the payloads end with what the parts were in the version before; that is kept
    for pulls as well if ``is_older_kept``.
    """

    table: int
    shard: int
    unit: int
    version: int
    header: bytes
    payloads: tuple[int, ...]
    parts: list[int]
    has_older: bool
    is_older_kept: bool


class SaveShard(msgspec.Struct, frozen=True, gc=False):
    """Write the shard as it is now to a file of a folder; answered by `ShardStored`.

    Parts of later versions may be made meanwhile: each unit is copied before it is stepped again.
    """

    table: int
    shard: int
    version: int
    folder: str
    path: str


class RestoreShard(msgspec.Struct, frozen=True, gc=False):
    """Take over the shard's values from the checkpoint of a version, and keep them for pulls.

    Answered by `ShardRestored`, or `ServerFailed`.
    """

    table: int
    shard: int
    folder: str
    version: int


class CloseShard(msgspec.Struct, frozen=True, gc=False):
    """Free the tensors of a shard."""

    table: int
    shard: int


class Connect(msgspec.Struct, frozen=True, gc=False):
    """Open a link to another server."""

    server: int
    address: str


class Disconnect(msgspec.Struct, frozen=True, gc=False):
    """Close the link to a server that is gone."""

    server: int


class PartsRef(msgspec.Struct, frozen=True, gc=False):
    """Reference to adjacent parts of a version, as the payload of a `Send`."""

    table: int
    shard: int
    version: int
    part: int
    count: int


class ReleaseVersion(msgspec.Struct, frozen=True, gc=False):
    """This version will not be asked for any more."""

    table: int
    shard: int
    version: int


class RecordVersion(msgspec.Struct, frozen=True, gc=False):
    """For the ledger: which nodes, from which incarnation, went into part 0 of a version.

    ``is_primary`` says that workers get this version from here. A server that is promoted says so
    of the version that it holds. What its primary relayed bears that one's incarnation.
    """

    table: int
    shard: int
    version: int
    contributors: list[tuple[int, int, int]]
    is_primary: bool


Event = (
    Received
    | PeerLost
    | Tick
    | NormComputed
    | ProductsComputed
    | DigestComputed
    | UnitCopied
    | ShardStored
    | ShardRestored
    | ServerDrainAsked
    | ServerFailed
)
Effect = (
    Send
    | Note
    | Halt
    | OpenShard
    | FoldPayloads
    | ReleasePayload
    | ComputeNorm
    | ComputeProducts
    | ScalePayload
    | CombinePayloads
    | MakeParts
    | CorrectParts
    | ScaleParts
    | ComputeDigest
    | CopyUnit
    | LoadUnit
    | SaveShard
    | RestoreShard
    | CloseShard
    | Connect
    | Disconnect
    | ReleaseVersion
    | RecordVersion
)
