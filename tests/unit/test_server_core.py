"""The server's decisions: events in, effects out."""

import math

import pytest

from treefold.common import layout
from treefold.common.spec import (
    Dtype,
    Hyper,
    OptimizerSpec,
    Placement,
    Rule,
    TableSpec,
    TensorSpec,
)
from treefold.server.core import ServerCore, ServerLimits
from treefold.server.effects import (
    ComputeNorm,
    Effect,
    FoldPayloads,
    NormComputed,
    OpenShard,
    PartRef,
    PublishVersion,
    RecordVersion,
    ReleasePayload,
    ReleaseVersion,
    ServerDrainAsked,
    ServerFailed,
)
from treefold.wire.exchange import SCHEDULER, Halt, PeerLost, Received, Send, Tick
from treefold.wire.membership import MS, Identity, Membership
from treefold.wire.messages import (
    AssignTable,
    Code,
    Fenced,
    Frame,
    Heartbeat,
    HeartbeatSeen,
    Leases,
    Leave,
    NormDecision,
    NormReport,
    Outcome,
    Phase,
    Pull,
    Pulled,
    Push,
    Refused,
    Register,
    Registered,
    Role,
    RoundLate,
    RoundMeta,
    RoundStatus,
    ShardPlace,
    Stop,
    TablePlace,
    View,
)

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


