"""The state of one shard and of the round that it collects, for `treefold.server.core`; pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from treefold.common.spec import Dtype, Rule, TableSpec
from treefold.common.tree import FoldSet, Node, is_valid, span
from treefold.server.effects import Effect, FoldPayloads, ReleasePayload
from treefold.wire.exchange import Peer
from treefold.wire.messages import (
    INITIAL_ROUND,
    Code,
    Frame,
    PartMissing,
    Push,
    Refused,
    RoundMeta,
    RoundStatus,
)

VERSIONS_KEPT = (
    2  # shards of one table are at most one version apart, so a reader needs the last two
)
PAUSE_FACTOR = 4  # what takes longer than so many usual rounds says nothing of the next one


class RoundState(Enum):
    """Life of a round: nodes come in, the norm is measured if it is limited, it is a version."""

    OPEN = auto()
    MEASURING = auto()
    PUBLISHED = auto()


@dataclass(slots=True)
class Held:
    """What a node holds: a payload, None if no tensor has a gradient, and which have none."""

    payload: int | None
    absent: int


@dataclass(slots=True)
class PartFold:
    """The nodes of one part, and who sent each contribution that is in them."""

    fold: FoldSet[Held]
    pieces: int
    senders: dict[Node, int] = field(default_factory=dict)

    def root_absent(self) -> bytes:
        """Bitmap of the tensors that no slot had a gradient for."""
        root = self.fold.root
        mask = 0 if root is None else root.absent
        return mask.to_bytes(-(-self.pieces // 8), "little")


@dataclass(slots=True)
class Round:
    """The round that a shard collects. ``active`` is 0 until its first message says it."""

    number: int
    key: tuple[int, int]
    pieces: list[int]
    active: int = 0
    state: RoundState = RoundState.OPEN
    folds: list[PartFold] = field(default_factory=list)
    meta: RoundMeta | None = None
    sums: list[float] = field(default_factory=list)
    roots_count: int = 0

    def open(self, active: int, parts_count: int) -> None:
        """Learn how many slots contribute."""
        self.active = active
        self.folds = [PartFold(FoldSet(active), self.pieces[part]) for part in range(parts_count)]

    def take(self, push: Push, payload: int | None, effects: list[Effect]) -> bool:
        """Take in a node and fold what meets; False if it was a duplicate."""
        part = self.folds[push.part]
        node = Node(push.level, push.index)
        held = Held(payload, int.from_bytes(push.absent, "little"))
        added = part.fold.add(node, held)
        if added is None:
            return False
        merges, dropped = added
        low, high = span(node, self.active)
        for inner in [n for n in part.senders if low <= span(n, self.active)[0] < high]:
            del part.senders[inner]
        part.senders[node] = push.sender
        effects += [ReleasePayload(old.payload) for old in dropped if old.payload is not None]
        for merge in merges:
            left, right = merge.left, merge.right
            if left.payload is None:
                left.payload = right.payload
            elif right.payload is not None:
                effects.append(FoldPayloads(*self.key, push.part, left.payload, right.payload))
            left.absent &= right.absent
        self.roots_count += part.fold.root is not None
        return True

    def is_complete(self, parts_count: int) -> bool:
        """Whether every part's root is there, and what slot 0 brings."""
        has_meta = self.meta is not None or self.number == INITIAL_ROUND
        return self.active > 0 and self.roots_count == parts_count and has_meta

    def roots(self) -> list[int | None]:
        """Payload of each part's root."""
        return [None if part.fold.root is None else part.fold.root.payload for part in self.folds]

    def contributors(self) -> list[tuple[int, int, int]]:
        """``(level, index, sender)`` of every contribution in part 0."""
        return [(node.level, node.index, sender) for node, sender in self.folds[0].senders.items()]

    def missing(self) -> list[int]:
        """Slots that some part, or the meta, still lacks."""
        lacking = {slot: None for part in self.folds for slot in part.fold.missing()}
        if self.meta is None and self.number != INITIAL_ROUND:
            lacking[0] = None
        return sorted(lacking)


@dataclass(frozen=True, slots=True)
class Wait:
    """A pull of a version that does not exist yet."""

    version: int
    parts: list[int]


@dataclass(frozen=True, slots=True)
class Kept:
    """What goes with a published version beside its tensors."""

    state: bytes
    norm: float


