"""Every message of the protocol.

Structs are positional on the wire: append fields with defaults, never reorder, remove or reuse; no
tag twice. Each struct, its page in ``docs/wire.md`` and its golden bytes change in one commit.

A message with tensor data covers a *run* of adjacent parts of a shard and carries a `Frame` that
describes it. The bytes follow as one frame, or lie in a segment that both sides share.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from treefold.common.plan import Count, LoopPlan
from treefold.common.round_state import RECORD_BYTES_MAX
from treefold.common.spec import GROUPS_MAX, Hyper, TableSpec, Text
from treefold.wire.chain import ChainApplied, ChainAsk, ChainRound, UnitCopy, UnitTaken
from treefold.wire.decisions import (
    HealthDecision,
    HealthReport,
    NormDecision,
    NormReport,
    QuorumDecision,
    QuorumReport,
)
from treefold.wire.probes import Probe, ProbeSeen
from treefold.wire.segments import SegmentAnswer, SegmentOffer
from treefold.wire.words import (
    FOLDER_LENGTH_MAX,
    FRAME_BYTES_MAX,
    MEMBERS_MAX,
    PARTS_MAX,
    RUN_PARTS_MAX,
    TABLES_MAX,
    Active,
    Address,
    Code,
    Facts,
    Figures,
    Frame,
    Leases,
    Logged,
    Marks,
    Member,
    Message,
    Need,
    Norms,
    Outcome,
    PartNumber,
    Parts,
    Phase,
    Role,
    Round,
    ShardNumber,
    Slot,
    SlotCount,
    Slots,
    Spent,
    StaleCounts,
    State,
    TableNumber,
    TablePlace,
)

# ---- member and scheduler --------------------------------------------------------------------


class Register(Message, tag=1, frozen=True):
    """A new process asks to become a member. Repeated with the same ``nonce`` until answered.

    ``rank`` is the one it would like to have, -1 for any. ``origin`` is the first incarnation of a
    process that had to register again, 0 of a new one.
    """

    protocol: Count
    role: Role
    nonce: Count
    address: Address
    host: Annotated[str, Meta(max_length=256)]
    pid: Count
    package: Annotated[str, Meta(max_length=64)]
    rank: Annotated[int, Meta(ge=-1, lt=MEMBERS_MAX)] = -1
    origin: Count = 0


class Registered(Message, tag=2, frozen=True):
    """The scheduler's answer: who the member is now, and the cluster's settings.

    Servers save their shards to the folder ``checkpoint`` at every ``checkpoint_every``-th version;
    0: never.
    """

    nonce: Count
    job: Count
    incarnation: Count
    rank: Count
    heartbeat_ms: Count
    dead_after_ms: Count
    servers: Count
    workers: Count
    checkpoint: Annotated[str, Meta(max_length=FOLDER_LENGTH_MAX)] = ""
    checkpoint_every: Count = 0


class Refused(Message, tag=3, frozen=True):
    """A request is not granted; nothing was changed. ``call`` is the request's number, or 0."""

    call: Count
    code: Code
    text: Text


class Heartbeat(Message, tag=4, frozen=True):
    """A member is alive and has view ``view``.

    A worker adds what it measured, a server what it holds. ``round`` is the worker's current round
    or the server's oldest open one; ``waiting`` says what the member waits for. ``norms`` are
    ``(table, round, norm)`` of the newest norms that a server knows, for a scheduler that was
    started again. ``saving`` counts shards that a server is writing to a checkpoint, or has written
    and the scheduler has not said that it knows. ``staleness`` is, of shard 0 of asynchronous
    tables, how many contributions of each worker were how stale. ``spare`` are leased slots of an
    asynchronous pass that are not begun; ``is_idle``: nothing is left. ``metrics``: where they are.
    ``facts``: of the host, now and then.
    ``logged``: what a script said last, by name. ``figures``: of tensors, while somebody looks.
    """

    incarnation: Count
    view: Count
    tables: Count
    round: Round
    slot_time_ns: Count
    samples: Count
    loss: float | None
    waiting: Text
    rss_bytes: Count
    cpu_percent: float
    spent_ns: Spent = msgspec.field(default_factory=dict)
    norms: Norms = msgspec.field(default_factory=list)
    saving: Count = 0
    staleness: StaleCounts = msgspec.field(default_factory=list)
    spare: Slots = msgspec.field(default_factory=list)
    is_idle: bool = False
    metrics: Address = ""
    facts: Facts | None = None
    logged: Logged = msgspec.field(default_factory=list)
    figures: Figures = msgspec.field(default_factory=list)


class HeartbeatSeen(Message, tag=5, frozen=True):
    """The scheduler heard the heartbeat; its newest view has number ``view``.

    ``confirmed`` is that number if the member has that view, and the scheduler has written down
    that it has; else 0. Then the chains that the view names for the member are the ones that count.
    """

    incarnation: Count
    view: Count
    confirmed: Count = 0
    is_watched: bool = False


