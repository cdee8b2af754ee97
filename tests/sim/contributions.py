"""What must hold where contributions are applied one by one: each once, and versions are whole.

The order is chance, so there is no reference for versions. What was published is written down here
as it happens, and everything that anybody reads is held against that. Synchronous tables beside
them have their reference, as always, and rounds begin with everything in.
"""

import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tests.sim.checks import Checks
from tests.sim.world import Violation
from treefold.common.round_state import decode_applied
from treefold.common.spec import Compensation, ConsistencyKind, Hyper
from treefold.server.effects import MakeParts, RecordVersion, ReleaseVersion
from treefold.server.holding import Shard
from treefold.wire.messages import Published
from treefold.worker.effects import Snapshot
from treefold.worker.pulls import PartRange

Which = tuple[int, int, int]
"""Round, slot and sender of a contribution."""


@dataclass(slots=True)
class Draft:
    """A version as one server makes it.

    Attributes
    ----------
    which : dict of Which to None
        Contributions that its parts are made of.
    names : dict of int to object
        Of its parts.
    before : dict of int to object
        Names of the parts that were stepped.
    tries : dict of int to None
        How often what its parts are made of had been computed before, as one that is too stale is.
    """

    which: dict[Which, None] = field(default_factory=dict)
    names: dict[int, object] = field(default_factory=dict)
    before: dict[int, object] = field(default_factory=dict)
    groups: list[Hyper] | None = None
    tries: dict[int, None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Made:
    """A version that was published: what made it, its parts, and what is in it."""

    which: Which
    names: dict[int, object]
    clocks: list[int]
    front: Which


Histories = dict[tuple[int, int], list[Made]]
"""The published versions of every shard from 1 on."""


@dataclass(slots=True)
class Contributions(Checks):
    """The checks of jobs whose tables are asynchronous.

    Attributes
    ----------
    books : list of dict
        Histories, anew each time the job goes back to a checkpoint.
    era : int
        Which of them counts for who is being checked.
    drafts : dict of (shard, version) to Draft
        What each server makes.
    begun : dict of Which to list of dict
        Versions of all shards that the loop bodies of a contribution began with.
    """

    books: list[Histories] = field(default_factory=lambda: [{}])
    era: int = 0
    drafts: dict[tuple[int, int], Draft] = field(default_factory=dict)
    begun: dict[Which, list[dict[tuple[int, int], int]]] = field(default_factory=dict)

    @property
    def histories(self) -> Histories:
        """The published versions of every shard from 1 on."""
        return self.books[self.era]

    def enter(self, view: int) -> None:
        """What is checked next is about somebody with this view."""
        self.era = bisect_right(self.rollbacks, view)

    def roll_back(self, view: int) -> None:
        """The job goes back to a checkpoint with this view."""
        Checks.roll_back(self, view)
        self.books.append({})

    def on_restored(self, view: int, key: tuple[int, int], version: int) -> None:
        """A shard begins with a version of a checkpoint, in which all shards have the same.

        However tables are cut then, what is said of that version was said of shard 0.
        """
        Checks.on_restored(self, view, key, version)
        self.enter(view)
        if key[0] not in self.reference.apart or key in self.histories or not version:
            return
        older = (book.get((key[0], 0), []) for book in reversed(self.books[: self.era]))
        known = next((one for one in older if len(one) >= version), None)
        if known is None:
            raise Violation(f"version {version} of {key} is restored, and never was published")
        self.histories[key] = [*known[: version - 1], replace(known[version - 1], names={})]

    # ---- servers ---------------------------------------------------------------------------------

    def on_opened(self, shard: Shard) -> None:
        """What the server made of it before counts no more."""
        for key in [key for key in self.drafts if key[0] == id(shard)]:
            del self.drafts[key]

    def name(
        self, shard: Shard, part: int, effect: MakeParts, before: object, root: object
    ) -> object:
        """A part of a version is named by everything that was ever applied to it."""
        if shard.table not in self.reference.apart:
            return Checks.name(self, shard, part, effect, before, root)
        start = shard.parts[part][0]
        if effect.version == 0:
            return self.reference.version(shard.table, start, 0)
        told = zlib.crc32(repr((before, root)).encode())
        name = ("version", shard.table, start, effect.version, told)
        draft = self._draft(shard, effect.version)
        draft.names[part], draft.before[part] = name, before
        return name

    def is_version(self, key: tuple[int, int, int], part: int, version: int, value: object) -> bool:
        """Whether this is a part of a version, as far as that is published."""
        if key[0] not in self.reference.apart:
            return Checks.is_version(self, key, part, version, value)
        known = self.histories.get(key[:2], [])
        if version == 0:
            return value == self.reference.version(key[0], key[2], 0)
        return version > len(known) or value == known[version - 1].names.get(part, value)

    def on_made(self, view: int, shard: Shard, effect: MakeParts, values: Sequence[object]) -> None:
        """Parts of a version are made of one contribution."""
        self.enter(view)
        if effect.version == 0 or shard.table not in self.reference.apart:
            Checks.on_made(self, view, shard, effect, values)
            return
        draft = self._draft(shard, effect.version)
        draft.groups = effect.groups
        for ready, value in zip(effect.parts, values, strict=True):
            start, stop = shard.parts[ready.part]
            key = (shard.table, start, stop)
            if value is None:
                continue
            assert isinstance(value, tuple)
            which, attempt = value[3:6], value[6]
            draft.tries[attempt] = None
            if value[:3] != key:
                raise Violation(f"part {ready.part} of {key} is stepped with {value}")
            draft.which[which] = None
            marks = self.reference.absent(key, which[0], which[1])
            if int.from_bytes(ready.absent, "little") != marks:
                raise Violation(f"{key} has absent marks {ready.absent!r}, not {marks:b}")
        if len(draft.which) > 1 or len(draft.tries) > 1:
            where = f"version {effect.version} of table {shard.table} shard {shard.number}"
            made_of = f"{list(draft.which)}, computed for the times {list(draft.tries)}"
            raise Violation(f"{where} is made of {made_of}")

    def on_recorded(self, view: int, effect: RecordVersion, shard: Shard) -> None:
        """A version is published: its contribution is in for the first time, and in its turn."""
        self.enter(view)
        key, known = (effect.table, effect.shard), self.known(view)
        where = f"version {effect.version} of table {effect.table} shard {effect.shard}"
        if effect.table not in self.reference.apart or effect.version == 0:
            Checks.on_recorded(self, view, effect, shard)
            return
        history = self.histories.setdefault(key, [])
        if effect.version > len(history) + 1:
            raise Violation(f"{where} follows {len(history)}")
        if not effect.contributors:
            return  # somebody who was copied to is promoted, and never made a version itself
        (which,) = effect.contributors
        if effect.version <= len(history):
            if which != history[effect.version - 1].which:
                raise Violation(f"{where} is {which}, and was {history[effect.version - 1].which}")
            return
        self._check_turn(where, which, history)
        draft = self._draft(shard, effect.version)
        if draft.which and which not in draft.which:
            raise Violation(f"{where} is said to be {which}, and made of {list(draft.which)}")
        expected = self._groups(effect, which, next(iter(draft.tries), -1))
        if draft.groups not in (None, expected):  # None: all of it was copied here
            raise Violation(f"{where} is made with {draft.groups}, not {expected}")
        for part, before in draft.before.items():
            start = shard.parts[part][0]
            if not self.is_version((*key, start), part, effect.version - 1, before):
                raise Violation(f"{where} is made from {before}")
        clocks = list(history[-1].clocks) if history else []
        clocks += [0] * (which[1] + 1 - len(clocks))
        clocks[which[1]] = which[0] + 1
        is_front = not history or which[0] > history[-1].front[0]
        front = which if is_front else history[-1].front
        history.append(Made(which, dict(draft.names), clocks, front))
        known[key] = effect.version

    def _groups(self, effect: RecordVersion, which: Which, attempt: int) -> list[Hyper]:
        """What a version is stepped with, by how stale its contribution is."""
        groups = self.reference.meta(effect.table, which[0], which[1]).groups
        rule = self.reference.scenario.tables[effect.table].consistency
        begun = self.begun[which][attempt][effect.table, effect.shard]
        stale = effect.version - 1 - begun
        if 0 < rule.staleness_max < stale:
            raise Violation(f"{which} is applied {stale} versions later, the bound is {rule}")
        if rule.compensation is Compensation.NONE or stale < 2:
            return groups
        return [{"lr": float(str(group["lr"])) / stale} for group in groups]

    def _check_turn(self, where: str, which: Which, history: Sequence[Made]) -> None:
        round_, slot, sender = which
        plan = self.reference.scenario.plan_of(round_)
        before = [made.which[0] for made in history if made.which[1] == slot]
        own = [r for r in range(round_ + 1) if slot < self._active(r)]
        if slot >= plan.active_slots(round_) or [*before, round_] != own:
            raise Violation(f"{where} is {which}, and slot {slot} has rounds {before} in")
        if (sender, round_, slot) not in self.computed:
            raise Violation(f"{where} is {which}, whose samples nobody wrote down")

    def on_word(self, view: int, published: Published) -> None:
        """What goes with a version says what is in it."""
        self.enter(view)
        key = (published.table, published.shard)
        if published.table not in self.reference.apart or published.version == 0:
            Checks.on_word(self, view, published)
            return
        where = f"version {published.version} of table {key[0]} shard {key[1]}"
        history = self.histories.get(key, [])
        if published.version > len(history) or not published.is_whole:
            raise Violation(f"{where} is said to be published, and is not")
        made, applied = history[published.version - 1], decode_applied(published.state)
        if (applied.clocks, applied.last) != (made.clocks, made.which):
            raise Violation(f"{where} comes with {applied}, and is {made}")
        self._check_record(where, key[0], made.front, applied.record)

    def _check_record(self, where: str, table: int, front: Which, record: bytes) -> None:
        expected = self.reference.state(table, front[0] + 1, front[1])
        if record != expected:
            raise Violation(f"{where} comes with state {record!r}, not {expected!r}")

    def on_released(self, view: int, effect: ReleaseVersion) -> None:
        """Nobody needs an older version; who has parts of it begins anew.

        Those of a synchronous table are needed until all of their round is in all other tables.
        """
        if effect.table in self.reference.apart:
            return
        Checks.on_released(self, view, effect)
        self.enter(view)
        for table, shard in self.known(view):
            if table in self.reference.apart:
                history = self.histories.get((table, shard), [])
                where = f"table {effect.table} without version {effect.version}"
                self._check_all_in(where, history, len(history), effect.version + 1)

    # ---- workers ---------------------------------------------------------------------------------

    def on_snapshot(
        self, view: int, snapshot: Snapshot, parts: Sequence[PartRange], values: Sequence[object]
    ) -> dict[int, int]:
        """What a worker loads is one published version of each shard."""
        self.enter(view)
        if snapshot.table not in self.reference.apart:
            return Checks.on_snapshot(self, view, snapshot, parts, values)
        versions: dict[int, int] = {}
        for part, value in zip(parts, values, strict=True):
            where = f"the snapshot of table {snapshot.table} has {value} in {part}"
            assert isinstance(value, tuple)
            version = value[3]
            if versions.setdefault(part.shard, version) != version:
                raise Violation(f"{where}, beside version {versions[part.shard]}")
            key = (snapshot.table, part.shard)
            if version > len(self.histories.get(key, [])):
                raise Violation(f"{where}, which is not published")
            if not self.is_version((*key, part.start), part.number, version, value):
                raise Violation(f"{where}, which is no version")
        if snapshot.version != versions[0]:
            raise Violation(f"{snapshot} of versions {versions}")
        return versions

    def check_begun(self, held: dict[int, dict[int, int]], which: Which) -> None:
        """A loop body begins with what has been promised to be in."""
        round_, slot, _ = which
        versions = {
            (table, shard): version for table in held for shard, version in held[table].items()
        }
        self.begun.setdefault(which, []).append(versions)
        for table in self.reference.apart:
            rule = self.reference.scenario.tables[table].consistency
            floor = round_ - rule.staleness if rule.kind is ConsistencyKind.SSP else 0
            floor = round_ if self.reference.folded else floor
            for shard, version in held[table].items():
                history = self.histories.get((table, shard), [])
                clocks = history[version - 1].clocks if version else []
                where = f"round {round_} of slot {slot} with version {version} of shard {shard}"
                self._check_in(where, clocks, slot, round_)
                self._check_all_in(where, history, version, floor)
        self._check_folded(held, round_)

    def _check_folded(self, held: dict[int, dict[int, int]], round_: int) -> None:
        """Synchronous tables are at the round that is computed."""
        for table in self.reference.folded:
            if any(version != round_ for version in held[table].values()):
                raise Violation(f"round {round_} with versions {held[table]} of table {table}")

    def _check_all_in(self, where: str, history: Sequence[Made], version: int, floor: int) -> None:
        """All rounds of all slots below a number are in a version."""
        clocks = history[version - 1].clocks if version else []
        for slot in range(self.reference.scenario.slots):
            self._check_in(where, clocks, slot, floor)

    def _check_in(self, where: str, clocks: Sequence[int], slot: int, floor: int) -> None:
        """All rounds of a slot below a number are in."""
        before = reversed(range(floor))
        last = next((r for r in before if slot < self._active(r)), -1)
        clock = clocks[slot] if slot < len(clocks) else 0
        if clock <= last:
            raise Violation(f"{where} begins without round {last} of slot {slot}")

    def check_over(self, held: dict[int, dict[int, int]], end_round: int) -> None:
        """A pass over the data ends with everything in."""
        for table in self.reference.apart:
            for shard, version in held[table].items():
                history = self.histories.get((table, shard), [])
                where = f"the end of a pass with version {version} of shard {shard}"
                self._check_all_in(where, history, version, end_round)

    def last_version(self, table: int) -> int:
        """The version that every shard of a table with rounds ends with."""
        if table not in self.reference.apart:
            return Checks.last_version(self, table)
        scenario = self.reference.scenario
        return sum(self._active(round_) for round_ in range(scenario.rounds))

    def _active(self, round_: int) -> int:
        return self.reference.scenario.plan_of(round_).active_slots(round_)

    def _draft(self, shard: Shard, version: int) -> Draft:
        return self.drafts.setdefault((id(shard), version), Draft())
