"""What workers declared: tables and passes over the data. Later declarations must agree.

Part of `treefold.scheduler.core` in a file of its own; just as pure.
"""

from dataclasses import dataclass, field

from treefold.common.plan import LoopPlan, PlanKind, Policy
from treefold.common.spec import Aggregation, Rule, TableSpec, differences
from treefold.scheduler import placement
from treefold.wire.decisions import PAIRED_SLOTS_MAX
from treefold.wire.messages import Accepted, DeclarePlan, DeclareTable, Refused
from treefold.wire.words import TABLES_MAX, Code, ShardPlace, Source, TablePlace

PLANS_KEPT_MAX = 4096  # passes over the data whose plan is remembered for late joiners


@dataclass(slots=True)
class TableState:
    """A declared table, who declared it, where it lies, and what the model has beside it.

    With a ``source`` it begins with what is there, and nobody initializes it.
    """

    spec: TableSpec
    declared_by: list[int] = field(default_factory=list)
    place: TablePlace | None = None
    record: bytes = b""
    source: Source | None = None


class Declared:
    """Tables and plans of a job.

    Attributes
    ----------
    tables : list of TableState
        By number.
    plans : dict of int to LoopPlan
        By index; the oldest are forgotten.
    changes : int
        How often anything new was declared.
    """

    def __init__(self) -> None:
        self.tables: list[TableState] = []
        self.plans: dict[int, LoopPlan] = {}
        self.changes = 0

    @property
    def slots(self) -> int:
        """V, 0 before the first pass over the data."""
        return next(iter(self.plans.values())).slots if self.plans else 0

    @property
    def is_asynchronous(self) -> bool:
        """Whether slots are at rounds of their own: no table is synchronous."""
        return self.is_any_asynchronous and not any(
            table.spec.rule is Rule.OPTIMIZER and not table.spec.is_asynchronous
            for table in self.tables
        )

    @property
    def is_any_asynchronous(self) -> bool:
        """Whether contributions to some table are applied one by one."""
        return any(table.spec.is_asynchronous for table in self.tables)

    @property
    def is_loader(self) -> bool:
        """Whether every worker is one slot, with its own loader."""
        return any(plan.kind is PlanKind.LOADER for plan in self.plans.values())

    @property
    def policy(self) -> Policy:
        """What moves slots in the newest pass over the data."""
        return self.plans[max(self.plans)].policy if self.plans else Policy.PREDICTIVE

    def active_slots(self, round_: int) -> int:
        """Slots that have samples in a round; all of them if its pass is not known."""
        if any(table.spec.is_quorum for table in self.tables):  # rounds are not those of plans
            return self.slots
        plans = [p for p in self.plans.values() if p.first_round <= round_ < p.end_round]
        return plans[0].active_slots(round_) if plans else self.slots

    @property
    def places(self) -> list[TablePlace]:
        """Where the tables lie, as far as they are placed."""
        return [table.place for table in self.tables if table.place is not None]

    def table(self, name: str, message: DeclareTable) -> Accepted | Refused:
        """A worker, called ``name`` in messages, declares a table."""
        spec = message.spec
        known = [n for n, table in enumerate(self.tables) if table.spec.name == spec.name]
        is_resumed = any(table.source is not None for table in self.tables)
        if not known and self.plans and spec.rule is Rule.OPTIMIZER and not is_resumed:
            text = f"table {spec.name!r} is declared after training began; declare all before"
            return Refused(message.call, Code.BAD_SPEC, text)
        if not known and is_resumed and spec.rule is Rule.OPTIMIZER:
            names = ", ".join(repr(table.spec.name) for table in self.tables)
            text = f"the checkpoint that the job began from has no table {spec.name!r}, but {names}"
            return Refused(message.call, Code.SPEC_MISMATCH, text)
        if not known and len(self.tables) == TABLES_MAX:
            text = f"a job has at most {TABLES_MAX} tables (TABLES_MAX)"
            return Refused(message.call, Code.BAD_SPEC, text)
        if not known:
            self.tables.append(TableState(spec, record=message.record))
        number = known[0] if known else len(self.tables) - 1
        table = self.tables[number]
        if table.spec != spec:
            lines = "; ".join(differences(table.spec, spec))
            is_first = table.source is not None and not table.declared_by
            than = (
                "in the checkpoint that the job began from" if is_first else "by the first worker"
            )
            text = (
                f"table {spec.name!r} is declared otherwise by {name} (there) than {than} (here): "
                f"{lines}"
            )
            return Refused(message.call, Code.SPEC_MISMATCH, text)
        trained = [one.spec for one in self.tables if one.spec.rule is Rule.OPTIMIZER]
        rules = [one.consistency for one in trained if one.is_quorum]
        if rules and any(one.consistency != rules[0] for one in trained):
            if not known:
                self.tables.pop()
            text = f"table {spec.name!r}: where one table of a job has a quorum, all have the same"
            return Refused(message.call, Code.BAD_SPEC, text)
        if message.incarnation not in table.declared_by:
            table.declared_by.append(message.incarnation)
            self.changes += 1
        return Accepted(message.call, number)

    def plan(self, name: str, message: DeclarePlan, workers: int) -> Accepted | Refused:
        """A worker, called ``name`` in messages, begins a pass; the cluster expects ``workers``."""
        plan = message.plan
        known = self.plans.get(plan.index)
        first = next(iter(self.plans.values()), plan)
        refusal = self._refusal(plan)
        if refusal:
            return Refused(message.call, Code.BAD_SPEC, refusal)
        if known is not None and known != plan:
            lines = "; ".join(differences(known, plan))
            text = (
                f"pass {plan.index} over the data differs between {name} (there) and the first "
                f"worker (here): {lines}"
            )
        elif (first.slots, first.kind) != (plan.slots, plan.kind):
            lines = "; ".join(differences(first, plan))
            text = f"slots and kind of loader are fixed for the life of a job: {lines}"
        elif plan.kind is PlanKind.LOADER and plan.slots != workers:
            text = (
                f"with own loaders each worker is one slot: {workers} workers, {plan.slots} slots"
            )
        else:
            self.changes += plan.index not in self.plans
            self.plans.setdefault(plan.index, plan)
            while len(self.plans) > PLANS_KEPT_MAX:
                del self.plans[min(self.plans)]
            return Accepted(message.call, plan.index)
        return Refused(message.call, Code.SPEC_MISMATCH, text)

    def _refusal(self, plan: LoopPlan) -> str:
        """Why a pass does not go with the tables, empty if it does."""
        for table in self.tables:
            what, quorum = f"table {table.spec.name!r}", table.spec.consistency.quorum
            if table.spec.is_quorum and not 1 <= quorum <= plan.slots:
                return f"{what} has a quorum of {quorum} of {plan.slots} slots"
            if table.spec.is_quorum and plan.kind is PlanKind.LOADER:
                return f"{what}: a quorum needs leased slots, which own loaders do not have"
            if table.spec.consistency.staleness_max and plan.kind is PlanKind.LOADER:
                return f"{what}: what is too stale could not be computed again with own loaders"
            if table.spec.consistency.staleness_max and not self.is_asynchronous:
                return f"{what}: staleness_max needs a job without synchronous tables"
            guard, least = table.spec.guard, 2 * table.spec.guard.byzantine + 3
            if guard.aggregation is Aggregation.KRUM and plan.slots < least:
                return f"{what}: krum against {guard.byzantine} needs {least} slots or more"
            trimmed = 2 * guard.trimmed(plan.slots)
            if guard.aggregation.is_by_coordinate and trimmed >= plan.slots:
                which = f"a trimmed mean of share={guard.share:g}"
                return f"{what}: {which} leaves nothing of {plan.slots} slots; take more slots"
            if guard.aggregation.is_paired and plan.slots > PAIRED_SLOTS_MAX:
                name = guard.aggregation.name.lower().replace("_", " ")
                return f"{what}: {name} takes at most {PAIRED_SLOTS_MAX} slots (PAIRED_SLOTS_MAX)"
        return ""

    def begin_from(self, source: Source, tables: list[tuple[TableSpec, bytes]]) -> None:
        """Tables begin with a checkpoint; known ones are placed anew."""
        if not self.tables:
            self.tables = [TableState(spec, record=record) for spec, record in tables]
        names = [spec.name for spec, _ in tables]
        for table in self.tables:
            table.source = source if table.spec.name in names else None
        self.changes += 1

    def forget_places(self) -> None:
        """No table lies anywhere, and every worker has to declare again."""
        for table in self.tables:
            table.place = None
            table.declared_by = []
        self.changes += 1

    def place(self, view: int, servers: list[int], workers: list[int], replicas: int = 1) -> bool:
        """Place every table that is not, and see to it that each has a live initializer.

        Parameters
        ----------
        view : int
            Number of the view that will say so.
        servers, workers : list of int
            Live ones, by rank.
        replicas : int
            How many servers are to hold each shard.

        Returns
        -------
        bool
            Whether anything changed.
        """
        load = dict.fromkeys(servers, 0)
        for place in self.places:
            for shard in place.shards:
                for who in (shard.server, *shard.backups, *shard.joining):
                    if who in load:
                        load[who] += shard.blocks
        is_changed = False
        for number, table in enumerate(self.tables):
            initializer = _initializer(table, workers)
            if table.place is not None and table.place.initializer == initializer:
                continue
            shards = (
                table.place.shards if table.place else _shards(table.spec, load, view, replicas)
            )
            table.place = TablePlace(number, table.spec.name, initializer, shards, table.source)
            is_changed = True
        return is_changed


def _initializer(table: TableState, workers: list[int]) -> int:
    if table.source is not None:
        return 0
    able = [who for who in workers if who in table.declared_by]
    if table.place is not None and table.place.initializer in able:
        return table.place.initializer
    return able[0] if able else 0


def _shards(spec: TableSpec, load: dict[int, int], view: int, replicas: int) -> list[ShardPlace]:
    spans = placement.cut(spec, len(load))
    chains = placement.place([span.blocks for span in spans], load, min(replicas, len(load)))
    return [
        ShardPlace(number, view, span.first_block, span.blocks, chain[0], view, chain[1:])
        for number, (span, chain) in enumerate(zip(spans, chains, strict=True))
    ]