@dataclass(slots=True)
class Shard:
    """One shard: what it is, its newest version (-1: none yet), the round it collects, who waits.

    Attributes
    ----------
    parts : list of (start, stop)
        Elements of each part in the table's flat space.
    pieces : list of int
        Tensors (pieces of them) in each part.
    """

    table: int
    number: int
    view: int
    spec: TableSpec
    parts: Sequence[tuple[int, int]]
    pieces: list[int]
    version: int = INITIAL_ROUND
    round: Round | None = None
    waits: dict[Peer, Wait] = field(default_factory=dict)
    kept: dict[int, Kept] = field(default_factory=dict)
    published_ns: int = 0
    round_time_ns: int = 0
    late_ns: int | None = None
    norm_retry_ns: int | None = None

    def __post_init__(self) -> None:
        """A shard begins by collecting its initial values."""
        self.round = Round(self.version, (self.table, self.number), self.pieces)

    @property
    def parts_count(self) -> int:
        """Number of parts."""
        return len(self.parts)

    def frame(self, part: int) -> Frame:
        """Description of a part's payload."""
        start, stop = self.parts[part]
        return Frame(Dtype.FLOAT32, stop - start)

    def publish(self, now_ns: int, done: Round, norm: float) -> int | None:
        """Move on to the next round; returns a version that need not be kept any longer."""
        done.state = RoundState.PUBLISHED
        self.version = done.number + 1
        self.kept[self.version] = Kept(b"" if done.meta is None else done.meta.state, norm)
        if self.published_ns:
            took_ns = now_ns - self.published_ns
            if self.round_time_ns:  # a pause of the script, as for an evaluation, is no round
                took_ns = min(took_ns, PAUSE_FACTOR * self.round_time_ns)
            self.round_time_ns = (
                (3 * self.round_time_ns + took_ns) // 4 if self.round_time_ns else took_ns
            )
        self.published_ns = now_ns
        self.late_ns = self.norm_retry_ns = None
        closed = self.spec.rule is Rule.CONSTANT
        self.round = None if closed else Round(self.version, (self.table, self.number), self.pieces)
        old = self.version - VERSIONS_KEPT
        return old if self.kept.pop(old, None) is not None else None

    def refusal_of(self, push: Push) -> Refused | None:
        """Why a push cannot be meant for this shard, None if it can."""
        where = f"table {self.spec.name!r} shard {self.number}"
        if push.part >= self.parts_count:
            return Refused(
                0, Code.BAD_NODE, f"{where} has {self.parts_count} parts, not part {push.part}"
            )
        if not is_valid(Node(push.level, push.index), push.active):
            text = f"no node ({push.level}, {push.index}) in a fold of {push.active} slots"
            return Refused(0, Code.BAD_NODE, text)
        if push.round == INITIAL_ROUND and push.active != 1:
            return Refused(0, Code.BAD_NODE, "initial values come from one worker, as one node")
        pieces = self.pieces[push.part]
        wanted = -(-pieces // 8)
        if len(push.absent) != wanted:
            marks = len(push.absent)
            text = f"{where} part {push.part}: {marks} bytes of absent marks, expected {wanted}"
            return Refused(0, Code.BAD_PAYLOAD, text)
        if push.frame is not None and push.frame != self.frame(push.part):
            expected, got = self.frame(push.part), push.frame
            text = (
                f"{where} part {push.part}: expected {expected.elements} elements of "
                f"{expected.dtype.name.lower()}, got {got.elements} of {got.dtype.name.lower()}"
            )
            return Refused(0, Code.BAD_PAYLOAD, text)
        if push.frame is None and int.from_bytes(push.absent, "little") != (1 << pieces) - 1:
            text = f"{where} part {push.part}: a push without payload must mark every tensor absent"
            return Refused(0, Code.BAD_PAYLOAD, text)
        return None

    def refusal_of_meta(self, meta: RoundMeta) -> Refused | None:
        """Why a round's meta cannot be meant for this shard, None if it can."""
        wanted = 0 if self.spec.optimizer is None else len(self.spec.optimizer.groups)
        if len(meta.groups) != wanted:
            text = f"table {self.spec.name!r} has {wanted} param groups, not {len(meta.groups)}"
            return Refused(0, Code.BAD_PAYLOAD, text)
        return None

    def status(self, parts_max: int) -> RoundStatus:
        """What this shard lacks, for a worker to send again."""
        current = self.round
        if current is None:
            return RoundStatus(self.table, self.number, self.version, [], is_meta_missing=False)
        if current.active == 0:
            missing = [PartMissing(part, []) for part in range(min(parts_max, self.parts_count))]
        else:
            lacking = [(n, part.fold.missing()) for n, part in enumerate(current.folds)]
            missing = [PartMissing(n, slots) for n, slots in lacking if slots][:parts_max]
        lacks_meta = current.meta is None and current.number != INITIAL_ROUND
        return RoundStatus(self.table, self.number, current.number, missing, lacks_meta)

    def waiting_for(self) -> str:
        """What this shard waits for, in words; empty if for nothing."""
        current = self.round
        if current is None:
            return ""
        what = f"table {self.spec.name} shard {self.number}"
        if current.number == INITIAL_ROUND:
            return f"{what}: initial values"
        if current.state is RoundState.MEASURING:
            return f"{what} round {current.number}: the global gradient norm"
        if current.active == 0:
            return f"{what} round {current.number}: any slot"
        slots = ", ".join(str(slot) for slot in current.missing())
        return f"{what} round {current.number}: slots {slots}"
