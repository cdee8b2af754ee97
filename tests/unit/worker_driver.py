"""A worker core in the hands of a test: everybody else's part, in short."""

import itertools
import math

from treefold.common.plan import LoopPlan, PlanKind
from treefold.common.spec import (
    Dtype,
    Hyper,
    OptimizerSpec,
    Placement,
    Rule,
    TableSpec,
    TensorSpec,
)
from treefold.wire.exchange import SCHEDULER, Received, Send, Tick
from treefold.wire.membership import MS, Identity, Membership
from treefold.wire.messages import Accepted, Published, Pulled, Push, Registered, View
from treefold.wire.words import Frame, Leases, Member, Phase, Role, ShardPlace, TablePlace
from treefold.worker.core import WorkerCore
from treefold.worker.effects import (
    Complete,
    Contributed,
    DeclareCalled,
    Effect,
    Fail,
    LoopCalled,
    LoopEnd,
    SlotFinished,
    SlotMeta,
    Snapshot,
    Task,
    TaskCalled,
)
from treefold.worker.limits import WorkerLimits

JOB, ME, OTHER, SERVER = 77, 5, 6, 3
SECOND = 1_000 * MS
GROUPS: list[Hyper] = [{"lr": 0.1}]


def table_spec(name: str, elements: int = 4) -> TableSpec:
    """A table of one tensor."""
    tensors = [TensorSpec(f"{name}.w", [elements], Dtype.FLOAT32, 0)]
    optimizer = OptimizerSpec("SGD", GROUPS)
    return TableSpec(name, Rule.OPTIMIZER, Placement.ELEMENTWISE, tensors, optimizer)


def plan(rounds: int = 9, slots: int = 4, index: int = 0, first: int = 0) -> LoopPlan:
    """A pass over so many rounds."""
    samples = rounds * slots
    return LoopPlan(PlanKind.SLOTS, index, first, rounds, slots, samples, slots, 0, True, 0)


