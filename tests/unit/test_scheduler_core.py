"""The scheduler's decisions: events in, effects out."""

import json
from dataclasses import replace

import msgspec
import pytest

from tests.unit.scheduler_driver import (
    LIMITS,
    SECOND,
    SERVER,
    SPEC,
    WORKERS,
    Driver,
    loader,
    peers,
    plan,
    sent,
)
from treefold.common.plan import LoopPlan
from treefold.common.spec import Consistency, ConsistencyKind, OptimizerSpec, TableSpec
from treefold.scheduler.effects import SchedulerStopAsked
from treefold.wire.decisions import NormDecision, NormReport
from treefold.wire.exchange import Halt, Note
from treefold.wire.membership import MS
from treefold.wire.messages import (
    Accepted,
    AssignTable,
    DeclarePlan,
    DeclareTable,
    Fenced,
    Grant,
    Heartbeat,
    HeartbeatSeen,
    Leave,
    Pull,
    Refused,
    Register,
    Registered,
    RoundLate,
    StatusReply,
    StatusRequest,
    Stop,
    View,
)
from treefold.wire.words import PROTOCOL_VERSION, Code, Leases, Outcome, Phase, Role, Source

# ---- members -------------------------------------------------------------------------------------


def test_incarnations_grow_and_ranks_fill_up_by_role() -> None:
    driver = Driver()
    replies = [driver.register(SERVER, Role.SERVER, 100)]
    replies += [driver.register(peer, Role.WORKER, 101 + n) for n, peer in enumerate(WORKERS)]
    found = [sent(effects, Registered)[0] for effects in replies]
    assert [(r.incarnation, r.rank) for r in found if isinstance(r, Registered)] == [
        (1, 0),
        (2, 0),
        (3, 1),
        (4, 2),
    ]


def test_a_registration_that_is_repeated_is_answered_alike() -> None:
    driver = Driver()
    first = sent(driver.register(SERVER, Role.SERVER, 100), Registered)
    assert sent(driver.register(SERVER, Role.SERVER, 100), Registered) == first


def test_a_registration_over_a_new_connection_is_answered_there() -> None:
    driver = Driver()
    driver.register(WORKERS[0], Role.WORKER, 101)
    assert peers(driver.register(b"again", Role.WORKER, 101), Registered) == [b"again"]


def test_who_was_given_up_before_it_heard_its_name_is_enrolled_again() -> None:
    driver = Driver()
    driver.register(WORKERS[0], Role.WORKER, 101)
    driver.wait(LIMITS.dead_after_ns)
    (reply,) = sent(driver.register(WORKERS[0], Role.WORKER, 101), Registered)
    assert isinstance(reply, Registered)
    assert reply.incarnation == 2


def test_a_late_copy_of_a_registration_brings_nobody_back() -> None:
    driver = Driver()
    driver.register(WORKERS[0], Role.WORKER, 101)
    driver.beat(1)
    driver.wait(LIMITS.dead_after_ns)
    assert not sent(driver.register(WORKERS[0], Role.WORKER, 101), Registered)


def test_another_version_of_the_protocol_is_refused_with_both_numbers() -> None:
    old = Register(PROTOCOL_VERSION + 1, Role.WORKER, 5, "", "host", 1, "9.9")
    (refused,) = sent(Driver().say(b"old", old), Refused)
    assert isinstance(refused, Refused)
    assert refused.code is Code.PROTOCOL_VERSION
    assert f"protocol {PROTOCOL_VERSION}" in refused.text
    assert f"speaks {PROTOCOL_VERSION + 1}" in refused.text


def test_a_server_more_than_expected_is_welcome_and_holds_nothing_yet() -> None:
    driver = Driver()
    driver.train()
    (answer,) = sent(driver.register(b"more", Role.SERVER, 200), Registered)
    assert isinstance(answer, Registered)
    (table,) = driver.core.view.tables
    assert [place.server for place in table.shards] == [1]
    assert driver.core.chains.holds(answer.incarnation) == 0


def test_a_silent_worker_is_given_up_and_fenced_when_it_speaks() -> None:
    driver = Driver()
    driver.train()
    driver.pass_time(3, 1, 2)
    assert sent(driver.beat(3), Fenced) == [Fenced(3)]


