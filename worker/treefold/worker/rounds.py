"""What a worker does in one round: its slots, its half of the fold, what it pushed. Pure."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from treefold.common.lineup import Lineup
from treefold.common.plan import LoopPlan
from treefold.common.tree import FoldSet, Node, canonical, root_level, sibling, span
from treefold.wire.words import RUN_PARTS_MAX
from treefold.worker.effects import (
    Effect,
    FoldPayloads,
    HyperKnown,
    ReleasePayload,
    SlotMeta,
    Snapshot,
    Task,
)

ItemT = TypeVar("ItemT")


class Held(msgspec.Struct, gc=False):
    """What a node holds: a payload, None if no tensor has a gradient, and which have none."""

    payload: int | None
    absent: int


class Pushed(msgspec.Struct, frozen=True, gc=False):
    """A node that was pushed and is kept until the round's version is there."""

    node: Node
    held: Held


@dataclass(slots=True)
class LocalPart:
    """One part of one table: nodes still being folded here, and those pushed.

    Attributes
    ----------
    is_apart : bool
        Whether nothing is folded, since every slot is applied by itself.
    slots, gone : dict of int to None
        Slots that were taken in, and those of them that are in a pushed node.
    """

    fold: FoldSet[Held]
    is_apart: bool = False
    pushed: list[Pushed] = field(default_factory=list)
    slots: dict[int, None] = field(default_factory=dict)
    gone: dict[int, None] = field(default_factory=dict)


