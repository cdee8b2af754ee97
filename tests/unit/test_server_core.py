"""The server's decisions: events in, effects out."""

import math

import msgspec
import pytest

from tests.unit.server_driver import (
    GROUPS,
    JOB,
    ME,
    SPEC,
    WORKER,
    at_version,
    complete,
    control,
    data,
    holder,
    hyper,
    member,
    messages,
    meta,
    new_core,
    of,
    pull,
    push,
    registered,
    sent,
    view,
)
from treefold.common import layout
from treefold.common.spec import (
    Dtype,
    Placement,
)
from treefold.server.effects import (
    CloseShard,
    ComputeNorm,
    FoldPayloads,
    MakeParts,
    NormComputed,
    OpenShard,
    PartsRef,
    ReadyPart,
    RecordVersion,
    ReleasePayload,
    ReleaseVersion,
    ServerDrainAsked,
    ServerFailed,
)
from treefold.server.limits import ServerLimits
from treefold.wire.decisions import NormDecision, NormReport
from treefold.wire.exchange import Halt, PeerLost, Received, Send, Tick
from treefold.wire.membership import MS
from treefold.wire.messages import (
    Accepted,
    AssignTable,
    DrainRequest,
    Fenced,
    Heartbeat,
    HeartbeatSeen,
    Leave,
    Published,
    Pulled,
    Push,
    Refused,
    Register,
    Registered,
    RoundLate,
    RoundStatus,
    Stop,
)
from treefold.wire.words import Code, Frame, Outcome
from treefold.worker.limits import WorkerLimits


