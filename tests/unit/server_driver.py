"""A server core as its tests drive it: events in, effects out."""

from treefold.common.spec import (
    Dtype,
    Hyper,
    OptimizerSpec,
    Placement,
    Rule,
    TableSpec,
    TensorSpec,
)
from treefold.server.core import ServerCore
from treefold.server.effects import (
    Effect,
)
from treefold.server.limits import ServerLimits
from treefold.wire.exchange import SCHEDULER, Received, Send, Tick
from treefold.wire.membership import MS, Identity, Membership
from treefold.wire.messages import AssignTable, Pull, Push, Registered, RoundHyper, RoundMeta, View
from treefold.wire.words import Frame, Leases, Phase, Role, ShardPlace, TablePlace

JOB, ME, WORKER = 77, 3, b"worker"
SECOND = 1_000 * MS
GROUPS: list[Hyper] = [{"lr": 0.1}]
SPEC = TableSpec(
    "t",
    Rule.OPTIMIZER,
    Placement.ELEMENTWISE,
    [TensorSpec("w", [3], Dtype.FLOAT32, 0), TensorSpec("b", [5], Dtype.FLOAT32, 0)],
    OptimizerSpec("SGD", GROUPS),
)


def new_core() -> ServerCore:
    """A server that has just started."""
    identity = Identity(Role.SERVER, 9, "address", "host", 1, "0")
    return ServerCore(Membership(identity), ServerLimits(15 * SECOND))


def control(core: ServerCore, message: object, at_ms: int = 0) -> list[Effect]:
    """What a message of the scheduler makes a server do."""
    return core.handle(at_ms * MS, Received(SCHEDULER, message))  # type: ignore[arg-type]  # any


def view(number: int, shard_view: int = 2) -> View:
    """A view in which this server holds the one shard of the one table."""
    place = TablePlace(0, "t", 5, [ShardPlace(0, shard_view, 0, 2, ME)])
    return View(number, Phase.RUNNING, 5, [], [place], Leases(0, []), Leases(0, []))


def registered() -> Registered:
    """The scheduler's answer to this server."""
    return Registered(9, JOB, ME, 0, 500, 2_000, 1, 1)


def member() -> ServerCore:
    """A server that belongs to a job."""
    core = new_core()
    core.handle(0, Tick())
    control(core, registered())
    return core


def holder() -> ServerCore:
    """A server with an open shard that has no values yet."""
    core = member()
    control(core, AssignTable(0, SPEC))
    control(core, view(2))
    return core


def push(round_: int, index: int, **other: object) -> Push:
    """A push of one slot for part 0, of two slots that are active."""
    fields: dict[str, object] = {
        "job": JOB, "sender": 5, "view": 2, "table": 0, "shard": 0, "part": 0, "count": 1,
        "round": round_, "active": 2, "level": 0, "index": index, "absent": [],
        "frame": Frame(Dtype.FLOAT32, 4),
    }  # fmt: skip
    return Push(**{**fields, **other})  # type: ignore[arg-type]  # fields by name


def meta(round_: int, norm_max: float = 0.0, **other: object) -> RoundMeta:
    """What slot 0 brings."""
    fields: dict[str, object] = {
        "job": JOB, "sender": 5, "view": 2, "table": 0, "shard": 0, "round": round_, "active": 2,
        "groups": GROUPS, "norm_max": norm_max, "state": b"s",
    }  # fmt: skip
    return RoundMeta(**{**fields, **other})  # type: ignore[arg-type]  # fields by name


def hyper(round_: int, norm_max: float = 0.0) -> RoundHyper:
    """What slot 0 steps with, early."""
    return RoundHyper(JOB, 5, 2, 0, 0, round_, 2, GROUPS, norm_max)


def pull(version: int, attempt: int = 0, parts: list[int] | None = None) -> Pull:
    """A pull of the shard."""
    return Pull(JOB, 5, 2, 0, 0, version, attempt, parts or [])


def data(core: ServerCore, message: object, payload: int | None = None) -> list[Effect]:
    """What a message of a worker makes a server do."""
    payloads = () if payload is None else (payload,)
    return core.handle(0, Received(WORKER, message, payloads))  # type: ignore[arg-type]  # any


def at_version(version: int) -> ServerCore:
    """A server whose shard has reached a version; payloads of round ``t`` are ``100 * t + n``."""
    core = holder()
    for part in (0, 1):
        data(core, push(-1, 0, part=part, active=1), part + 1)
    for round_ in range(version):
        complete(core, round_)
    return core


def complete(core: ServerCore, round_: int, norm_max: float = 0.0) -> list[Effect]:
    """Send everything of one round; returns what its last message makes the server do."""
    for part in (0, 1):
        for slot in (0, 1):
            data(core, push(round_, slot, part=part), 100 * (round_ + 1) + 2 * part + slot)
    return data(core, meta(round_, norm_max))


def sent(effects: list[Effect], kind: type) -> list[object]:
    """Messages of a kind among effects."""
    return [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, kind)]


def messages(effects: list[Effect]) -> list[object]:
    """Everything that is sent."""
    return [effect.message for effect in effects if isinstance(effect, Send)]


def of(effects: list[Effect], *kinds: type) -> list[Effect]:
    """Effects of some kinds."""
    return [effect for effect in effects if isinstance(effect, kinds)]