class Driver:
    """A worker core, with everybody else's part in short.

    Attributes
    ----------
    shards : list of int
        Shards of each table.
    parts : int
        Parts of each shard.
    """

    def __init__(self, shards: tuple[int, ...] = (1,), parts: int = 1) -> None:
        identity = Identity(Role.WORKER, 9, "", "host", 1, "0")
        self.limits = WorkerLimits(15 * SECOND, 100 * MS, 10 * SECOND)
        self.core = WorkerCore(Membership(identity), self.limits)
        self.now_ns = 0
        self.shards = shards
        self.parts = parts
        self.calls = itertools.count(1)
        self.payloads = itertools.count(1)
        self.views = itertools.count(2)
        self.feed(Tick())

    def feed(self, event: object) -> list[Effect]:
        """Give the core an event."""
        effects = self.core.handle(self.now_ns, event)  # type: ignore[arg-type]  # any event
        self.core.check_invariants()
        return effects

    def control(self, message: object) -> list[Effect]:
        """The scheduler sends a message."""
        return self.feed(Received(SCHEDULER, message))  # type: ignore[arg-type]  # any message

    def server(self, message: object, *payloads: int) -> list[Effect]:
        """The server sends a message."""
        return self.feed(Received(SERVER, message, payloads))  # type: ignore[arg-type]  # any

    def wait(self, for_ns: int) -> list[Effect]:
        """Time passes, in steps."""
        effects: list[Effect] = []
        until_ns = self.now_ns + for_ns
        while self.now_ns < until_ns:
            self.now_ns = min(until_ns, self.now_ns + 100 * MS)
            effects += self.feed(Tick())
        return effects

    def view(
        self, leases: list[int], from_round: int = 0, previous: list[int] | None = None
    ) -> View:
        """The next view, with these leases."""
        members = [Member(Role.SERVER, 0, SERVER, "address", "host", 1)]
        tables = [
            TablePlace(number, f"t{number}", ME, [self._place(shard) for shard in range(count)])
            for number, count in enumerate(self.shards)
        ]
        newest, before = Leases(from_round, leases), Leases(0, previous or leases)
        return View(next(self.views), Phase.RUNNING, ME, members, tables, newest, before)

    def _place(self, shard: int) -> ShardPlace:
        return ShardPlace(shard, 2, shard * self.parts, self.parts, SERVER)

    def join(self, incarnation: int = ME) -> list[Effect]:
        """The scheduler answers the registration."""
        nonce = 9 + self.core.membership.registrations
        return self.control(Registered(nonce, JOB, incarnation, 0, 500, 2_000, 1, 1))

    def call(self, kind: type, *fields: object) -> tuple[int, list[Effect]]:
        """The script makes a call."""
        number = next(self.calls)
        return number, self.feed(kind(number, *fields))

    def pulled(self, table: int, shard: int, version: int) -> list[Effect]:
        """All parts of a version arrive, and word that it is whole."""
        effects = self.run(table, shard, version, 0, self.parts)
        return effects + self.published(table, shard, version)

    def run(self, table: int, shard: int, version: int, part: int, count: int) -> list[Effect]:
        """A run of parts of a version arrives."""
        message = Pulled(table, shard, part, count, version, Frame(Dtype.FLOAT32, 4 * count))
        return self.server(message, *itertools.islice(self.payloads, count))

    def published(self, table: int, shard: int, version: int) -> list[Effect]:
        """Word arrives that a version is whole."""
        spec = self.core.tables[table].spec
        state = b"" if spec.is_asynchronous else b"s%d" % version  # nothing is applied
        return self.server(Published(table, shard, version, state, math.nan))

    def declare(self, version: int = 0) -> None:
        """Join, and declare every table; all shards are at one version."""
        self.join()
        self.control(self.view([]))
        for table, count in enumerate(self.shards):
            call, _ = self.call(DeclareCalled, table_spec(f"t{table}", 4 * count * self.parts))
            self.control(Accepted(call, table))
            for shard in range(count):
                self.pulled(table, shard, version)

    def enter(self, leases: list[int], entered: LoopPlan | None = None) -> list[Effect]:
        """Begin a pass and ask for a task."""
        call, _ = self.call(LoopCalled, entered or plan(slots=len(leases)))
        self.control(Accepted(call, 0))
        self.control(self.view(leases))
        return self.call(TaskCalled)[1]

    def contribute(self, round_: int, slot: int, payload: int | None = None) -> list[Effect]:
        """The script hands over the whole of a slot and asks for the next task."""
        effects: list[Effect] = []
        for table, count in enumerate(self.shards):
            parts = range(count * self.parts)
            first = 100 * (slot + 1) + 10 * table
            numbers = tuple(first + part if payload is None else payload for part in parts)
            event = Contributed(table, 0, len(parts), round_, slot, numbers, [])
            effects += self.feed(event)
        metas = {table: SlotMeta(GROUPS, 0.0, b"state") for table in range(len(self.shards))}
        effects += self.feed(SlotFinished(round_, slot, metas))
        return effects + self.call(TaskCalled)[1]


def sent(effects: list[Effect], kind: type) -> list[object]:
    """Messages of a kind among effects."""
    return [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, kind)]


def nodes(effects: list[Effect]) -> list[tuple[int, int]]:
    """Levels and indices of pushes among effects."""
    return [(m.level, m.index) for m in sent(effects, Push) if isinstance(m, Push)]


def completed(effects: list[Effect]) -> list[object]:
    """What calls came to."""
    return [effect.value for effect in effects if isinstance(effect, Complete)]


def snapshots(effects: list[Effect]) -> list[Snapshot]:
    """Versions that calls came to."""
    values = completed(effects)
    loaded = [s for value in values if isinstance(value, Task | LoopEnd) for s in value.snapshots]
    return [value for value in values if isinstance(value, Snapshot)] + loaded


def failed(effects: list[Effect]) -> list[Exception]:
    """Errors that calls came to."""
    return [effect.error for effect in effects if isinstance(effect, Fail)]