class DeclareTable(Message, tag=6, frozen=True):
    """A worker declares a table. The first declaration makes it, later ones must be equal.

    ``record`` is a `treefold.common.round_state.ModelRecord`, for checkpoints; the first counts.
    """

    incarnation: Count
    call: Count
    spec: TableSpec
    record: Annotated[bytes, Meta(max_length=RECORD_BYTES_MAX)] = b""


class DeclarePlan(Message, tag=7, frozen=True):
    """A worker begins a pass over its data. The first makes the plan, later ones must be equal."""

    incarnation: Count
    call: Count
    plan: LoopPlan


class Accepted(Message, tag=8, frozen=True):
    """A declaration is accepted. ``number`` is the table's number, or the plan's index."""

    call: Count
    number: Count


class View(Message, tag=9, frozen=True):
    """The cluster as it is from now on. Numbers only grow; only the scheduler makes views.

    ``era`` is the view with which the job last went back to a checkpoint, 0 if it never did: a
    worker that knows another one has to begin anew.
    """

    number: Count
    phase: Phase
    chief: Count
    members: Annotated[list[Member], Meta(max_length=MEMBERS_MAX)]
    tables: Annotated[list[TablePlace], Meta(max_length=TABLES_MAX)]
    leases: Leases
    previous: Leases
    era: Count = 0


class AssignTable(Message, tag=10, frozen=True):
    """To a server: the spec of a table of whose shards it holds some (the view says which)."""

    table: TableNumber
    spec: TableSpec


class Leave(Message, tag=11, frozen=True):
    """A member leaves of its own accord. Repeated until answered by `Stop`."""

    incarnation: Count
    outcome: Outcome
    text: Text


class RoundLate(Message, tag=12, frozen=True):
    """A server to the scheduler: round ``round`` is taking too long, these slots are missing.

    ``missing`` is empty if nothing of the round has come: then all of them are.
    """

    incarnation: Count
    round: Round
    missing: Slots


class Grant(Message, tag=13, frozen=True):
    """Backup task: compute these slots of round ``round`` as well, once your own are done."""

    round: Round
    slots: Slots


class Flush(Message, tag=14, frozen=True):
    """Push what you have folded of round ``round`` now; others are finishing the rest."""

    round: Round


class StatusRequest(Message, tag=17, frozen=True):
    """Anyone to the scheduler: asks what is going on. Who is watching is to hear of the end too."""

    call: Count
    is_watching: bool = False


class StatusReply(Message, tag=18, frozen=True):
    """The scheduler's answer, a JSON document."""

    call: Count
    body: Annotated[bytes, Meta(max_length=FRAME_BYTES_MAX)]


class Stop(Message, tag=19, frozen=True):
    """The scheduler to a member: the job has ended this way, or you have left; stop."""

    outcome: Outcome
    text: Text


class Fenced(Message, tag=20, frozen=True):
    """The scheduler to a member it had given up: register again; your old incarnation is over."""

    incarnation: Count


class ChainSynced(Message, tag=21, frozen=True):
    """A primary to the scheduler: joining ``member`` holds all of a shard now."""

    incarnation: Count
    table: TableNumber
    shard: ShardNumber
    chain_view: Count
    member: Count


class ChainDiffers(Message, tag=23, frozen=True):
    """A primary to the scheduler: ``member`` is not in sync, and has to be copied to again."""

    incarnation: Count
    table: TableNumber
    shard: ShardNumber
    chain_view: Count
    member: Count


class ShardSaved(Message, tag=25, frozen=True):
    """A server to the scheduler: a shard is in a file of a checkpoint. Repeated until answered.

    ``path`` is the file's place in the folder of checkpoints. ``state`` and ``norm`` are those of
    `Published`; of a synchronous table only shard 0 brings the state. With a ``text`` the file
    could not be written, which is why.
    """

    incarnation: Count
    table: TableNumber
    shard: ShardNumber
    version: Count
    path: Annotated[str, Meta(max_length=256)]
    nbytes: Count
    sha256: Annotated[bytes, Meta(max_length=32)]
    state: State
    norm: float
    text: Text = ""


class SavedSeen(Message, tag=26, frozen=True):
    """The scheduler knows of a file, or of why there is none."""

    table: TableNumber
    shard: ShardNumber
    version: Count


class LeaveAsked(Message, tag=24, frozen=True):
    """The scheduler to a worker that is drained: finish your slot, then leave."""

    incarnation: Count


class DrainRequest(Message, tag=22, frozen=True):
    """Anyone to the scheduler: take a member's work away, then let it leave; by name.

    Answered by `Accepted` with its incarnation, or `Refused`. A member that asks for itself says
    its own ``incarnation``.
    """

    call: Count
    member: Annotated[str, Meta(max_length=64)]
    incarnation: Count = 0


