"""The round that a shard collects, for `treefold.server.core`; pure."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto

import msgspec

from treefold.common.blocks import Row
from treefold.common.spec import Hyper
from treefold.common.tree import FoldSet, Node, span
from treefold.server.effects import Effect, FoldPayloads, ReadyPart, ReleasePayload
from treefold.wire.decisions import HealthDecision
from treefold.wire.messages import Push, RoundMeta
from treefold.wire.words import INITIAL_ROUND


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
class Leaf:
    """A slot's contribution to a round that is folded when it is known which slots are in it."""

    sender: int
    parts: dict[int, Held] = field(default_factory=dict)
    meta: RoundMeta | None = None

    def is_whole(self, parts_count: int) -> bool:
        """Whether all of it is here."""
        return self.meta is not None and len(self.parts) == parts_count


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
    leaves : dict of int to Leaf
        Contributions by slot, of a round that may go on without the last slots.
    included : list of int or None
        The slots that are in such a round, once that is decided.
    reported : int
        How many slots the scheduler was told of.
    is_by_slot : bool
        Whether contributions are kept until it is decided what of them is in.
    products : dict of (part, slots) to rows
        Of contributions that are looked at: sums of squares, or of products, block by block; empty
        until they are known.
    decision : HealthDecision or None
        What counts of such contributions.
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
    leaves: dict[int, Leaf] = field(default_factory=dict)
    included: list[int] | None = None
    reported: int = 0
    is_by_slot: bool = False
    products: dict[tuple[int, tuple[int, ...]], list[Row]] = field(default_factory=dict)
    decision: HealthDecision | None = None

    def __post_init__(self) -> None:
        """Initial values need nothing from slot 0."""
        if self.number == INITIAL_ROUND:
            self.hyper = HyperOf(None, 0.0)

    def open(self, active: int, parts_count: int) -> None:
        """Learn how many slots contribute."""
        self.active = active
        self.folds = [PartFold(FoldSet(active), self.pieces[part]) for part in range(parts_count)]

    def take(
        self, part: int, node: Node, sender: int | None, held: Held, effects: list[Effect]
    ) -> bool:
        """Take in a node of one part and fold what meets; False if it was a duplicate.

        Nobody is the sender of a slot that is left out.
        """
        target = self.folds[part]
        added = target.fold.add(node, held)
        if added is None:
            return False
        merges, dropped = added
        if dropped:
            low, high = span(node, self.active)
            for inner in [n for n in target.senders if low <= span(n, self.active)[0] < high]:
                del target.senders[inner]
        if sender is not None:
            target.senders[node] = sender
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

    def put(self, part: int, held: Held, sender: int) -> None:
        """Take in a part of the only contribution."""
        node = Node(0, 0)
        self.folds[part].fold.add(node, held)
        self.folds[part].senders[node] = sender
        self.rooted[part] = None

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
    def is_gathered(self) -> bool:
        """Whether everything is here that the next version is made of."""
        parts = range(len(self.pieces)) if self.wanted is None else self.wanted
        return self.meta is not None and all(p in self.rooted or p in self.made for p in parts)

    @property
    def is_begun(self) -> bool:
        """Whether what goes with the next version is known, and some of its parts are there."""
        is_limited = self.hyper is not None and self.hyper.norm_max > 0
        return self.meta is not None and bool(self.made) and not is_limited

    @property
    def is_by_leaves(self) -> bool:
        """Whether contributions are kept by slot, and are not folded yet."""
        return self.is_by_slot and self.meta is None

    def is_undecided(self, parts_count: int) -> bool:
        """Whether all slots are here, and it is only not known yet which of them are in."""
        if not self.is_by_leaves or self.included is not None or not self.due:
            return False
        leaves = self.leaves
        return all(s in leaves and leaves[s].is_whole(parts_count) for s in range(self.due))

    def lead(self) -> None:
        """This server leads the round from now on, and has to get itself what it lacks."""
        if self.is_by_slot and not self.is_complete:
            self.meta = None  # it comes again, with the contributions

    def reopen(self) -> None:
        """Another server leads the round from now on."""
        self.is_closed = False
        self.sums = []
        self.reported = 0  # should this server lead it once more
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
        payloads = [payload for payload in held if payload is not None]
        return payloads + [payload for slot in self.leaves for payload in self._of_leaf(slot)]

    def _of_leaf(self, slot: int) -> list[int]:
        held = self.leaves[slot].parts.values()
        return [one.payload for one in held if one.payload is not None]

    def drop_leaves(self) -> list[int]:
        """Let go of contributions that are not folded; returns their payloads."""
        self.products.clear()
        payloads = [payload for slot in self.leaves for payload in self._of_leaf(slot)]
        self.leaves.clear()
        return payloads

    @property
    def due(self) -> int:
        """How many slots have a batch, as those say that are here; 0 if none does."""
        return next((meta.due for meta in self.metas()), 0)

    def metas(self) -> Iterator[RoundMeta]:
        """What goes with contributions that are not folded."""
        return (leaf.meta for leaf in self.leaves.values() if leaf.meta is not None)

    def lacking(self, part: int) -> list[int]:
        """Slots that one part lacks, of those that are in the round or may still be."""
        wanted = range(self.due) if self.included is None else self.included
        leaves = self.leaves
        return [slot for slot in wanted if slot not in leaves or part not in leaves[slot].parts]

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
        if self.is_by_leaves:
            numbers = range(len(self.pieces))
            without = [slot for slot, leaf in self.leaves.items() if leaf.meta is None]
            return sorted({*without, *(slot for part in numbers for slot in self.lacking(part))})
        lacking = {slot: None for part in self.folds for slot in part.fold.missing()}
        if self.meta is None and self.number != INITIAL_ROUND:
            lacking[0] = None
        return sorted(lacking)
