"""A scheduler core in the hands of a test: the members' part, in short."""

from treefold.common.plan import LoopPlan, PlanKind
from treefold.common.spec import (
    Dtype,
    OptimizerSpec,
    Placement,
    Rule,
    TableSpec,
    TensorSpec,
)
from treefold.scheduler.admission import SchedulerLimits
from treefold.scheduler.core import SchedulerCore
from treefold.scheduler.effects import Effect
from treefold.wire.exchange import Received, Send, Tick
from treefold.wire.membership import MS
from treefold.wire.messages import DeclarePlan, DeclareTable, Heartbeat, Register
from treefold.wire.words import PROTOCOL_VERSION, Leases, Role

SECOND = 1_000 * MS
SERVER, WORKERS = b"server", [b"w0", b"w1", b"w2"]
LIMITS = SchedulerLimits(
    job=77,
    servers=1,
    workers=2,
    heartbeat_ns=500 * MS,
    dead_after_ns=2 * SECOND,
    server_dead_after_ns=10 * SECOND,
    form_timeout_ns=120 * SECOND,
    rejoin_grace_ns=5 * SECOND,
)
SPEC = TableSpec(
    "t",
    Rule.OPTIMIZER,
    Placement.ELEMENTWISE,
    [TensorSpec("w", [3], Dtype.FLOAT32, 0)],
    OptimizerSpec("SGD", [{"lr": 0.1}]),
)


def plan(index: int = 0, slots: int = 4, rounds: int = 100, **other: object) -> LoopPlan:
    """A pass over so many rounds."""
    fields: dict[str, object] = {
        "kind": PlanKind.SLOTS, "index": index, "first_round": 0, "rounds": rounds, "slots": slots,
        "samples": rounds * slots, "batch_size": slots, "epoch": 0, "shuffle": True, "seed": 0,
    }  # fmt: skip
    return LoopPlan(**{**fields, **other})  # type: ignore[arg-type]  # fields by name


def loader(slots: int) -> LoopPlan:
    """The pass of workers with loaders of their own."""
    return LoopPlan(PlanKind.LOADER, 0, 0, 0, slots, 0, slots, 0, False, 0)


class Driver:
    """A scheduler core and the clock, with the members' answers in short."""

    def __init__(self, limits: SchedulerLimits = LIMITS) -> None:
        self.core = SchedulerCore(limits)
        self.now_ns = 0
        self.core.handle(0, Tick())

    def say(self, peer: bytes, message: object) -> list[Effect]:
        """A member sends a message."""
        effects = self.core.handle(self.now_ns, Received(peer, message))  # type: ignore[arg-type]  # any
        self.core.check_invariants()
        return effects

    def wait(self, for_ns: int) -> list[Effect]:
        """Time passes."""
        self.now_ns += for_ns
        return self.core.handle(self.now_ns, Tick())

    def register(self, peer: bytes, role: Role, nonce: int) -> list[Effect]:
        """A process registers."""
        address = f"server-{nonce}" if role is Role.SERVER else ""
        who = Register(PROTOCOL_VERSION, role, nonce, address, "host", 1, "0")
        return self.say(peer, who)

    def form(self, workers: int = 2) -> None:
        """A server (incarnation 1) and workers (2, 3, ...) register."""
        self.register(SERVER, Role.SERVER, 100)
        for number in range(workers):
            self.register(WORKERS[number], Role.WORKER, 101 + number)

    def train(self, workers: int = 2, slots: int = 4) -> None:
        """The cluster forms, and every worker declares a table and a pass."""
        self.form(workers)
        for number in range(workers):
            self.say(WORKERS[number], DeclareTable(2 + number, 1, SPEC))
        for number in range(workers):
            self.say(WORKERS[number], DeclarePlan(2 + number, 2, plan(slots=slots)))

    def beat(self, incarnation: int, round_: int = 0, slot_ns: int = 0) -> list[Effect]:
        """A member beats."""
        peer = SERVER if incarnation == 1 else WORKERS[(incarnation - 2) % 3]
        view = self.core.view.number
        beat = Heartbeat(incarnation, view, 1, round_, slot_ns, 0, None, "", 0, 0.0)
        return self.say(peer, beat)

    def beats(self, *incarnations: int, round_: int = 0) -> None:
        """Some members beat, the others do not."""
        for incarnation in incarnations:
            self.beat(incarnation, round_)

    def pass_time(self, seconds: float, *incarnations: int) -> list[Effect]:
        """Time passes, in which these members beat."""
        effects: list[Effect] = []
        for _ in range(int(seconds * 2)):
            effects += self.wait(500 * MS)
            self.beats(*incarnations)
        return effects

    @property
    def leases(self) -> Leases:
        """The newest leases."""
        return self.core.view.leases


def sent(effects: list[Effect], kind: type) -> list[object]:
    """Messages of a kind among effects."""
    return [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, kind)]


def peers(effects: list[Effect], kind: type) -> list[object]:
    """Who gets a message of a kind."""
    return [e.peer for e in effects if isinstance(e, Send) and isinstance(e.message, kind)]
