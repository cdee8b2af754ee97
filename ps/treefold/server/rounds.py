"""The state of one shard and of the round that it collects, for `treefold.server.core`; pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import msgspec

from treefold.common.layout import ShardSpan
from treefold.common.spec import Dtype, Hyper, Placement, Rule, TableSpec
from treefold.common.tree import FoldSet, Node, is_valid, span
from treefold.server.chains import Chain
from treefold.server.effects import Effect, FoldPayloads, ReadyPart, ReleasePayload
from treefold.wire.exchange import Peer
from treefold.wire.messages import PartMissing, Push, Refused, RoundHyper, RoundMeta, RoundStatus
from treefold.wire.words import INITIAL_ROUND, Code, Frame

PAUSE_FACTOR = 4  # what takes longer than so many usual rounds says nothing of the next one


class RoundState(Enum):
    """Life of a round: nodes come in, the norm is measured if it is limited, it is a version."""

    OPEN = auto()
    MEASURING = auto()
    PUBLISHED = auto()


@dataclass(frozen=True, slots=True)
class HyperOf:
    """Hyper-parameters of a round by param group, None for initial values, and its norm limit."""

    groups: list[Hyper] | None
    norm_max: float


class Held(msgspec.Struct, gc=False):
    """What a node holds: a payload, None if no tensor has a gradient, and which have none."""

    payload: int | None
    absent: int


class Arrived(msgspec.Struct, frozen=True, gc=False):
    """A push and the payloads that came with it."""

    push: Push
    payloads: tuple[int, ...]

    def held(self, number: int) -> Held:
        """What one part of the run holds."""
        absent = self.push.absent
        mask = int.from_bytes(absent[number], "little") if absent else 0
        return Held(self.payloads[number] if self.payloads else None, mask)


@dataclass(slots=True)
class PartFold:
    """The nodes of one part, and who sent each contribution that is in them."""

    fold: FoldSet[Held]
    pieces: int
    senders: dict[Node, int] = field(default_factory=dict)

    def ready(self, part: int) -> ReadyPart | None:
        """The part as its optimizer needs it, None while its root is not there."""
        root = self.fold.root
        if root is None:
            return None
        return ReadyPart(part, root.payload, root.absent.to_bytes(-(-self.pieces // 8), "little"))


@dataclass(slots=True)
class Round:
    """The round that a shard collects. ``active`` is 0 until its first message says it.

    Attributes
    ----------
    hyper : HyperOf or None
        What parts are stepped with, once it is known.
    meta : RoundMeta or None
        What slot 0's worker said at the end of its loop body.
    rooted : dict of int to None
        Parts of which the root is there and nothing was made yet, in the order in which they came.
    made : dict of int to None
        Parts of which the next version exists.
    fresh : list of int
        Those of them that nobody who waits has been sent.
    is_told : bool
        Whether those who wait have heard that the next version has begun.
    norm : float
        The global gradient norm, once it is known and if it is limited.
    is_closed : bool
        Whether the other members of the chain were told that the round is complete.
    is_checked : bool
        Whether copies of the version that it makes are compared.
    wanted : list of int or None
        Parts without which the round is not complete; None: all of them.
    roots : dict of int to ReadyPart
        What parts were made of, kept for members that lack it.
    contributed : list of (level, index, sender) or None
        What the primary says of the contributions in part 0.
    """

    number: int
    key: tuple[int, int]
    pieces: list[int]
    active: int = 0
    state: RoundState = RoundState.OPEN
    folds: list[PartFold] = field(default_factory=list)
    hyper: HyperOf | None = None
    meta: RoundMeta | None = None
    sums: list[float] = field(default_factory=list)
    rooted: dict[int, None] = field(default_factory=dict)
    made: dict[int, None] = field(default_factory=dict)
    fresh: list[int] = field(default_factory=list)
    norm: float = math.nan
    is_norm_known: bool = False
    is_told: bool = False
    is_closed: bool = False
    is_checked: bool = False
    wanted: list[int] | None = None
    roots: dict[int, ReadyPart] = field(default_factory=dict)
    contributed: list[tuple[int, int, int]] | None = None

    def __post_init__(self) -> None:
        """Initial values need nothing from slot 0."""
        if self.number == INITIAL_ROUND:
            self.hyper = HyperOf(None, 0.0)

    def open(self, active: int, parts_count: int) -> None:
        """Learn how many slots contribute."""
        self.active = active
        self.folds = [PartFold(FoldSet(active), self.pieces[part]) for part in range(parts_count)]

    def take(self, part: int, push: Push, held: Held, effects: list[Effect]) -> bool:
        """Take in a node of one part and fold what meets; False if it was a duplicate."""
        target = self.folds[part]
        node = Node(push.level, push.index)
        added = target.fold.add(node, held)
        if added is None:
            return False
        merges, dropped = added
        if dropped:
            low, high = span(node, self.active)
            for inner in [n for n in target.senders if low <= span(n, self.active)[0] < high]:
                del target.senders[inner]
        target.senders[node] = push.sender
        effects += [ReleasePayload(old.payload) for old in dropped if old.payload is not None]
        for merge in merges:
            left, right = merge.left, merge.right
            if left.payload is None:
                left.payload = right.payload
            elif right.payload is not None:
                effects.append(FoldPayloads(left.payload, right.payload))
            left.absent &= right.absent
        if target.fold.root is not None:
            self.rooted[part] = None
        return True

    @property
    def is_collecting(self) -> bool:
        """Whether something must still come from workers."""
        return self.state is RoundState.OPEN or self.meta is None

    @property
    def is_rooted(self) -> bool:
        """Whether every part's root is there."""
        return self.active > 0 and len(self.rooted) + len(self.made) == len(self.pieces)

    @property
    def is_complete(self) -> bool:
        """Whether every part is made, and what the next round starts from is known."""
        has_meta = self.meta is not None or self.number == INITIAL_ROUND
        if self.active == 0 or not has_meta:
            return False
        if self.wanted is None:
            return len(self.made) == len(self.pieces)
        return all(part in self.made for part in self.wanted)

    @property
    def is_begun(self) -> bool:
        """Whether what goes with the next version is known, and some of its parts are there."""
        is_limited = self.hyper is not None and self.hyper.norm_max > 0
        return self.meta is not None and bool(self.made) and not is_limited

    def reopen(self) -> None:
        """Another server leads the round from now on."""
        self.is_closed = False
        self.sums = []
        if self.state is RoundState.MEASURING and not self.is_norm_known:
            self.state = RoundState.OPEN

    def payloads(self) -> list[int]:
        """Payloads of parts that nothing was made of yet."""
        held = [
            held.payload
            for number, part in enumerate(self.folds)
            if number not in self.made
            for held in part.fold.nodes.values()
        ]
        return [payload for payload in held if payload is not None]

    def ready(self) -> list[ReadyPart]:
        """Parts that are rooted and not made, in the order in which they lie."""
        found = [self.folds[part].ready(part) for part in sorted(self.rooted)]
        return [part for part in found if part is not None]

    def contributors(self) -> list[tuple[int, int, int]]:
        """``(level, index, sender)`` of every contribution in part 0."""
        if self.contributed is not None:
            return self.contributed
        senders = self.folds[0].senders if self.folds else {}
        return [(node.level, node.index, sender) for node, sender in senders.items()]

    def missing(self) -> list[int]:
        """Slots that some part, or the meta, still lacks."""
        lacking = {slot: None for part in self.folds for slot in part.fold.missing()}
        if self.meta is None and self.number != INITIAL_ROUND:
            lacking[0] = None
        return sorted(lacking)