@pytest.fixture(autouse=True)
def _tiny_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight elements make two parts of one block each."""
    monkeypatch.setattr(layout, "BLOCK_ELEMENTS", 4)
    monkeypatch.setattr(layout, "PART_BLOCKS_MAX", 1)


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


def test_a_server_that_was_given_up_lets_go_of_its_shards_and_registers_again() -> None:
    core = holder()
    effects = control(core, Fenced(ME))
    assert of(effects, CloseShard) == [CloseShard(0, 0)]
    (register,) = [m for m in messages(effects) if isinstance(m, Register)]
    assert register.nonce == 10  # the next one
    assert core.shards == {}
    (answer,) = messages(data(core, pull(0)))
    assert isinstance(answer, Refused)
    assert answer.code is Code.STALE_VIEW


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


def test_a_server_asks_to_be_drained_until_the_scheduler_has_heard_it() -> None:
    core = holder()
    assert sent(core.handle(0, ServerDrainAsked()), DrainRequest)
    assert not sent(core.handle(900 * MS, Tick()), DrainRequest)
    assert sent(core.handle(1_000 * MS, Tick()), DrainRequest)
    control(core, Accepted(1, ME), at_ms=1_100)
    assert not sent(core.handle(3_000 * MS, Tick()), DrainRequest)


def test_a_server_that_cannot_do_what_the_job_asks_tells_everybody_why() -> None:
    core = member()
    farewell = sent(core.handle(0, ServerFailed("no such optimizer")), Leave)
    assert farewell == [Leave(ME, Outcome.FAILED, "no such optimizer")]


def test_a_server_without_scheduler_and_workers_ends_after_two_minutes() -> None:
    core = holder()
    halts = [of(core.handle(ms * MS, Tick()), Halt) for ms in range(500, 121_000, 500)]
    assert [halt for found in halts for halt in found] == [
        Halt(1, "neither scheduler nor workers were heard for 120 s")
    ]


def test_a_server_waits_longer_for_workers_than_they_wait_for_it() -> None:
    assert ServerLimits(0).orphan_after_ns > WorkerLimits(0, 0).unreachable_ns


def test_time_in_which_a_server_was_stopped_is_no_silence_of_others() -> None:
    core = holder()
    control(core, HeartbeatSeen(ME, 2), at_ms=100)
    assert not of(core.handle(60_000 * MS, Tick()), Halt)


# ---- rounds --------------------------------------------------------------------------------------


def test_initial_values_make_version_zero_when_the_last_part_is_there() -> None:
    core = holder()
    first = data(core, push(-1, 0, part=0, active=1), 1)
    second = data(core, push(-1, 0, part=1, active=1), 2)
    assert [e.parts for e in first if isinstance(e, MakeParts)] == [[ReadyPart(0, 1, b"\0")]]
    assert not of(first, RecordVersion)
    (made,) = of(second, MakeParts)
    assert isinstance(made, MakeParts)
    assert (made.version, made.parts, made.groups) == (0, [ReadyPart(1, 2, b"\0")], None)
    assert of(second, RecordVersion)


def test_siblings_are_folded_left_and_right_whatever_comes_first() -> None:
    core = at_version(0)
    data(core, push(0, 1), 11)
    assert of(data(core, push(0, 0), 10), FoldPayloads) == [FoldPayloads(10, 11)]


def test_a_duplicate_is_released_and_changes_nothing() -> None:
    core = at_version(0)
    data(core, push(0, 0), 10)
    assert data(core, push(0, 0), 12) == [ReleasePayload(12)]
    assert core.exchange.duplicates == 1


def test_a_push_of_a_round_that_is_over_is_a_duplicate() -> None:
    core = at_version(2)
    assert data(core, push(0, 0), 12) == [ReleasePayload(12)]


def test_a_node_that_covers_held_ones_replaces_them() -> None:
    core = at_version(0)
    data(core, push(0, 1), 11)
    assert of(data(core, push(0, 0, level=1), 20), ReleasePayload) == [ReleasePayload(11)]


def test_a_part_without_any_gradient_adds_nothing_to_its_sibling() -> None:
    core = at_version(0)
    data(core, push(0, 0, absent=[b"\3"], frame=None))
    effects = data(core, push(0, 1), 11)
    assert not of(effects, FoldPayloads)
    current = core.shards[0, 0].round
    assert current is not None
    assert current.ready() == [ReadyPart(0, 11, b"\0")]


def test_a_round_is_a_version_only_with_every_root_and_the_meta() -> None:
    core = at_version(0)
    for part in (0, 1):
        for slot in (0, 1):
            effects = data(core, push(0, slot, part=part), 10 + 2 * part + slot)
            assert not of(effects, MakeParts, RecordVersion)
    effects = data(core, meta(0))
    (made,) = of(effects, MakeParts)
    assert isinstance(made, MakeParts)
    assert made.parts == [ReadyPart(0, 10, b"\0"), ReadyPart(1, 12, b"\0")]
    assert (made.version, made.groups, made.norm_max) == (1, GROUPS, 0.0)
    assert math.isnan(made.norm)
    assert of(effects, RecordVersion)


def test_parts_are_made_one_by_one_once_the_hyper_parameters_are_known() -> None:
    core = at_version(0)
    data(core, hyper(0))
    data(core, push(0, 0), 10)
    (first,) = of(data(core, push(0, 1), 11), MakeParts)
    assert isinstance(first, MakeParts)
    assert (first.version, first.parts, first.groups) == (1, [ReadyPart(0, 10, b"\0")], GROUPS)
    data(core, push(0, 0, part=1), 12)
    last = data(core, push(0, 1, part=1), 13)
    assert len(of(last, MakeParts)) == 1
    assert not of(last, RecordVersion)
    effects = data(core, meta(0))
    assert not of(effects, MakeParts)
    assert of(effects, RecordVersion)


def test_a_tensorwise_table_is_made_all_parts_at_once() -> None:
    core = at_version(0)
    shard = core.shards[0, 0]
    shard.spec = msgspec.structs.replace(shard.spec, placement=Placement.TENSORWISE)
    data(core, hyper(0))
    for slot in (0, 1):
        assert not of(data(core, push(0, slot), 10 + slot), MakeParts)
    data(core, push(0, 0, part=1), 12)
    (made,) = of(data(core, push(0, 1, part=1), 13), MakeParts)
    assert isinstance(made, MakeParts)
    assert [ready.part for ready in made.parts] == [0, 1]


def test_the_version_before_goes_when_the_first_part_of_the_next_is_made() -> None:
    core = at_version(1)
    data(core, hyper(1))
    data(core, push(1, 0), 10)
    effects = data(core, push(1, 1), 11)
    assert of(effects, ReleaseVersion, MakeParts)[0] == ReleaseVersion(0, 0, 0)
    assert 0 not in core.shards[0, 0].kept
    assert 1 in core.shards[0, 0].kept


def test_a_run_of_parts_is_taken_in_part_by_part() -> None:
    core = at_version(0)
    data(core, hyper(0))
    frame = Frame(Dtype.FLOAT32, 8)
    both = {"count": 2, "frame": frame}
    core.handle(0, Received(WORKER, push(0, 0, **both), (10, 20)))
    effects = core.handle(0, Received(WORKER, push(0, 1, **both), (11, 21)))
    folds = of(effects, FoldPayloads)
    assert folds == [FoldPayloads(10, 11), FoldPayloads(20, 21)]
    assert [type(e) for e in effects if isinstance(e, FoldPayloads | MakeParts)] == [
        FoldPayloads, MakeParts, FoldPayloads, MakeParts,
    ]  # fmt: skip


def test_a_round_records_who_contributed_what() -> None:
    core = at_version(0)
    data(core, push(0, 0, sender=5), 10)
    data(core, push(0, 1, sender=6), 11)
    data(core, push(0, 0, part=1, level=1), 12)
    (record,) = of(data(core, meta(0)), RecordVersion)
    assert record == RecordVersion(0, 0, 1, [(0, 0, 5), (0, 1, 6)], is_primary=True)


def test_a_limit_of_the_norm_is_a_question_to_the_scheduler_and_then_a_version() -> None:
    core = at_version(0)
    assert of(complete(core, 0, norm_max=1.0), ComputeNorm) == [
        ComputeNorm(0, 0, 0, [ReadyPart(0, 100, b"\0"), ReadyPart(1, 102, b"\0")])
    ]
    reports = sent(core.handle(0, NormComputed(0, 0, 0, [1.0, 2.0])), NormReport)
    assert reports == [NormReport(ME, 0, 0, 0, [1.0, 2.0])]
    (made,) = of(control(core, NormDecision(0, 0, 1.75)), MakeParts)
    assert isinstance(made, MakeParts)
    assert (made.norm, made.norm_max, len(made.parts)) == (1.75, 1.0, 2)
    assert core.shards[0, 0].version == 1
    assert not of(control(core, NormDecision(0, 0, 1.75)), MakeParts)


def test_a_norm_report_is_sent_again_until_it_is_answered() -> None:
    core = at_version(0)
    complete(core, 0, norm_max=1.0)
    core.handle(0, NormComputed(0, 0, 0, [1.0, 2.0]))
    assert sent(core.handle(500 * MS, Tick()), NormReport)


# ---- pulls ---------------------------------------------------------------------------------------


def test_a_version_is_sent_in_runs_of_parts_and_then_said_to_be_whole() -> None:
    replies = of(data(at_version(1), pull(1)), Send)
    assert [r.payload for r in replies if isinstance(r, Send)] == [PartsRef(0, 0, 1, 0, 2), None]
    (word,) = sent(replies, Published)
    assert isinstance(word, Published)
    assert (word.version, word.state) == (1, b"s")


def test_who_waits_is_sent_parts_as_they_are_made_and_the_word_last() -> None:
    core = at_version(1)
    data(core, pull(2))
    data(core, hyper(1))
    data(core, push(1, 0), 10)
    early = sent(data(core, push(1, 1), 11), Pulled)
    assert [(r.part, r.count, r.version) for r in early if isinstance(r, Pulled)] == [(0, 1, 2)]
    data(core, push(1, 0, part=1), 12)
    late = data(core, push(1, 1, part=1), 13)
    assert [r.part for r in sent(late, Pulled) if isinstance(r, Pulled)] == [1]
    assert not sent(late, Published)
    last = data(core, meta(1))
    assert (len(sent(last, Published)), len(sent(last, Pulled))) == (1, 0)


def test_who_asks_when_some_parts_are_made_is_sent_those_at_once() -> None:
    core = at_version(1)
    data(core, hyper(1))
    data(core, push(1, 0), 10)
    data(core, push(1, 1), 11)
    replies = sent(data(core, pull(2)), Pulled)
    assert [(r.part, r.version) for r in replies if isinstance(r, Pulled)] == [(0, 2)]


def test_a_version_that_does_not_exist_yet_is_sent_when_it_does() -> None:
    core = at_version(1)
    assert data(core, pull(2)) == []
    replies = sent(complete(core, 1), Pulled)
    assert [(r.part, r.count, r.version) for r in replies if isinstance(r, Pulled)] == [(0, 2, 2)]


def test_a_second_attempt_is_told_what_the_round_lacks() -> None:
    core = at_version(1)
    data(core, push(1, 1), 11)
    (status,) = sent(data(core, pull(2, attempt=1)), RoundStatus)
    assert isinstance(status, RoundStatus)
    assert [(missing.part, missing.slots) for missing in status.missing] == [(0, [0]), (1, [0, 1])]
    assert status.is_meta_missing


def test_a_version_that_is_kept_no_longer_is_answered_with_the_newest() -> None:
    replies = sent(data(at_version(3), pull(1, parts=[1])), Pulled)
    assert [(r.part, r.count, r.version) for r in replies if isinstance(r, Pulled)] == [(0, 2, 3)]


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
        (push(0, 0, absent=[b"\0\0"]), Code.BAD_PAYLOAD),
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