@pytest.fixture(autouse=True)
def _tiny_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight elements make two parts of one block each."""
    monkeypatch.setattr(layout, "BLOCK_ELEMENTS", 4)
    monkeypatch.setattr(layout, "PART_BLOCKS_MAX", 1)


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
        "job": JOB, "sender": 5, "view": 2, "table": 0, "shard": 0, "part": 0, "round": round_,
        "active": 2, "level": 0, "index": index, "absent": b"\0", "frame": Frame(Dtype.FLOAT32, 4),
    }  # fmt: skip
    return Push(**{**fields, **other})  # type: ignore[arg-type]  # fields by name


def meta(round_: int, norm_max: float = 0.0, **other: object) -> RoundMeta:
    """What slot 0 brings."""
    fields: dict[str, object] = {
        "job": JOB, "sender": 5, "view": 2, "table": 0, "shard": 0, "round": round_, "active": 2,
        "groups": GROUPS, "norm_max": norm_max, "state": b"s",
    }  # fmt: skip
    return RoundMeta(**{**fields, **other})  # type: ignore[arg-type]  # fields by name


def pull(version: int, attempt: int = 0, parts: list[int] | None = None) -> Pull:
    """A pull of the shard."""
    return Pull(JOB, 5, 2, 0, 0, version, attempt, parts or [])


def data(core: ServerCore, message: object, payload: int | None = None) -> list[Effect]:
    """What a message of a worker makes a server do."""
    return core.handle(0, Received(WORKER, message, payload))  # type: ignore[arg-type]  # any


def at_version(version: int) -> ServerCore:
    """A server whose shard has reached a version; payloads of round ``t`` are ``100 * t + n``."""
    core = holder()
    for part in (0, 1):
        marks = b"\0"
        data(core, push(-1, 0, part=part, active=1, absent=marks), part + 1)
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


def of(effects: list[Effect], *kinds: type) -> list[Effect]:
    """Effects of some kinds."""
    return [effect for effect in effects if isinstance(effect, kinds)]


# ---- becoming a member ---------------------------------------------------------------------------


def test_a_server_registers_and_registers_again_until_it_is_answered() -> None:
    core = new_core()
    assert sent(core.handle(0, Tick()), Register)
    assert core.next_deadline_ns() == 500 * MS
    assert sent(core.handle(500 * MS, Tick()), Register)


def test_a_registered_server_beats_at_once_and_then_regularly() -> None:
    core = new_core()
    core.handle(0, Tick())
    assert sent(control(core, registered()), Heartbeat)
    assert core.next_deadline_ns() == 500 * MS


def test_a_server_that_nobody_answers_halts_with_status_three() -> None:
    core = new_core()
    earlier = [effect for ms in range(0, 15_001, 500) for effect in core.handle(ms * MS, Tick())]
    assert not of(earlier, Halt)
    assert of(core.handle(15_500 * MS, Tick()), Halt) == [
        Halt(3, "no scheduler answered within 16 s")
    ]


def test_a_view_that_overtakes_the_answer_is_read_when_it_comes_again() -> None:
    core = new_core()
    core.handle(0, Tick())
    control(core, AssignTable(0, SPEC))
    assert not of(control(core, view(2)), OpenShard)
    control(core, registered())
    assert of(control(core, view(2)), OpenShard)


def test_an_older_view_changes_nothing() -> None:
    core = holder()
    control(core, view(7))
    control(core, view(3))
    assert core.view == 7


@pytest.mark.parametrize("is_spec_first", [True, False])
def test_a_shard_opens_once_spec_and_place_are_there_in_either_order(is_spec_first: bool) -> None:
    core = member()
    messages = [AssignTable(0, SPEC), view(2)]
    effects = [control(core, m) for m in (messages if is_spec_first else reversed(messages))]
    assert not of(effects[0], OpenShard)
    assert of(effects[1], OpenShard)
    assert not of(control(core, view(3)), OpenShard)


def test_a_server_that_was_given_up_halts_since_its_shards_are_lost() -> None:
    assert of(control(holder(), Fenced(ME)), Halt) == [
        Halt(1, "the scheduler gave this server up for dead; its shards are lost")
    ]


def test_a_server_of_another_job_halts() -> None:
    other = Registered(9, JOB + 1, ME, 0, 500, 2_000, 1, 1)
    assert of(control(member(), other), Halt)


@pytest.mark.parametrize(
    ("outcome", "status"),
    [(Outcome.DONE, 0), (Outcome.DRAINED, 0), (Outcome.FAILED, 1), (Outcome.NOT_FORMED, 3)],
)
def test_the_end_of_the_job_is_acknowledged_and_gives_the_exit_status(
    outcome: Outcome, status: int
) -> None:
    effects = control(member(), Stop(outcome, "why"))
    assert sent(effects, Leave) == [Leave(ME, outcome, "")]
    assert of(effects, Halt) == [Halt(status, "why")]


def test_a_server_that_is_asked_to_stop_says_farewell() -> None:
    core = member()
    assert sent(core.handle(0, ServerDrainAsked()), Leave)


def test_a_server_that_cannot_do_what_the_job_asks_tells_everybody_why() -> None:
    core = member()
    farewell = sent(core.handle(0, ServerFailed("no such optimizer")), Leave)
    assert farewell == [Leave(ME, Outcome.FAILED, "no such optimizer")]


def test_a_server_without_scheduler_and_workers_ends_after_half_a_minute() -> None:
    core = holder()
    halts = [of(core.handle(ms * MS, Tick()), Halt) for ms in range(500, 31_000, 500)]
    assert [halt for found in halts for halt in found] == [
        Halt(1, "neither scheduler nor workers were heard for 30 s")
    ]


def test_time_in_which_a_server_was_stopped_is_no_silence_of_others() -> None:
    core = holder()
    control(core, HeartbeatSeen(ME, 2), at_ms=100)
    assert not of(core.handle(60_000 * MS, Tick()), Halt)


# ---- rounds --------------------------------------------------------------------------------------


def test_initial_values_make_version_zero_when_the_last_part_is_there() -> None:
    core = holder()
    first = data(core, push(-1, 0, part=0, active=1), 1)
    second = data(core, push(-1, 0, part=1, active=1), 2)
    assert not of(first, PublishVersion)
    (published,) = of(second, PublishVersion)
    assert isinstance(published, PublishVersion)
    assert (published.version, published.roots, published.meta) == (0, [1, 2], None)


def test_siblings_are_folded_left_and_right_whatever_comes_first() -> None:
    core = at_version(0)
    data(core, push(0, 1), 11)
    assert of(data(core, push(0, 0), 10), FoldPayloads) == [FoldPayloads(0, 0, 0, 10, 11)]


def test_a_duplicate_is_released_and_changes_nothing() -> None:
    core = at_version(0)
    data(core, push(0, 0), 10)
    assert data(core, push(0, 0), 12) == [ReleasePayload(12)]
    assert core.duplicates == 1


def test_a_push_of_a_round_that_is_over_is_a_duplicate() -> None:
    core = at_version(2)
    assert data(core, push(0, 0), 12) == [ReleasePayload(12)]


def test_a_node_that_covers_held_ones_replaces_them() -> None:
    core = at_version(0)
    data(core, push(0, 1), 11)
    assert of(data(core, push(0, 0, level=1), 20), ReleasePayload) == [ReleasePayload(11)]


def test_a_part_without_any_gradient_adds_nothing_to_its_sibling() -> None:
    core = at_version(0)
    data(core, push(0, 0, absent=b"\3", frame=None))
    effects = data(core, push(0, 1), 11)
    assert not of(effects, FoldPayloads)
    assert core.shards[0, 0].round is not None
    assert core.shards[0, 0].round.roots()[0] == 11


def test_a_round_is_published_only_with_every_root_and_the_meta() -> None:
    core = at_version(0)
    for part in (0, 1):
        for slot in (0, 1):
            assert not of(
                data(core, push(0, slot, part=part), 10 + 2 * part + slot), PublishVersion
            )
    (published,) = of(data(core, meta(0)), PublishVersion)
    assert isinstance(published, PublishVersion)
    assert (published.version, published.roots, published.meta) == (1, [10, 12], meta(0))
    assert math.isnan(published.norm)


def test_a_round_records_who_contributed_what() -> None:
    core = at_version(0)
    data(core, push(0, 0, sender=5), 10)
    data(core, push(0, 1, sender=6), 11)
    data(core, push(0, 0, part=1, level=1), 12)
    (record,) = of(data(core, meta(0)), RecordVersion)
    assert record == RecordVersion(0, 0, 1, [(0, 0, 5), (0, 1, 6)])


def test_the_third_version_lets_the_first_one_go() -> None:
    core = at_version(1)
    assert of(complete(core, 1), ReleaseVersion) == [ReleaseVersion(0, 0, 0)]


def test_a_limit_of_the_norm_is_a_question_to_the_scheduler_and_then_a_version() -> None:
    core = at_version(0)
    assert of(complete(core, 0, norm_max=1.0), ComputeNorm) == [ComputeNorm(0, 0, 0, [100, 102])]
    reports = sent(core.handle(0, NormComputed(0, 0, 0, [1.0, 2.0])), NormReport)
    assert reports == [NormReport(ME, 0, 0, 0, [1.0, 2.0])]
    (published,) = of(control(core, NormDecision(0, 0, 1.75)), PublishVersion)
    assert isinstance(published, PublishVersion)
    assert published.norm == 1.75
    assert not of(control(core, NormDecision(0, 0, 1.75)), PublishVersion)


def test_a_norm_report_is_sent_again_until_it_is_answered() -> None:
    core = at_version(0)
    complete(core, 0, norm_max=1.0)
    core.handle(0, NormComputed(0, 0, 0, [1.0, 2.0]))
    assert sent(core.handle(500 * MS, Tick()), NormReport)


# ---- pulls ---------------------------------------------------------------------------------------


def test_a_version_is_sent_part_by_part_with_its_state_in_part_zero() -> None:
    replies = of(data(at_version(1), pull(1)), Send)
    assert [r.payload for r in replies if isinstance(r, Send)] == [
        PartRef(0, 0, 1, 0),
        PartRef(0, 0, 1, 1),
    ]
    states = [m.state for m in sent(replies, Pulled) if isinstance(m, Pulled)]
    assert states == [b"s", b""]


def test_a_version_that_does_not_exist_yet_is_sent_when_it_does() -> None:
    core = at_version(1)
    assert data(core, pull(2)) == []
    replies = sent(complete(core, 1), Pulled)
    assert [reply.version for reply in replies if isinstance(reply, Pulled)] == [2, 2]


def test_a_second_attempt_is_told_what_the_round_lacks() -> None:
    core = at_version(1)
    data(core, push(1, 1), 11)
    (status,) = sent(data(core, pull(2, attempt=1)), RoundStatus)
    assert isinstance(status, RoundStatus)
    assert [(missing.part, missing.slots) for missing in status.missing] == [(0, [0]), (1, [0, 1])]
    assert status.is_meta_missing


def test_a_version_that_is_kept_no_longer_is_answered_with_the_newest() -> None:
    replies = sent(data(at_version(3), pull(1, parts=[1])), Pulled)
    assert [(r.part, r.version) for r in replies if isinstance(r, Pulled)] == [(0, 3), (1, 3)]


def test_a_pull_of_single_parts_is_answered_with_those() -> None:
    replies = sent(data(at_version(1), pull(1, parts=[1])), Pulled)
    assert [reply.part for reply in replies if isinstance(reply, Pulled)] == [1]


def test_who_cannot_be_reached_any_more_is_not_waited_for() -> None:
    core = at_version(1)
    data(core, pull(2))
    core.handle(0, PeerLost(WORKER))
    assert not sent(complete(core, 1), Pulled)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (push(0, 0, job=1), Code.JOB_MISMATCH),
        (push(0, 0, view=1), Code.STALE_VIEW),
        (push(0, 0, shard=4), Code.UNKNOWN_TABLE),
        (push(0, 0, part=2), Code.BAD_NODE),
        (push(0, 2), Code.BAD_NODE),
        (push(0, 0, level=2), Code.BAD_NODE),
        (push(-1, 0), Code.BAD_NODE),
        (push(0, 0, absent=b"\0\0"), Code.BAD_PAYLOAD),
        (push(0, 0, frame=Frame(Dtype.FLOAT32, 3)), Code.BAD_PAYLOAD),
        (push(0, 0, frame=Frame(Dtype.BFLOAT16, 4)), Code.BAD_PAYLOAD),
        (push(0, 0, frame=None), Code.BAD_PAYLOAD),
        (push(1, 0), Code.FUTURE_ROUND),
        (meta(1), Code.FUTURE_ROUND),
        (meta(0, groups=[]), Code.BAD_PAYLOAD),
        (pull(0, parts=[2]), Code.BAD_MESSAGE),
        (RoundLate(1, 0, []), Code.BAD_MESSAGE),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_code_and_changes_nothing(
    message: object, code: Code
) -> None:
    core = at_version(0)
    payload = 50 if isinstance(message, Push) and message.frame is not None else None
    effects = data(core, message, payload)
    (refused,) = sent(effects, Refused)
    assert isinstance(refused, Refused)
    assert refused.code is code
    assert of(effects, ReleasePayload) == ([] if payload is None else [ReleasePayload(payload)])
    assert core.shards[0, 0].version == 0
    core.check_invariants()


def test_a_plan_with_other_active_slots_is_refused() -> None:
    core = at_version(0)
    data(core, push(0, 0), 10)
    (refused,) = sent(data(core, push(0, 2, active=3), 11), Refused)
    assert isinstance(refused, Refused)
    assert refused.code is Code.SPEC_MISMATCH


def test_who_is_ahead_of_this_server_is_not_refused_but_asked_to_wait() -> None:
    core = holder()
    assert data(core, push(-1, 0, view=9, active=1), 3) == [ReleasePayload(3)]


def test_workers_that_come_before_the_scheduler_has_answered_are_not_refused() -> None:
    core = new_core()
    core.handle(0, Tick())
    assert data(core, pull(0)) == []