# ---- worker and server -----------------------------------------------------------------------


class Push(Message, tag=40, frozen=True):
    """One node of the fold tree for ``count`` adjacent parts of a shard, and its payload.

    ``active`` is the number of slots of the round that contribute. ``absent`` is empty if every
    tensor has a gradient. Otherwise it has a bitmap per part: bit ``i`` (byte ``i // 8``, value
    ``1 << i % 8``) is set if the part's ``i``-th tensor had no gradient in any of the node's slots;
    ``frame`` is None if that holds for all tensors of all parts. Round `INITIAL_ROUND` brings
    initial values.
    """

    job: Count
    sender: Count
    view: Count
    table: TableNumber
    shard: ShardNumber
    part: PartNumber
    count: Parts
    round: Round
    active: Active
    level: Annotated[int, Meta(ge=0, le=16)]
    index: Slot
    absent: Annotated[list[Marks], Meta(max_length=RUN_PARTS_MAX)]
    frame: Frame | None


class RoundHyper(Message, tag=44, frozen=True):
    """What the optimizer needs from slot 0 to step parts of a round before the round is over.

    Hyper-parameters by param group, and the limit for the global gradient norm, 0 for none.
    `RoundMeta` repeats both.
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


class RoundMeta(Message, tag=33, frozen=True):
    """What travels with slot 0: the hyper-parameters of the round, by param group.

    ``norm_max`` is the limit for the global gradient norm, 0 for none. ``state`` is the worker's
    own record of what the next round starts from (LR schedulers, integer buffers), opaque to
    servers. A round is complete only with it. For asynchronous tables every slot sends it; all
    rounds below ``first``, where the pass over the data began, are in then, and ``base`` is the
    version of the shard that its loop body began with. Where rounds go on without the last slots
    every slot sends it, too: its batch is ``(first, slot)`` of the plan, or if ``is_again`` number
    ``slot`` of those that were late. The round has ``due`` batches, and this one ``samples`` of the
    ``total`` of its round of the plan.
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
    state: State
    slot: Slot = 0
    first: Count = 0
    base: Count = 0
    is_again: bool = False
    due: SlotCount = 0
    samples: Count = 0
    total: Count = 0


class Pull(Message, tag=34, frozen=True):
    """Asks for ``version`` of a shard: `Pulled` for its parts as they are made, `Published` last.

    A version too old to be kept is answered with the current one; who knows no version asks for 0.
    From the second ``attempt`` on, a version that does not exist yet is answered with `RoundStatus`
    as well. ``parts`` empty means all. With a ``need``, for an asynchronous table, the newest
    version is asked for, as soon as that is met.
    """

    job: Count
    sender: Count
    view: Count
    table: TableNumber
    shard: ShardNumber
    version: Count
    attempt: Count
    parts: Annotated[list[PartNumber], Meta(max_length=PARTS_MAX)]
    need: Need | None = None


class Pulled(Message, tag=42, frozen=True):
    """``count`` adjacent parts of one version of a shard, and their payload."""

    table: TableNumber
    shard: ShardNumber
    part: PartNumber
    count: Parts
    version: Count
    frame: Frame


class Published(Message, tag=43, frozen=True):
    """A version of a shard ``is_whole``, or has begun: some of its parts are made.

    ``state`` is what `RoundMeta` brought, ``norm`` the round's gradient norm, NaN without limit.
    """

    table: TableNumber
    shard: ShardNumber
    version: Count
    state: State
    norm: float
    is_whole: bool = True


class PartMissing(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Slots that a server still lacks for one part."""

    part: PartNumber
    slots: Slots


class RoundStatus(Message, tag=36, frozen=True):
    """What a server lacks to finish a round of a shard: a worker sends again what it has of it.

    If ``is_stale`` what came of the slots was computed with a version that is too old: it is let
    go, and to be computed again with a newer one.
    """

    table: TableNumber
    shard: ShardNumber
    round: Round
    missing: Annotated[list[PartMissing], Meta(max_length=PARTS_MAX)]
    is_meta_missing: bool
    is_stale: bool = False


AnyMessage = (
    Register | Registered | Refused | Heartbeat | HeartbeatSeen | DeclareTable | DeclarePlan
    | Accepted | View | AssignTable | Leave | RoundLate | Grant | Flush | NormReport
    | NormDecision | StatusRequest | StatusReply | Stop | Fenced | Push | RoundHyper | RoundMeta
    | Pull | Pulled | Published | RoundStatus | SegmentOffer | SegmentAnswer | ChainSynced
    | ChainDiffers | LeaveAsked | DrainRequest | ChainRound | ChainAsk | ChainApplied
    | UnitCopy | UnitTaken | ShardSaved | SavedSeen | QuorumReport | QuorumDecision | HealthReport
    | HealthDecision | Probe | ProbeSeen
)  # fmt: skip
