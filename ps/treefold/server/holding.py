"""What a server knows of one shard: its newest version, who waits, what it collects; pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from treefold.common.layout import ShardSpan
from treefold.common.round_state import NOTHING_APPLIED, Applied, decode_applied
from treefold.common.spec import Dtype, Placement, Rule, TableSpec
from treefold.common.tree import Node, is_valid
from treefold.server.chains import Chain
from treefold.server.compensation import StalenessMean
from treefold.server.rounds import Held, Round, RoundState
from treefold.wire.exchange import Peer
from treefold.wire.messages import PartMissing, Push, Refused, RoundHyper, RoundMeta, RoundStatus
from treefold.wire.words import INITIAL_ROUND, Code, Frame, Need

PAUSE_FACTOR = 4  # what takes longer than so many usual rounds says nothing of the next one


@dataclass(slots=True)
class Wait:
    """A pull of a version that is not complete yet, and the parts that are still to be sent."""

    version: int
    parts: dict[int, None]
    need: Need | None = None

    def is_met(self, clocks: Sequence[int]) -> bool:
        """Whether a version with these clocks has in it what the worker needs."""
        return self.need is None or self.need.is_met(clocks)


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

    @property
    def applied(self) -> Applied:
        """What is in a version of an asynchronous table."""
        return decode_applied(self.state)


@dataclass(slots=True)
class Staged:
    """A contribution to an asynchronous table that is on its way here."""

    round: int
    slot: int
    sender: int
    parts: dict[int, Held] = field(default_factory=dict)
    meta: RoundMeta | None = None
    peer: Peer | None = None

    def is_whole(self, parts_count: int) -> bool:
        """Whether all of it is here."""
        return self.meta is not None and len(self.parts) == parts_count


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
        Of the newest version; of an asynchronous table ``(round, slot, sender)`` of its only one.
    applied : Applied
        What is in the newest version of an asynchronous table.
    staged : dict of (slot, sender) to Staged
        Contributions to an asynchronous table that are on their way.
    pass_floor : int
        The last round of the newest pass over the data whose end somebody has asked for, -1 if
        there is none: it is in, or of a synchronous table to be.
    limit, limited_ns : list of int, int or None
        Until when only contributions to rounds below these, by slot, are applied to an asynchronous
        table: somebody reads all shards with the same in them.
    staleness : StalenessMean
        Of contributions to an asynchronous table since this server leads the shard.
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
    decision_retry_ns: int | None = None
    is_settled: bool = True
    digest: tuple[int, bytes] = (INITIAL_ROUND, b"")
    stuck_ns: int | None = None
    last: Round | None = None
    incoming: dict[int, Incoming] = field(default_factory=dict)
    contributors: list[tuple[int, int, int]] = field(default_factory=list)
    applied: Applied = NOTHING_APPLIED
    staged: dict[tuple[int, int], Staged] = field(default_factory=dict)
    pass_floor: int = -1
    limit: list[int] = field(default_factory=list)
    limited_ns: int | None = None
    staleness: StalenessMean = field(default_factory=StalenessMean)
    _is_by_slot: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        """A shard begins by collecting its initial values."""
        self._is_by_slot = self.spec.is_by_batch or self.spec.is_gathered
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
    def is_by_slot(self) -> bool:
        """Whether contributions of slots come here one by one, with what goes with each."""
        return self._is_by_slot and self.chain.is_primary

    @property
    def units_count(self) -> int:
        """Number of units: what the optimizer steps at once."""
        return 1 if self.is_whole else self.parts_count

    def clock(self, slot: int) -> int:
        """The round after the last one of a slot that is in the newest version."""
        clocks = self.applied.clocks
        return clocks[slot] if slot < len(clocks) else 0

    def is_beyond(self, round_: int, slot: int) -> bool:
        """Whether a contribution has to wait until somebody has read what is in now."""
        most = self.limit[slot] if slot < len(self.limit) else 0
        return self.limited_ns is not None and round_ >= most

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
        self.applied = NOTHING_APPLIED
        self.chain.units, self.chain.is_started = {}, False

    def begin_at(self, version: int, kept: dict[int, Kept]) -> None:
        """Take part from a version on that others have made."""
        self.version = version
        self.kept = kept
        self._learn()
        self.round = self._next_round()

    def _learn(self) -> None:
        if self.spec.is_asynchronous:
            self.applied = self.kept[self.version].applied
            self.contributors = [self.applied.last] if self.version > 0 else []

    def unstage(self) -> list[int]:
        """Give up contributions that are on their way; returns their payloads."""
        held = [one for staged in self.staged.values() for one in staged.parts.values()]
        self.staged.clear()
        return [one.payload for one in held if one.payload is not None]

    def begin_round_anew(self) -> list[int]:
        """Collect the round from its beginning, unless parts are made of it; returns its payloads.

        In an asynchronous table another primary may make another version of the same number.
        """
        current = self.round
        if current is None or current.made:
            return []
        self.round = self._next_round()
        return current.payloads()

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
        self.late_ns = self.decision_retry_ns = None
        self.contributors = done.contributors()
        self._learn()
        self.round = self._next_round()

    def _next_round(self) -> Round | None:
        if self.spec.rule is Rule.CONSTANT and self.version > INITIAL_ROUND:
            return None
        is_by_slot = self.spec.is_gathered and self.version != INITIAL_ROUND
        which = self.version, (self.table, self.number)
        return Round(*which, self.pieces, is_by_slot=is_by_slot)

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
        if current.is_by_leaves and current.leaves:
            lacking = [(n, current.lacking(n)) for n in range(self.parts_count)]
            missing = [PartMissing(n, slots) for n, slots in lacking if slots][:parts_max]
        elif current.active == 0:
            missing = [PartMissing(part, []) for part in range(min(parts_max, self.parts_count))]
        else:
            lacking = [(n, part.fold.missing()) for n, part in enumerate(current.folds)]
            missing = [PartMissing(n, slots) for n, slots in lacking if slots][:parts_max]
        lacks_meta = current.meta is None and current.number != INITIAL_ROUND
        lacks_meta &= not current.is_undecided(self.parts_count)
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
        if current.active == 0 and not current.leaves:
            return f"{what} round {current.number}: any slot"
        if current.is_undecided(self.parts_count):
            return f"{what} round {current.number}: the scheduler to say which slots are in"
        slots = ", ".join(str(slot) for slot in current.missing())
        return f"{what} round {current.number}: slots {slots}"
