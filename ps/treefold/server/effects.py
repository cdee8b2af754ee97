"""What only a server's core hears and asks for, beside the vocabulary that all cores share."""

from dataclasses import dataclass

from treefold.common.layout import ShardSpan
from treefold.common.spec import TableSpec
from treefold.wire.exchange import Halt, Note, PeerLost, Received, Send, Tick
from treefold.wire.messages import RoundMeta


@dataclass(frozen=True, slots=True)
class NormComputed:
    """The sums of squares that `ComputeNorm` asked for, one per block."""

    table: int
    shard: int
    round: int
    sums: list[float]


@dataclass(frozen=True, slots=True)
class ServerDrainAsked:
    """The operator wants this server to stop."""


@dataclass(frozen=True, slots=True)
class ServerFailed:
    """What the job asks for cannot be done here, for this reason."""

    text: str


@dataclass(frozen=True, slots=True)
class OpenShard:
    """Make the tensors of a shard."""

    table: int
    shard: int
    spec: TableSpec
    span: ShardSpan


@dataclass(frozen=True, slots=True)
class FoldPayloads:
    """Payload ``left`` becomes ``left + right``; ``right`` is not needed any more."""

    table: int
    shard: int
    part: int
    left: int
    right: int


@dataclass(frozen=True, slots=True)
class ReleasePayload:
    """This payload is not needed (any more)."""

    payload: int


@dataclass(frozen=True, slots=True)
class ComputeNorm:
    """Sum the squares of the folded gradient block by block; answered by `NormComputed`.

    ``roots`` has one payload per part, None where no tensor of the part has a gradient.
    """

    table: int
    shard: int
    round: int
    roots: list[int | None]


@dataclass(frozen=True, slots=True)
class PublishVersion:
    """Make ``version`` from the roots (a step, or initial values) and keep it for pulls.

    ``absent`` has per part the bitmap of tensors without a gradient; ``meta`` is None for version
    0; ``norm`` is the global gradient norm, NaN if the round has no limit for it. Takes over the
    roots.
    """

    table: int
    shard: int
    version: int
    roots: list[int | None]
    absent: list[bytes]
    meta: RoundMeta | None
    norm: float


@dataclass(frozen=True, slots=True)
class PartRef:
    """Reference to one part of a published version, as the payload of a `Send`."""

    table: int
    shard: int
    version: int
    part: int


@dataclass(frozen=True, slots=True)
class ReleaseVersion:
    """This version will not be asked for any more."""

    table: int
    shard: int
    version: int


@dataclass(frozen=True, slots=True)
class RecordVersion:
    """For the ledger: which nodes, from which worker incarnation, went into part 0 of a version."""

    table: int
    shard: int
    version: int
    contributors: list[tuple[int, int, int]]


Event = Received | PeerLost | Tick | NormComputed | ServerDrainAsked | ServerFailed
Effect = (
    Send
    | Note
    | Halt
    | OpenShard
    | FoldPayloads
    | ReleasePayload
    | ComputeNorm
    | PublishVersion
    | ReleaseVersion
    | RecordVersion
)