def test_somebody_unknown_is_fenced() -> None:
    assert sent(Driver().say(b"ghost", Leave(99, Outcome.DONE, "")), Fenced) == [Fenced(99)]


def test_a_heartbeat_is_answered_and_brings_a_newer_view_where_it_is_lacking() -> None:
    driver = Driver()
    driver.form()
    driver.now_ns += SECOND
    old = Heartbeat(2, 0, 0, 0, 0, 0, None, "", 0, 0.0)
    effects = driver.say(WORKERS[0], old)
    assert sent(effects, HeartbeatSeen) == [HeartbeatSeen(2, driver.core.view.number)]
    assert sent(effects, View) == [driver.core.view]
    assert not sent(driver.beat(2), View)


def test_a_message_that_no_member_sends_here_is_refused() -> None:
    (refused,) = sent(Driver().say(b"odd", Pull(1, 1, 1, 0, 0, 0, 0, [])), Refused)
    assert isinstance(refused, Refused)
    assert refused.code is Code.BAD_MESSAGE


def test_status_is_a_document_for_anyone() -> None:
    driver = Driver()
    driver.train()
    (reply,) = sent(driver.say(b"anyone", StatusRequest(4)), StatusReply)
    assert isinstance(reply, StatusReply)
    document = json.loads(reply.body)
    assert (reply.call, document["phase"], document["slots"]) == (4, "running", 4)
    assert [member["name"] for member in document["members"]] == [
        "server-0",
        "worker-0",
        "worker-1",
    ]


# ---- forming -------------------------------------------------------------------------------------


def test_the_cluster_runs_once_everybody_is_there() -> None:
    driver = Driver()
    driver.form(workers=1)
    phases = [driver.core.phase]
    driver.register(WORKERS[1], Role.WORKER, 102)
    assert [*phases, driver.core.phase] == [Phase.FORMING, Phase.RUNNING]


def test_a_cluster_that_does_not_form_ends_and_names_who_is_missing() -> None:
    driver = Driver()
    driver.form(workers=1)
    effects = driver.pass_time(121, 1, 2)
    stops = sent(effects, Stop)
    assert stops
    assert isinstance(stops[0], Stop)
    assert stops[0].outcome is Outcome.NOT_FORMED
    assert "missing: worker-1" in stops[0].text


def test_tables_that_were_declared_while_it_formed_are_placed_when_it_has() -> None:
    driver = Driver()
    driver.register(WORKERS[0], Role.WORKER, 101)
    driver.register(WORKERS[1], Role.WORKER, 102)
    driver.say(WORKERS[0], DeclareTable(1, 1, SPEC))
    driver.say(WORKERS[1], DeclareTable(2, 1, SPEC))
    effects = driver.register(SERVER, Role.SERVER, 100)
    assert sent(effects, AssignTable)
    assert [place.name for place in driver.core.view.tables] == ["t"]


# ---- declarations --------------------------------------------------------------------------------


def test_a_table_is_placed_by_the_first_declaration_and_accepted_alike_afterwards() -> None:
    driver = Driver()
    driver.form()
    assert sent(driver.say(WORKERS[0], DeclareTable(2, 7, SPEC)), Accepted) == [Accepted(7, 0)]
    assert sent(driver.say(WORKERS[1], DeclareTable(3, 8, SPEC)), Accepted) == [Accepted(8, 0)]
    (place,) = driver.core.view.tables
    assert (place.initializer, [shard.server for shard in place.shards]) == (2, [1])


def test_a_table_that_is_declared_otherwise_is_refused_with_the_difference() -> None:
    driver = Driver()
    driver.form()
    driver.say(WORKERS[0], DeclareTable(2, 7, SPEC))
    other = TableSpec("t", SPEC.rule, SPEC.placement, SPEC.tensors, OptimizerSpec("Adam", [{}]))
    (refused,) = sent(driver.say(WORKERS[1], DeclareTable(3, 8, other)), Refused)
    assert isinstance(refused, Refused)
    assert (refused.call, refused.code) == (8, Code.SPEC_MISMATCH)
    assert "otherwise by worker-1 (there) than by the first worker (here)" in refused.text
    assert "optimizer.name: 'SGD' here, 'Adam' there" in refused.text


