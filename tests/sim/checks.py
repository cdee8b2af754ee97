"""What must hold in the whole cluster, whoever does it: checked at every version and every slot."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.sim.network import Payload
from tests.sim.reference import Reference
from tests.sim.world import Violation
from treefold.common.tree import Node, span
from treefold.server.effects import PublishVersion, RecordVersion
from treefold.server.rounds import Shard
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

    def on_roots(self, shard: Shard, round_: int, roots: Sequence[object]) -> None:
        """Every part's root is the fold of all active slots, each once, in the tree's order."""
        for part, root in enumerate(roots):
            start, stop = shard.parts[part]
            if round_ < 0:
                expected = self.reference.initial(shard.table, start)
            else:
                expected = self.reference.root((shard.table, start, stop), round_)[0]
            if root != expected:
                where = f"table {shard.table} shard {shard.number} part {part} round {round_}"
                raise Violation(f"{where} is folded to\n  {root}\nand should be\n  {expected}")

    def on_published(self, shard: Shard, effect: PublishVersion, roots: Sequence[object]) -> None:
        """A version follows the one before it and is made of the right things."""
        key = (effect.table, effect.shard)
        where = f"version {effect.version} of table {effect.table} shard {effect.shard}"
        if effect.version != self.versions.get(key, -1) + 1:
            raise Violation(f"{where} follows {self.versions.get(key, -1)}")
        round_ = effect.version - 1
        self.on_roots(shard, round_, roots)
        self.versions[key] = effect.version
        if round_ < 0:
            return
        for part, marks in enumerate(effect.absent):
            start, stop = shard.parts[part]
            expected = self.reference.root((shard.table, start, stop), round_)[1]
            if int.from_bytes(marks, "little") != expected:
                raise Violation(f"{where} part {part} has absent marks {marks!r}, not {expected:b}")
        self._check_meta(effect, where)

    def _check_meta(self, effect: PublishVersion, where: str) -> None:
        meta, round_ = effect.meta, effect.version - 1
        expected = self.reference.meta(effect.table, round_, 0)
        if meta is None or (meta.groups, meta.norm_max, meta.state) != (
            expected.groups,
            expected.norm_max,
            expected.state,
        ):
            raise Violation(f"{where} is made with {meta}, and should be with {expected}")
        if not _same(effect.norm, self.reference.norm(effect.table, effect.version)):
            norm = self.reference.norm(effect.table, effect.version)
            raise Violation(f"{where} is made with norm {effect.norm}, and should be with {norm}")

    def on_recorded(self, effect: RecordVersion) -> None:
        """The contributors of a version have each slot once, and each wrote down its samples."""
        round_ = effect.version - 1
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
        self, snapshot: Snapshot, parts: Sequence[PartRange], payloads: Sequence[Payload]
    ) -> None:
        """What a worker loads is exactly one published version."""
        table, version = snapshot.table, snapshot.version
        where = f"the snapshot of table {table} version {version}"
        for part, (value, elements) in zip(parts, payloads, strict=True):
            expected = self.reference.version(table, part.start, version)
            if value != expected or elements != part.stop - part.start:
                raise Violation(f"{where} has {value} with {elements} elements in {part}")
            if self.versions.get((table, part.shard), -1) < version:
                raise Violation(f"{where} is read before it is published")
        is_constant = table not in self.reference.trained
        state = b"" if is_constant else self.reference.state(table, version)
        if snapshot.state != state:
            raise Violation(f"{where} comes with state {snapshot.state!r}, not {state!r}")
        if not is_constant and not _same(snapshot.norm, self.reference.norm(table, version)):
            raise Violation(f"{where} comes with norm {snapshot.norm}")


def _same(left: float, right: float) -> bool:
    return left == right or (math.isnan(left) and math.isnan(right))
