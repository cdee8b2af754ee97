"""What must hold in the whole cluster, whoever does it: checked at every version and every slot."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.sim.memory import Memory
from tests.sim.reference import Reference
from tests.sim.world import Violation
from treefold.common.spec import Placement
from treefold.common.tree import Node, span
from treefold.server.effects import MakeParts, ReadyPart, RecordVersion, ReleaseVersion
from treefold.server.holding import Shard
from treefold.wire.decisions import QuorumDecision
from treefold.wire.messages import Published
from treefold.worker.effects import Snapshot, Task
from treefold.worker.pulls import PartRange


@dataclass(slots=True)
class Checks:
    """The cluster's state as promises see it.

    Attributes
    ----------
    eras : list of dict
        Newest version of each shard, anew each time the job goes back to a checkpoint.
    rollbacks : list of int
        The views with which it went back.
    computed : dict
        ``(incarnation, round, slot)`` of every slot whose samples a worker wrote down.
    servers : dict of int to None
        Incarnations of servers, which relay what workers computed.
    may_fail : callable
        Whether a script may be told now that it cannot go on.
    """

    reference: Reference
    eras: list[dict[tuple[int, int], int]] = field(default_factory=lambda: [{}])
    rollbacks: list[int] = field(default_factory=list)
    computed: dict[tuple[int, int, int], None] = field(default_factory=dict)
    servers: dict[int, None] = field(default_factory=dict)
    may_fail: Callable[[], bool] = bool

    @property
    def versions(self) -> dict[tuple[int, int], int]:
        """Newest version of each shard."""
        return self.eras[-1]

    def known(self, view: int) -> dict[tuple[int, int], int]:
        """The same as somebody with this view may know it."""
        return self.eras[bisect_right(self.rollbacks, view)]

    def on_decided(self, decision: QuorumDecision) -> None:
        """Rounds have all slots, and there is nothing to decide."""
        raise Violation(f"{decision} in a job without a quorum")

    def on_computed(self, who: int, task: Task) -> None:
        """A worker writes down the samples of a slot that it is about to compute."""
        self.computed[who, task.round, task.slot] = None

    def enter(self, view: int) -> None:
        """What is checked next is about somebody with this view."""

    def roll_back(self, view: int) -> None:
        """The job goes back to a checkpoint with this view."""
        self.rollbacks.append(view)
        self.eras.append({})

    def on_restored(self, view: int, key: tuple[int, int], version: int) -> None:
        """A shard begins with a version of a checkpoint."""
        known = self.known(view)
        known[key] = max(version, known.get(key, -1))

    def on_opened(self, shard: Shard) -> None:
        """A server begins with a shard, or begins anew."""

    def on_roots(
        self, shard: Shard, round_: int, parts: Sequence[ReadyPart], values: Sequence[object]
    ) -> None:
        """Every part's root is the fold of all active slots, each once, in the tree's order."""
        for ready, value in zip(parts, values, strict=True):
            start, stop = shard.parts[ready.part]
            where = f"table {shard.table} shard {shard.number} part {ready.part} round {round_}"
            expected, marks = self.reference.initial(shard.table, start), 0
            if round_ >= 0:
                expected, marks = self.root((shard.table, start, stop), round_)
            if value != expected:
                raise Violation(f"{where} is folded to\n  {value}\nand should be\n  {expected}")
            if int.from_bytes(ready.absent, "little") != marks:
                raise Violation(f"{where} has absent marks {ready.absent!r}, not {marks:b}")

    def root(self, key: tuple[int, int, int], round_: int) -> tuple[object, int]:
        """Value and absent marks of the fold of one part ``(table, start, stop)``."""
        return self.reference.root(key, round_)

    def on_products(self, shard: Shard, slots: tuple[int, ...], part: int) -> list[list[float]]:
        """A server measures what slots have sent of a part."""
        raise Violation(f"part {part} of {shard.table} is measured for slots {slots}")

    def on_made(self, view: int, shard: Shard, effect: MakeParts, values: Sequence[object]) -> None:
        """Parts of a version are made of the right things, when those before are published."""
        self.enter(view)
        key = (effect.table, effect.shard)
        where = f"version {effect.version} of table {effect.table} shard {effect.shard}"
        published = self.known(view).get(key, -1)
        is_next = effect.version == published + 1
        is_behind = effect.version <= published
        if not is_next and not is_behind:  # others of a chain may be behind
            raise Violation(f"{where} follows {published}")
        self.on_roots(shard, effect.version - 1, effect.parts, values)
        numbers = [ready.part for ready in effect.parts]
        if effect.version == 0:
            return
        is_whole = shard.spec.placement is Placement.TENSORWISE
        if is_whole and numbers != list(range(shard.parts_count)):
            raise Violation(f"{where} is made of parts {numbers}, not of all at once")
        self._check_hyper(effect, where)

    def _check_hyper(self, effect: MakeParts, where: str) -> None:
        expected = self.reference.meta(effect.table, effect.version - 1, 0)
        if (effect.groups, effect.norm_max) != (expected.groups, expected.norm_max):
            given = f"{effect.groups} and limit {effect.norm_max}"
            raise Violation(f"{where} is made with {given}, and should be with {expected}")
        norm = self.reference.norm(effect.table, effect.version)
        if not same(effect.norm, norm):
            raise Violation(f"{where} is made with norm {effect.norm}, and should be with {norm}")

    def on_word(self, view: int, published: Published) -> None:
        """What workers are told of a version is what slot 0 left for it."""
        self.enter(view)
        table, version = published.table, published.version
        where = f"version {version} of table {table} shard {published.shard}"
        newest = self.known(view).get((table, published.shard), -1)
        if published.version > newest + (not published.is_whole):
            raise Violation(f"{where} is said to be published, and is not")
        self._check_word(table, version, published.state, published.norm, where)

    def _check_word(self, table: int, version: int, state: bytes, norm: float, where: str) -> None:
        is_constant = table not in self.reference.trained
        expected = b"" if is_constant else self.reference.state(table, version)
        if state != expected:
            raise Violation(f"{where} comes with state {state!r}, not {expected!r}")
        if not is_constant and not same(norm, self.reference.norm(table, version)):
            raise Violation(f"{where} comes with norm {norm}")

    def on_released(self, view: int, effect: ReleaseVersion) -> None:
        """A version is let go when the one after it is whole on every shard of every table."""
        for (table, shard), newest in self.known(view).items():
            if table in self.reference.folded and newest <= effect.version:
                who = f"version {effect.version} of table {effect.table} shard {effect.shard}"
                where = f"table {table} shard {shard} is at {newest}"
                raise Violation(f"{who} is released while {where}")

    def name(
        self, shard: Shard, part: int, effect: MakeParts, before: object, root: object
    ) -> object:
        """What stands for a part of a version; a name is all that a reader has to compare."""
        del before, root
        return self.reference.version(shard.table, shard.parts[part][0], effect.version)

    def is_version(self, key: tuple[int, int, int], part: int, version: int, value: object) -> bool:
        """Whether this is a part, which begins at ``key[2]``, of a version of a shard."""
        del part
        return value == self.reference.version(key[0], key[2], version)

    def last_version(self, table: int) -> int:
        """The version that every shard of a table with rounds ends with."""
        del table
        return self.reference.scenario.rounds

    def on_recorded(self, view: int, effect: RecordVersion, shard: Shard) -> None:
        """A version is whole; its contributors have each slot once and wrote their samples down."""
        self.enter(view)
        del shard
        key, round_ = (effect.table, effect.shard), effect.version - 1
        known = self.known(view)
        published = known.get(key, -1)
        is_late = effect.version <= published
        if effect.version != published + 1 and not is_late:  # a server that was replaced is late
            raise Violation(f"version {effect.version} of {key} follows {published}")
        known[key] = max(published, effect.version)
        if round_ < 0:
            return
        if not effect.contributors:
            return  # somebody who was copied to is promoted, and never made a version itself
        active = self.reference.scenario.plan_of(round_).active_slots(round_)
        found: list[int] = []
        for level, index, sender in effect.contributors:
            slots = range(*span(Node(level, index), active))
            found += slots
            for slot in slots if sender not in self.servers else ():
                if (sender, round_, slot) not in self.computed:
                    text = f"slot {slot} of round {round_} is from incarnation {sender}"
                    raise Violation(f"{text}, which did not write its samples down")
        if sorted(found) != list(range(active)):
            raise Violation(f"version {effect.version} has slots {sorted(found)} of {active}")

    def on_begun(self, snapshot: Snapshot) -> None:
        """What a worker begins with before all of it is here is what goes with that version."""
        table, version = snapshot.table, snapshot.version
        where = f"the beginning of table {table} version {version}"
        self._check_word(table, version, snapshot.state, snapshot.norm, where)

    def on_part(self, table: int, version: int, part: PartRange, value: object) -> None:
        """What a loop body computes with is exactly one version."""
        if value != self.reference.version(table, part.start, version):
            raise Violation(f"version {version} of table {table} has {value} in {part}")

    def on_snapshot(
        self,
        view: int,
        snapshot: Snapshot,
        parts: Sequence[PartRange],
        values: Sequence[object],
    ) -> dict[int, int]:
        """What a worker loads is exactly one published version; returns that of each shard."""
        self.enter(view)
        table, version = snapshot.table, snapshot.version
        where = f"the snapshot of table {table} version {version}"
        for part, value in zip(parts, values, strict=True):
            expected = self.reference.version(table, part.start, version)
            if value != expected:
                raise Violation(f"{where} has {value} in {part}")
            if self.known(view).get((table, part.shard), -1) < version:
                raise Violation(f"{where} is read before it is published")
        self._check_word(table, version, snapshot.state, snapshot.norm, where)
        return {part.shard: version for part in parts}


def is_part_intact(version: int, memory: Memory) -> bool:
    """Whether no server has begun to write another version where this part lies."""
    return memory.buffer is None or memory.buffer.word == version


def is_intact(snapshot: Snapshot, memories: Sequence[Memory]) -> bool:
    """Whether no server has begun to write another version where this one lies."""
    return all(m.buffer is None or m.buffer.word == snapshot.version for m in memories)


def same(left: float, right: float) -> bool:
    """Whether two norms are one, NaN being itself."""
    return left == right or (math.isnan(left) and math.isnan(right))