def test_a_table_that_is_declared_otherwise_than_a_checkpoint_has_it_names_the_checkpoint() -> None:
    driver = Driver()
    driver.core.declared.begin_from(Source("ckpt", 9), [(SPEC, b"")])
    driver.form()
    rule = Consistency(ConsistencyKind.QUORUM, quorum=1)
    other = msgspec.structs.replace(SPEC, consistency=rule)
    (refused,) = sent(driver.say(WORKERS[0], DeclareTable(2, 7, other)), Refused)
    assert isinstance(refused, Refused)
    assert "than in the checkpoint that the job began from (here): consistency" in refused.text


def test_a_table_with_an_optimizer_cannot_come_after_training_began() -> None:
    driver = Driver()
    driver.train()
    late = TableSpec("late", SPEC.rule, SPEC.placement, SPEC.tensors, SPEC.optimizer)
    (refused,) = sent(driver.say(WORKERS[0], DeclareTable(2, 9, late)), Refused)
    assert isinstance(refused, Refused)
    assert refused.code is Code.BAD_SPEC


def test_another_worker_initializes_a_table_whose_initializer_is_gone() -> None:
    driver = Driver()
    driver.form()
    driver.say(WORKERS[0], DeclareTable(2, 7, SPEC))
    driver.say(WORKERS[1], DeclareTable(3, 8, SPEC))
    driver.pass_time(3, 1, 3)
    assert [place.initializer for place in driver.core.view.tables] == [3]


@pytest.mark.parametrize(
    ("other", "word"),
    [
        (plan(rounds=7), "rounds"),
        (plan(index=1, slots=8), "slots"),
        (loader(4), "kind"),
    ],
)
def test_a_pass_that_differs_is_refused_with_the_difference(other: LoopPlan, word: str) -> None:
    driver = Driver()
    driver.train()
    (refused,) = sent(driver.say(WORKERS[1], DeclarePlan(3, 9, other)), Refused)
    assert isinstance(refused, Refused)
    assert refused.code is Code.SPEC_MISMATCH
    assert word in refused.text


def test_own_loaders_need_as_many_slots_as_workers() -> None:
    driver = Driver()
    driver.form()
    (refused,) = sent(driver.say(WORKERS[0], DeclarePlan(2, 9, loader(3))), Refused)
    assert isinstance(refused, Refused)
    assert "2 workers, 3 slots" in refused.text


# ---- leases --------------------------------------------------------------------------------------


def test_slots_are_leased_evenly_while_nothing_is_measured() -> None:
    driver = Driver()
    driver.train()
    assert driver.leases == Leases(0, [2, 2, 3, 3])


def test_more_workers_than_slots_stand_by_and_the_operator_is_told() -> None:
    driver = Driver(replace(LIMITS, workers=3))
    driver.form(3)
    effects = driver.say(WORKERS[0], DeclarePlan(2, 2, plan(slots=2)))
    assert driver.leases.workers == [2, 3]
    assert [n.text for n in effects if isinstance(n, Note)] == [
        "3 workers for 2 slots: 1 stand by and take backup tasks",
        "slot 0 given to worker-0, slot 1 given to worker-1",
    ]


def test_a_dead_workers_slots_go_to_the_others_at_once() -> None:
    driver = Driver()
    driver.train()
    driver.pass_time(3, 1, 2)
    assert driver.leases == Leases(0, [2, 2, 2, 2])


def test_slots_move_to_faster_workers_from_a_round_that_has_not_begun() -> None:
    driver = Driver()
    driver.train()
    driver.beat(1)
    driver.beat(2, round_=5, slot_ns=10 * MS)
    driver.beat(3, round_=5, slot_ns=30 * MS)
    driver.wait(500 * MS)
    assert driver.leases.workers == [2, 2, 2, 3]
    assert driver.leases.from_round > 5
    assert driver.core.view.previous.workers == [2, 2, 3, 3]


