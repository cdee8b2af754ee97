"""What must hold in the whole cluster, whoever does it: checked at every version and every slot."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.sim.memory import Memory
from tests.sim.reference import Reference
from tests.sim.world import Violation
from treefold.common.spec import Placement
from treefold.common.tree import Node, span
from treefold.server.effects import MakeParts, ReadyPart, RecordVersion, ReleaseVersion
from treefold.server.rounds import Shard
from treefold.wire.messages import Published
from treefold.worker.effects import Snapshot
from treefold.worker.pulls import PartRange


@dataclass(slots=True)
class Checks:
    """The cluster's state as promises see it.

    Attributes
    ----------
    versions : dict
        Newest version of each shard.
    computed : dict
        ``(incarnation, round, slot)`` of every slot whose samples a worker wrote down.
    may_fail : callable
        Whether a script may be told now that it cannot go on.
    """

    reference: Reference
    versions: dict[tuple[int, int], int] = field(default_factory=dict)
    computed: dict[tuple[int, int, int], None] = field(default_factory=dict)
    may_fail: Callable[[], bool] = bool

    def on_roots(
        self, shard: Shard, round_: int, parts: Sequence[ReadyPart], values: Sequence[object]
    ) -> None:
        """Every part's root is the fold of all active slots, each once, in the tree's order."""
        for ready, value in zip(parts, values, strict=True):
            start, stop = shard.parts[ready.part]
            where = f"table {shard.table} shard {shard.number} part {ready.part} round {round_}"
            expected, marks = self.reference.initial(shard.table, start), 0
            if round_ >= 0:
                expected, marks = self.reference.root((shard.table, start, stop), round_)
            if value != expected:
                raise Violation(f"{where} is folded to\n  {value}\nand should be\n  {expected}")
            if int.from_bytes(ready.absent, "little") != marks:
                raise Violation(f"{where} has absent marks {ready.absent!r}, not {marks:b}")

    def on_made(self, shard: Shard, effect: MakeParts, values: Sequence[object]) -> None:
        """Parts of a version are made of the right things, when those before are published."""
        key = (effect.table, effect.shard)
        where = f"version {effect.version} of table {effect.table} shard {effect.shard}"
        if effect.version != self.versions.get(key, -1) + 1:
            raise Violation(f"{where} follows {self.versions.get(key, -1)}")
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
        if not _same(effect.norm, norm):
            raise Violation(f"{where} is made with norm {effect.norm}, and should be with {norm}")

    def on_word(self, published: Published) -> None:
        """What workers are told of a version is what slot 0 left for it."""
        table, version = published.table, published.version
        where = f"version {version} of table {table} shard {published.shard}"
        if published.version > self.versions.get((table, published.shard), -1):
            raise Violation(f"{where} is said to be published, and is not")
        self._check_word(table, version, published.state, published.norm, where)

    def _check_word(self, table: int, version: int, state: bytes, norm: float, where: str) -> None:
        is_constant = table not in self.reference.trained
        expected = b"" if is_constant else self.reference.state(table, version)
        if state != expected:
            raise Violation(f"{where} comes with state {state!r}, not {expected!r}")
        if not is_constant and not _same(norm, self.reference.norm(table, version)):
            raise Violation(f"{where} comes with norm {norm}")

    def on_released(self, effect: ReleaseVersion) -> None:
        """A version is let go when the one after it is whole on every shard of every table."""
        for (table, shard), newest in self.versions.items():
            if table in self.reference.trained and newest <= effect.version:
                who = f"version {effect.version} of table {effect.table} shard {effect.shard}"
                where = f"table {table} shard {shard} is at {newest}"
                raise Violation(f"{who} is released while {where}")

    def on_recorded(self, effect: RecordVersion) -> None:
        """A version is whole; its contributors have each slot once and wrote their samples down."""
        key, round_ = (effect.table, effect.shard), effect.version - 1
        if round_ != self.versions.get(key, -1):
            raise Violation(f"version {effect.version} of {key} follows {self.versions.get(key)}")
        self.versions[key] = effect.version
        if round_ < 0:
            return
        active = self.reference.scenario.plan_of(round_).active_slots(round_)
        found: list[int] = []
        for level, index, sender in effect.contributors:
            slots = range(*span(Node(level, index), active))
            found += slots
            for slot in slots:
                if (sender, round_, slot) not in self.computed:
                    text = f"slot {slot} of round {round_} is from incarnation {sender}"
                    raise Violation(f"{text}, which did not write its samples down")
        if sorted(found) != list(range(active)):
            raise Violation(f"version {effect.version} has slots {sorted(found)} of {active}")

    def on_snapshot(
        self, snapshot: Snapshot, parts: Sequence[PartRange], values: Sequence[object]
    ) -> None:
        """What a worker loads is exactly one published version."""
        table, version = snapshot.table, snapshot.version
        where = f"the snapshot of table {table} version {version}"
        for part, value in zip(parts, values, strict=True):
            expected = self.reference.version(table, part.start, version)
            if value != expected:
                raise Violation(f"{where} has {value} in {part}")
            if self.versions.get((table, part.shard), -1) < version:
                raise Violation(f"{where} is read before it is published")
        self._check_word(table, version, snapshot.state, snapshot.norm, where)


def is_intact(snapshot: Snapshot, memories: Sequence[Memory]) -> bool:
    """Whether no server has begun to write another version where this one lies."""
    return all(m.buffer is None or m.buffer.word == snapshot.version for m in memories)


def _same(left: float, right: float) -> bool:
    return left == right or (math.isnan(left) and math.isnan(right))