class LocalRound:
    """One worker's share of round ``number``.

    Parameters
    ----------
    number : int
        The round.
    plan : LoopPlan
        The pass over the data that it belongs to.
    parts : dict of int to int
        Number of parts of each table that has rounds.
    tried : Lineup or None
        The batches of a round that may go on without the last slots.
    apart : collection of int
        Tables whose contributions are applied one by one.

    Notes
    -----
    A node is kept for folding as long as this worker is to compute its sibling's slots too, and
    pushed otherwise. A pushed payload is never folded into again: it may still be on its way out.
    """

    def __init__(
        self,
        number: int,
        plan: LoopPlan,
        parts: dict[int, int],
        tried: Lineup | None = None,
        apart: Collection[int] = (),
    ) -> None:
        self.number = number
        self.plan = plan
        self.tried = tried
        self.active = plan.active_slots(number) if tried is None else plan.slots
        batches = [] if tried is None else tried.batches
        totals = {round_: plan.round_samples(round_) for round_ in dict(batches)}
        self._samples = [(plan.slot_samples(*batch), totals[batch[0]]) for batch in batches]
        self.due = self.active if tried is None else len(tried.batches)
        self.assigned: dict[int, None] = {}
        self.done: dict[int, None] = {}
        self.in_hand: int | None = None
        self.hypers: dict[int, HyperKnown] = {}
        self.metas: dict[tuple[int, int], SlotMeta] = {}
        self.is_flushed = tried is not None  # which slots are in is known when they have come
        self.parts = {
            (table, part): LocalPart(FoldSet(self.active), table in apart)
            for table, count in parts.items()
            for part in range(count)
        }

    def take_apart(self) -> None:
        """Push every slot by itself: what counts is decided when all have come."""
        plan, number = self.plan, self.number
        total = plan.round_samples(number)
        self._samples = [(plan.slot_samples(number, slot), total) for slot in range(self.active)]
        self.is_flushed = True

    def assign(self, slots: list[int]) -> None:
        """Take on more slots; those without samples in this round are left out."""
        for slot in slots:
            if slot < self.due:
                self.assigned[slot] = None

    @property
    def first(self) -> int:
        """The round of the plan whose batches these are, or else the first one of the pass."""
        return self.plan.first_round if self.tried is None else self.tried.batches[0][0]

    @property
    def is_again(self) -> bool:
        """Whether the batches were late before."""
        return self.tried is not None and self.tried.is_again

    def slot_of(self, round_: int, slot: int) -> int | None:
        """The slot that has a batch here, as the script names it; None if there is none."""
        if self.tried is None:
            return slot if round_ == self.number else None
        if self.in_hand is None or self.tried.batches[self.in_hand] != (round_, slot):
            return None
        return self.in_hand

    def task(self, slot: int, snapshots: list[Snapshot]) -> Task:
        """What the script is to compute of a slot."""
        self.in_hand = slot
        is_kept = self.keeps(slot)
        if self.tried is None:
            return Task(self.number, slot, snapshots, is_kept)
        batch = self.tried.batches[slot]
        again = self.tried.is_again
        return Task(*batch, snapshots, is_kept, self.number, again)

    def samples(self, slot: int) -> tuple[int, int]:
        """Samples of a slot's batch, and of its round of the plan; 0 where nobody asks."""
        return self._samples[slot] if self._samples else (0, 0)

    def next_slot(self) -> int | None:
        """The first slot that is still to be computed."""
        return min((slot for slot in self.assigned if slot not in self.done), default=None)

    def keeps(self, slot: int) -> bool:
        """Whether a contribution of ``slot`` would be held here while another slot is computed."""
        others = [one for one in self.assigned if one not in self.done and one != slot]
        part = next((part for part in self.parts.values() if not part.is_apart), None)
        if not others or part is None:
            return False
        leaf = canonical(Node(0, slot), self.active)
        return self.is_flushed or sibling(leaf) not in part.fold.nodes

    def contribute(
        self, key: tuple[int, int], slot: int, held: Held, effects: list[Effect]
    ) -> list[Pushed]:
        """Take in one part of one slot, fold what meets, and return what is to be pushed now."""
        part = self.parts[key]
        part.slots[slot] = None
        added = part.fold.add(Node(0, slot), held)
        if added is None:
            if held.payload is not None:
                effects.append(ReleasePayload(held.payload))
            return []
        for merge in added[0]:
            left, right = merge.left, merge.right
            if left.payload is None:
                left.payload = right.payload
            elif right.payload is not None:
                effects.append(FoldPayloads(left.payload, right.payload))
            left.absent &= right.absent
        return self._push_ready(part)

    def flush(self) -> list[tuple[tuple[int, int], Pushed]]:
        """Give up folding further: everything held is to be pushed, now and later in this round."""
        self.is_flushed = True
        return [
            (key, pushed) for key, part in self.parts.items() for pushed in self._push_ready(part)
        ]

    def has(self, key: tuple[int, int], slot: int) -> bool:
        """Whether this part of the slot's contribution was taken in."""
        return slot in self.parts[key].slots

    def contradiction(self, position: int) -> str:
        """What of this contradicts itself, or the version that the worker is at; or nothing."""
        payloads = self.payloads()
        if self.number != position:
            return f"round {self.number} at version {position}"
        return "a payload is held twice" if len(payloads) != len(set(payloads)) else ""

    def payloads(self) -> list[int]:
        """Every payload that the round still holds."""
        held = [h for part in self.parts.values() for h in part.fold.nodes.values()]
        held += [pushed.held for part in self.parts.values() for pushed in part.pushed]
        return [h.payload for h in held if h.payload is not None]

    def _push_ready(self, part: LocalPart) -> list[Pushed]:
        is_flushed = self.is_flushed
        ready = [node for node in part.fold.nodes if is_flushed or not self._can_grow(part, node)]
        pushed = [Pushed(node, part.fold.nodes.pop(node)) for node in ready]
        part.pushed += pushed
        for node in ready:
            part.gone.update(dict.fromkeys(range(*span(node, self.active))))
        return pushed

    def _can_grow(self, part: LocalPart, node: Node) -> bool:
        """Whether the sibling is going to be folded here too."""
        if part.is_apart:
            return False
        node = canonical(node, self.active)
        if node.level >= root_level(self.active):
            return False
        low, high = span(sibling(node), self.active)
        return all(slot in self.assigned and slot not in part.gone for slot in range(low, high))


def runs(items: Sequence[ItemT], is_next: Callable[[ItemT, ItemT], bool]) -> list[list[ItemT]]:
    """Consecutive items in groups within which each one is the next of the one before."""
    found: list[list[ItemT]] = []
    for item in items:
        if found and len(found[-1]) < RUN_PARTS_MAX and is_next(found[-1][-1], item):
            found[-1].append(item)
        else:
            found.append([item])
    return found