def test_slots_stay_where_little_would_be_gained() -> None:
    driver = Driver()
    driver.train()
    driver.beat(1)
    driver.beat(2, slot_ns=10 * MS)
    driver.beat(3, slot_ns=11 * MS)
    before = driver.leases
    driver.wait(500 * MS)
    assert driver.leases == before


def test_leases_of_earlier_rounds_do_not_name_the_dead() -> None:
    driver = Driver()
    driver.train()
    driver.beat(1)
    driver.beat(2, round_=5, slot_ns=10 * MS)
    driver.beat(3, round_=5, slot_ns=1_000 * MS)
    driver.wait(500 * MS)
    assert (driver.leases.workers, driver.core.view.previous.workers) == (
        [2, 2, 2, 2],
        [2, 2, 3, 3],
    )
    driver.pass_time(3, 1, 2)
    assert driver.core.view.previous.workers == [2, 2, 2, 2]


def test_a_late_joiner_gets_slots_at_the_next_check() -> None:
    driver = Driver()
    driver.train()
    driver.register(WORKERS[2], Role.WORKER, 103)
    assert driver.leases.workers == [2, 2, 3, 3]
    driver.beats(1, 2, 3, 4)
    driver.wait(500 * MS)
    assert 4 in driver.leases.workers


def test_a_late_rounds_missing_slot_goes_to_a_worker_that_owes_none() -> None:
    driver = Driver()
    driver.train()
    driver.beats(1, 2, 3)
    grants: list[object] = []
    for _ in range(8):
        driver.now_ns += 200 * MS
        driver.beats(1, 2, 3)
        effects = driver.say(SERVER, RoundLate(1, 0, [3]))
        grants += zip(peers(effects, Grant), sent(effects, Grant), strict=True)
    assert (WORKERS[0], Grant(0, [3])) in grants


# ---- norms ---------------------------------------------------------------------------------------


def test_a_norm_is_decided_once_with_every_shard_and_again_for_who_asks_again() -> None:
    driver = Driver()
    driver.train()
    shards = len(driver.core.view.tables[0].shards)
    assert shards == 1
    decisions = sent(driver.say(SERVER, NormReport(1, 0, 0, 4, [9.0, 16.0])), NormDecision)
    assert decisions == [NormDecision(0, 4, 5.0)]
    again = sent(driver.say(SERVER, NormReport(1, 0, 0, 4, [9.0, 16.0])), NormDecision)
    assert again == decisions
    assert not sent(driver.say(SERVER, NormReport(1, 0, 0, 3, [1.0])), NormDecision)


# ---- endings -------------------------------------------------------------------------------------


def test_the_job_is_done_when_the_last_worker_leaves_and_one_was() -> None:
    driver = Driver()
    driver.train()
    driver.say(WORKERS[0], Leave(2, Outcome.DONE, ""))
    assert driver.core.phase is Phase.RUNNING
    effects = driver.say(WORKERS[1], Leave(3, Outcome.DRAINED, ""))
    assert driver.core.ending == Stop(Outcome.DONE, "the job is done")
    assert SERVER in peers(effects, Stop)


def test_the_scheduler_halts_once_everybody_has_left() -> None:
    driver = Driver()
    driver.train()
    driver.say(WORKERS[0], Leave(2, Outcome.DONE, ""))
    driver.say(WORKERS[1], Leave(3, Outcome.DONE, ""))
    effects = driver.say(SERVER, Leave(1, Outcome.DONE, ""))
    assert Halt(0, "the job is done") in effects


def test_the_scheduler_does_not_wait_for_ever_for_farewells() -> None:
    driver = Driver()
    driver.train()
    driver.core.handle(0, SchedulerStopAsked(Outcome.DRAINED, "asked"))
    assert driver.core.next_deadline_ns() == 3 * SECOND
    assert Halt(0, "asked") in driver.wait(3 * SECOND)


def test_a_scheduler_that_stays_asks_for_no_time() -> None:
    driver = Driver(replace(LIMITS, is_lingering=True))
    driver.train()
    driver.core.handle(0, SchedulerStopAsked(Outcome.DONE, "asked"))
    assert driver.core.next_deadline_ns() is None
    assert not [effect for effect in driver.wait(60 * SECOND) if isinstance(effect, Halt)]