@dataclass(slots=True)
class Wait:
    """A pull of a version that is not complete yet, and the parts that are still to be sent."""

    version: int
    parts: dict[int, None]


@dataclass(slots=True)
class Incoming:
    """Slices of a unit at a version that are here."""

    version: int
    slices: dict[int, int] = field(default_factory=dict)


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
    kept : dict of int to Kept
        Versions that can be pulled: the newest, and until parts of the next one are made the one
        before, since shards of one table are at most one version apart.
    parts : list of (start, stop)
        Elements of each part in the table's flat space.
    pieces : list of int
        Tensors (pieces of them) in each part.
    wires : list of Dtype
        What each part travels as.
    span : ShardSpan
        Its blocks.
    chain : Chain
        Who else holds the shard.
    is_settled : bool
        Whether the newest version is known to be held by the whole chain.
    digest : (int, bytes)
        The version that was last summed up, and its checksum.
    stuck_ns : int or None
        Since when nothing but the rest of the chain, or the scheduler, is waited for.
    last : Round or None
        The round before the one that is collected, while other members may lack its roots.
    incoming : dict of int to Incoming
        Units that are being copied to this server.
    contributors : list of (level, index, sender)
        Of the newest version.
    """

    table: int
    number: int
    view: int
    chain: Chain
    spec: TableSpec
    span: ShardSpan
    parts: Sequence[tuple[int, int]]
    pieces: list[int]
    wires: list[Dtype]
    version: int = INITIAL_ROUND
    round: Round | None = None
    waits: dict[Peer, Wait] = field(default_factory=dict)
    kept: dict[int, Kept] = field(default_factory=dict)
    published_ns: int = 0
    round_time_ns: int = 0
    late_ns: int | None = None
    norm_retry_ns: int | None = None
    is_settled: bool = True
    digest: tuple[int, bytes] = (INITIAL_ROUND, b"")
    stuck_ns: int | None = None
    last: Round | None = None
    incoming: dict[int, Incoming] = field(default_factory=dict)
    contributors: list[tuple[int, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """A shard begins by collecting its initial values."""
        self.round = self._next_round()

    @property
    def parts_count(self) -> int:
        """Number of parts."""
        return len(self.parts)

    @property
    def is_whole(self) -> bool:
        """Whether the optimizer steps all parts at once."""
        return self.spec.placement is Placement.TENSORWISE and self.spec.rule is Rule.OPTIMIZER

    @property
    def units_count(self) -> int:
        """Number of units: what the optimizer steps at once."""
        return 1 if self.is_whole else self.parts_count

    def can_tell(self, version: int) -> bool:
        """Whether workers may be answered who ask for a version."""
        return self.is_settled or (version < self.version and version in self.kept)

    def unit_of(self, part: int) -> int:
        """The unit that a part belongs to."""
        return 0 if self.is_whole else part

    def parts_of(self, unit: int) -> range:
        """The parts of a unit."""
        return range(self.parts_count) if self.is_whole else range(unit, unit + 1)

    def is_loaded(self, part: int) -> bool:
        """Whether a part's values are here; they may be missing while the shard is copied here."""
        return self.chain.units is None or self.unit_of(part) in self.chain.units

    def frame(self, part: int, count: int, round_: int = 0) -> Frame:
        """Description of the payload of a run of parts, which are of one wire type."""
        wire = Dtype.FLOAT32 if round_ == INITIAL_ROUND else self.wires[part]
        return Frame(wire, self.parts[part + count - 1][1] - self.parts[part][0])

    def restart(self) -> None:
        """Know nothing again."""
        self.version = INITIAL_ROUND
        self.kept.clear()
        self.last = None
        self.round = self._next_round()
        self.contributors = []
        self.chain.units, self.chain.is_started = {}, False

    def begin_at(self, version: int, kept: dict[int, Kept]) -> None:
        """Take part from a version on that others have made."""
        self.version = version
        self.kept = kept
        self.round = self._next_round()

    def publish(self, now_ns: int, done: Round) -> None:
        """Every part of the next version is made: move on to the round that begins with it."""
        done.state = RoundState.PUBLISHED
        self.version = done.number + 1
        self.kept[self.version] = Kept(b"" if done.meta is None else done.meta.state, done.norm)
        if self.published_ns:
            took_ns = now_ns - self.published_ns
            if self.round_time_ns:  # a pause of the script, as for an evaluation, is no round
                took_ns = min(took_ns, PAUSE_FACTOR * self.round_time_ns)
            self.round_time_ns = (
                (3 * self.round_time_ns + took_ns) // 4 if self.round_time_ns else took_ns
            )
        self.published_ns = now_ns
        self.late_ns = self.norm_retry_ns = None
        self.contributors = done.contributors()
        self.round = self._next_round()

    def _next_round(self) -> Round | None:
        if self.spec.rule is Rule.CONSTANT and self.version > INITIAL_ROUND:
            return None
        return Round(self.version, (self.table, self.number), self.pieces)

    def refusal_of(self, push: Push) -> Refused | None:
        """Why a push cannot be meant for this shard, None if it can."""
        where = f"table {self.spec.name!r} shard {self.number}"
        last = push.part + push.count - 1
        if last >= self.parts_count:
            return Refused(
                0, Code.BAD_NODE, f"{where} has {self.parts_count} parts, not part {last}"
            )
        if not is_valid(Node(push.level, push.index), push.active):
            text = f"no node ({push.level}, {push.index}) in a fold of {push.active} slots"
            return Refused(0, Code.BAD_NODE, text)
        if push.round == INITIAL_ROUND and push.active != 1:
            return Refused(0, Code.BAD_NODE, "initial values come from one worker, as one node")
        return self._refusal_of_marks(push, where) or self._refusal_of_frame(push, where)

    def _refusal_of_marks(self, push: Push, where: str) -> Refused | None:
        pieces = self.pieces[push.part : push.part + push.count]
        lengths = [len(marks) for marks in push.absent]
        if lengths and lengths != [-(-count // 8) for count in pieces]:
            text = (
                f"{where} parts {push.part} to {push.part + push.count - 1}: absent marks of "
                f"{lengths} bytes, expected {[-(-count // 8) for count in pieces]}"
            )
            return Refused(0, Code.BAD_PAYLOAD, text)
        if push.frame is None:
            masks = [int.from_bytes(marks, "little") for marks in push.absent]
            if masks != [(1 << count) - 1 for count in pieces]:
                text = f"{where}: a push without payload must mark every tensor absent"
                return Refused(0, Code.BAD_PAYLOAD, text)
        return None

    def _refusal_of_frame(self, push: Push, where: str) -> Refused | None:
        expected, got = self.frame(push.part, push.count), push.frame
        if push.round == INITIAL_ROUND:
            expected = Frame(Dtype.FLOAT32, expected.elements)
        elif len(set(self.wires[push.part : push.part + push.count])) > 1:
            return Refused(0, Code.BAD_PAYLOAD, f"{where}: a push of parts of several wire types")
        if got is None or (got.dtype, got.elements) == (expected.dtype, expected.elements):
            return None
        text = (
            f"{where} part {push.part}: expected {expected.elements} elements of "
            f"{expected.dtype.name.lower()}, got {got.elements} of {got.dtype.name.lower()}"
        )
        return Refused(0, Code.BAD_PAYLOAD, text)

    def refusal_of_hyper(self, meta: RoundHyper | RoundMeta) -> Refused | None:
        """Why a round's hyper-parameters cannot be meant for this shard, None if they can."""
        wanted = 0 if self.spec.optimizer is None else len(self.spec.optimizer.groups)
        if len(meta.groups) != wanted:
            text = f"table {self.spec.name!r} has {wanted} param groups, not {len(meta.groups)}"
            return Refused(0, Code.BAD_PAYLOAD, text)
        return None

    def out_of_turn(self, round_: int, active: int) -> Refused | None:
        """Why a contribution to a round cannot be taken at this version, None if it can."""
        if round_ > self.version:
            text = f"round {round_} of a shard that is at version {self.version}"
            return Refused(0, Code.FUTURE_ROUND, text)
        current = self.round
        if current is not None and round_ == current.number and current.active not in (0, active):
            text = (
                f"round {round_} has {current.active} active slots, not {active}: data plans differ"
            )
            return Refused(0, Code.SPEC_MISMATCH, text)
        return None

    def status(self, parts_max: int) -> RoundStatus:
        """What this shard lacks, for a worker to send again."""
        current = self.round
        if current is None or not self.chain.is_started:  # who is being restored lacks nothing
            return RoundStatus(self.table, self.number, self.version, [], is_meta_missing=False)
        if current.active == 0:
            missing = [PartMissing(part, []) for part in range(min(parts_max, self.parts_count))]
        else:
            lacking = [(n, part.fold.missing()) for n, part in enumerate(current.folds)]
            missing = [PartMissing(n, slots) for n, slots in lacking if slots][:parts_max]
        lacks_meta = current.meta is None and current.number != INITIAL_ROUND
        return RoundStatus(self.table, self.number, current.number, missing, lacks_meta)

    def lacking(self, parts_max: int) -> RoundStatus:
        """What this shard lacks of what its primary has, for that to send again."""
        current = self.round
        if current is None:
            return RoundStatus(self.table, self.number, self.version, [], is_meta_missing=False)
        wanted = range(self.parts_count) if current.wanted is None else current.wanted
        parts = [part for part in wanted if part not in current.made][:parts_max]
        missing = [PartMissing(part, []) for part in parts]
        lacks_word = not current.is_norm_known
        return RoundStatus(self.table, self.number, current.number, missing, lacks_word)

    def waiting_for(self) -> str:
        """What this shard waits for, in words; empty if for nothing."""
        current = self.round
        if current is None:
            return ""
        what = f"table {self.spec.name} shard {self.number}"
        if current.number == INITIAL_ROUND:
            return f"{what}: initial values"
        if not current.is_collecting:
            return f"{what} round {current.number}: the global gradient norm"
        if current.active == 0:
            return f"{what} round {current.number}: any slot"
        slots = ", ".join(str(slot) for slot in current.missing())
        return f"{what} round {current.number}: slots {slots}"
