"""What only a server's core hears and asks for, beside the vocabulary that all cores share."""

from dataclasses import dataclass

from treefold.common.layout import ShardSpan
from treefold.common.spec import Hyper, TableSpec
from treefold.wire.exchange import Halt, Note, PeerLost, Received, Send, Tick


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

    left: int
    right: int


@dataclass(frozen=True, slots=True)
class ReleasePayload:
    """This payload is not needed (any more)."""

    payload: int


@dataclass(frozen=True, slots=True)
class ReadyPart:
    """A part of which the root is there: its payload, None if no tensor has a gradient.

    ``absent`` is the bitmap of tensors without a gradient.
    """

    part: int
    root: int | None
    absent: bytes


@dataclass(frozen=True, slots=True)
class ComputeNorm:
    """Sum the squares of the folded gradient block by block; answered by `NormComputed`."""

    table: int
    shard: int
    round: int
    parts: list[ReadyPart]


@dataclass(frozen=True, slots=True)
class MakeParts:
    """Make parts of ``version`` from their roots and keep them for pulls. Takes over the roots.

    ``groups`` are the round's hyper-parameters, None for initial values. ``norm`` is the global
    gradient norm and ``norm_max`` its limit, 0 for none.
    """

    table: int
    shard: int
    version: int
    parts: list[ReadyPart]
    groups: list[Hyper] | None
    norm_max: float
    norm: float


@dataclass(frozen=True, slots=True)
class PartsRef:
    """Reference to adjacent parts of a version, as the payload of a `Send`."""

    table: int
    shard: int
    version: int
    part: int
    count: int


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
    | MakeParts
    | ReleaseVersion
    | RecordVersion
)