def test_a_done_worker_that_was_given_up_in_the_meantime_still_ends_the_job() -> None:
    driver = Driver()
    driver.train()
    driver.pass_time(3, 1)
    driver.say(WORKERS[0], Leave(2, Outcome.DONE, ""))
    assert driver.core.ending == Stop(Outcome.DONE, "the job is done")


def test_a_job_without_workers_waits_for_one_and_then_fails() -> None:
    driver = Driver()
    driver.train()
    driver.pass_time(4, 1)
    assert driver.core.phase is Phase.RUNNING
    driver.pass_time(5, 1)
    assert driver.core.ending == Stop(
        Outcome.FAILED, "no worker is left and none came back within 5 s"
    )


def test_a_worker_that_comes_back_in_time_keeps_the_job_alive() -> None:
    driver = Driver()
    driver.train()
    driver.pass_time(3, 1)
    driver.register(WORKERS[2], Role.WORKER, 109)
    driver.pass_time(9, 1, 4)
    assert driver.core.phase is Phase.RUNNING
    assert driver.leases.workers == [4, 4, 4, 4]


def test_the_last_worker_that_fails_fails_the_job_unless_it_is_started_again() -> None:
    for is_restarting, phase in ((False, Phase.ENDED), (True, Phase.RUNNING)):
        driver = Driver(replace(LIMITS, is_restarting=is_restarting))
        driver.train()
        driver.say(WORKERS[0], Leave(2, Outcome.FAILED, "a"))
        driver.say(WORKERS[1], Leave(3, Outcome.FAILED, "b"))
        assert driver.core.phase is phase


def test_a_server_that_falls_silent_takes_its_shards_and_the_job_with_it() -> None:
    driver = Driver()
    driver.train()
    driver.pass_time(11, 2, 3)
    assert driver.core.ending == Stop(
        Outcome.FAILED,
        "server-0 fell silent and its 1 shards with it: no server is left that holds shard 0 of t",
    )


def test_whoever_comes_after_the_end_is_told_of_it() -> None:
    driver = Driver()
    driver.train()
    driver.core.handle(0, SchedulerStopAsked(Outcome.FAILED, "why"))
    assert sent(driver.register(b"new", Role.WORKER, 300), Stop) == [Stop(Outcome.FAILED, "why")]
    assert sent(driver.beat(2), Stop) == [Stop(Outcome.FAILED, "why")]


def test_an_own_loader_that_is_done_may_go_and_one_that_falls_silent_may_not() -> None:
    for outcome, phase in ((Outcome.DONE, Phase.RUNNING), (Outcome.FAILED, Phase.ENDED)):
        driver = Driver()
        driver.form()
        for number in (0, 1):
            driver.say(WORKERS[number], DeclarePlan(2 + number, 2, loader(2)))
        driver.beat(2, round_=4)
        driver.beat(3, round_=5)
        driver.say(WORKERS[0], Leave(2, outcome, ""))
        assert driver.core.phase is phase


def test_a_round_that_lacks_an_own_loader_which_is_done_ends_the_job() -> None:
    driver = Driver()
    driver.form()
    for number in (0, 1):
        driver.say(WORKERS[number], DeclarePlan(2 + number, 2, loader(2)))
    driver.beat(2, round_=5)
    driver.say(WORKERS[0], Leave(2, Outcome.DONE, ""))
    driver.say(SERVER, RoundLate(1, 4, [0]))
    assert driver.core.phase is Phase.RUNNING
    driver.say(SERVER, RoundLate(1, 5, [0]))
    assert driver.core.ending is not None
    assert "round 5 lacks slot 0 of worker-0, which is done" in driver.core.ending.text


def test_own_loaders_that_lost_a_worker_before_they_began_take_the_next_one() -> None:
    driver = Driver()
    driver.form()
    driver.say(WORKERS[1], Leave(3, Outcome.FAILED, ""))
    driver.say(WORKERS[0], DeclarePlan(2, 2, loader(2)))
    driver.register(WORKERS[2], Role.WORKER, 103)
    assert driver.leases.workers == [2, 4]
