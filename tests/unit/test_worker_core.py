"""The worker's decisions: events in, effects out."""

import msgspec
import pytest
from msgspec.structs import replace

from tests.unit.worker_driver import (
    ME,
    OTHER,
    SECOND,
    SERVER,
    Driver,
    completed,
    failed,
    plan,
    sent,
    snapshots,
    table_spec,
)
from treefold.common import errors, layout
from treefold.wire.exchange import Send, Tick
from treefold.wire.membership import MS, Standing
from treefold.wire.messages import (
    Accepted,
    DeclareTable,
    Fenced,
    Heartbeat,
    Leave,
    PartMissing,
    Pull,
    Push,
    Refused,
    Register,
    RoundStatus,
    Stop,
)
from treefold.wire.words import Code, Outcome, Phase
from treefold.worker.effects import (
    Complete,
    Connect,
    DeclareCalled,
    Disconnect,
    Initial,
    JoinCalled,
    LeaveCalled,
    LoopEnd,
    ReleasePayload,
    Snapshot,
    Task,
    TaskCalled,
)


@pytest.fixture(autouse=True)
def _tiny_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four elements make a part of one block."""
    monkeypatch.setattr(layout, "BLOCK_ELEMENTS", 4)
    monkeypatch.setattr(layout, "PART_BLOCKS_MAX", 1)


# ---- becoming a member ---------------------------------------------------------------------------


@pytest.mark.parametrize("is_view_first", [True, False])
def test_a_join_ends_with_name_and_running_cluster_in_either_order(is_view_first: bool) -> None:
    driver = Driver()
    driver.call(JoinCalled)
    if is_view_first:
        effects = [driver.control(driver.view([])), driver.join()]
    else:
        effects = [driver.join(), driver.control(driver.view([]))]
    assert [completed(found) for found in effects] == [[], [None]]


def test_a_worker_that_nobody_answers_is_told_so() -> None:
    driver = Driver()
    driver.call(JoinCalled)
    (error,) = failed(driver.wait(16 * SECOND))
    assert isinstance(error, errors.SchedulerLostError)


def test_a_refused_worker_gets_the_reason_as_its_error() -> None:
    driver = Driver()
    driver.call(JoinCalled)
    (error,) = failed(driver.control(Refused(0, Code.PROTOCOL_VERSION, "speak 1")))
    assert isinstance(error, errors.RemoteProtocolError)
    assert str(error) == "speak 1"
    assert failed(driver.call(TaskCalled)[1]) == [error]


def test_a_fenced_worker_registers_anew_and_goes_on_under_another_name() -> None:
    driver = Driver()
    driver.declare()
    assert sent(driver.control(Fenced(ME)), Register)
    effects = driver.join(incarnation=8)
    assert [m.incarnation for m in sent(effects, DeclareTable) if isinstance(m, DeclareTable)] == [
        8
    ]
    assert driver.core.membership.origin == ME


def test_tables_are_declared_again_until_the_scheduler_has_heard_it() -> None:
    driver = Driver()
    driver.declare()
    driver.control(Fenced(ME))
    driver.join(incarnation=8)
    (again,) = sent(driver.wait(600 * MS), DeclareTable)
    assert isinstance(again, DeclareTable)
    driver.control(Accepted(again.call, 0))
    assert not sent(driver.wait(600 * MS), DeclareTable)


def test_a_table_announced_under_another_name_is_not_handed_over_again() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([OTHER])
    driver.control(Fenced(ME))
    (again,) = sent(driver.join(incarnation=8), DeclareTable)
    assert isinstance(again, DeclareTable)
    effects = driver.control(Accepted(again.call, 0))
    assert sent(effects, Pull) == []
    assert not [value for value in completed(driver.pulled(0, 0, 1)) if isinstance(value, Snapshot)]


def test_a_worker_says_farewell_until_it_is_answered() -> None:
    driver = Driver()
    driver.declare()
    call, effects = driver.call(LeaveCalled, Outcome.DONE, "")
    assert sent(effects, Leave) == [Leave(ME, Outcome.DONE, "")]
    assert sent(driver.wait(300 * MS), Leave)
    assert Complete(call, None) in driver.control(Stop(Outcome.DONE, "you have left"))


def test_a_worker_tells_its_last_round_before_it_leaves() -> None:
    driver = Driver()
    driver.declare(version=4)
    driver.core.membership.vitals.round = 4
    _, effects = driver.call(LeaveCalled, Outcome.DONE, "")
    kinds = [type(e.message) for e in effects if isinstance(e, Send)]
    assert kinds == [Heartbeat, Leave]


def test_a_worker_that_was_given_up_says_farewell_under_its_old_name() -> None:
    driver = Driver()
    driver.declare()
    driver.control(Fenced(ME))
    _, effects = driver.call(LeaveCalled, Outcome.DONE, "")
    assert sent(effects, Leave) == [Leave(ME, Outcome.DONE, "")]
    assert driver.core.membership.standing is Standing.LEAVING


def test_a_farewell_that_nobody_answers_ends_after_some_seconds() -> None:
    driver = Driver()
    driver.declare()
    call, _ = driver.call(LeaveCalled, Outcome.DONE, "")
    assert Complete(call, None) in driver.wait(4 * SECOND)


def test_the_end_of_the_job_reaches_every_call() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([OTHER])
    effects = driver.control(Stop(Outcome.FAILED, "server-0 fell silent"))
    (error,) = failed(effects)
    assert isinstance(error, errors.JobFailedError)
    assert sent(effects, Leave) == [Leave(ME, Outcome.FAILED, "")]
    assert failed(driver.call(TaskCalled)[1]) == [error]


def test_servers_that_only_a_view_of_an_ended_job_names_are_not_asked() -> None:
    driver = Driver()
    driver.join()
    call, _ = driver.call(DeclareCalled, table_spec("t0"))
    driver.control(Accepted(call, 0))
    last = msgspec.structs.replace(driver.view([]), phase=Phase.ENDED, members=[])
    assert sent(driver.control(last), Pull) == []
    assert sent(driver.control(driver.view([])), Pull) != []


def test_a_cluster_that_did_not_form_is_an_error_of_its_own() -> None:
    driver = Driver()
    driver.call(JoinCalled)
    (error,) = failed(driver.control(Stop(Outcome.NOT_FORMED, "missing: worker-1")))
    assert isinstance(error, errors.FormationError)


def test_a_declaration_does_not_wait_for_ever_for_a_scheduler_that_is_gone() -> None:
    driver = Driver()
    driver.join()
    driver.call(DeclareCalled, table_spec("t0"))
    (error,) = failed(driver.wait(11 * SECOND))
    assert isinstance(error, errors.SchedulerLostError)


def test_what_was_pulled_is_released_when_nothing_can_go_on() -> None:
    driver = Driver(shards=(2,))
    driver.declare()
    driver.enter([OTHER])
    driver.pulled(0, 0, 1)
    effects = driver.control(Stop(Outcome.FAILED, "why"))
    assert ReleasePayload(3) in effects


# ---- tables --------------------------------------------------------------------------------------


def test_a_server_is_connected_to_once() -> None:
    driver = Driver()
    driver.join()
    connects = [driver.control(driver.view([])) for _ in range(2)]
    assert [[e for e in found if isinstance(e, Connect)] for found in connects] == [
        [Connect(SERVER, "address")],
        [],
    ]


def test_the_link_to_a_server_is_closed_when_it_is_gone_and_leads_no_shard() -> None:
    driver = Driver()
    driver.join()
    view = driver.control(driver.view([]))
    assert Connect(SERVER, "address") in view
    gone = replace(driver.view([]), members=[])
    assert Disconnect(SERVER) not in driver.control(gone), "its shard is not led by another yet"
    gone = replace(driver.view([]), members=[], tables=[])
    assert Disconnect(SERVER) in driver.control(gone)


def test_a_declared_table_is_pulled_and_handed_over_in_one_version() -> None:
    driver = Driver(shards=(2,))
    driver.join()
    driver.control(driver.view([]))
    call, _ = driver.call(DeclareCalled, table_spec("t0", 8))
    pulls = sent(driver.control(Accepted(call, 0)), Pull)
    assert [(p.shard, p.version, p.attempt) for p in pulls if isinstance(p, Pull)] == [
        (0, 0, 1),
        (1, 0, 1),
    ]
    assert not completed(driver.pulled(0, 0, 7))
    (snapshot,) = completed(driver.pulled(0, 1, 7))
    assert isinstance(snapshot, Snapshot)
    assert (snapshot.version, snapshot.state, snapshot.payloads) == (7, b"s7", [1, 2])


def test_the_initializer_uploads_what_a_server_lacks() -> None:
    driver = Driver()
    driver.join()
    driver.control(driver.view([]))
    call, _ = driver.call(DeclareCalled, table_spec("t0"))
    driver.control(Accepted(call, 0))
    status = RoundStatus(0, 0, -1, [PartMissing(0, [])], is_meta_missing=False)
    (effect,) = [e for e in driver.server(status) if isinstance(e, Send)]
    assert effect.payload == Initial(0, [(0, 4)])
    assert isinstance(effect.message, Push)
    assert effect.message.round == -1


def test_a_shard_that_lags_is_asked_for_the_newest_version() -> None:
    driver = Driver(shards=(2,))
    driver.join()
    driver.control(driver.view([]))
    call, _ = driver.call(DeclareCalled, table_spec("t0", 8))
    driver.control(Accepted(call, 0))
    driver.pulled(0, 0, 6)
    effects = driver.pulled(0, 1, 5)
    assert [(p.shard, p.version) for p in sent(effects, Pull) if isinstance(p, Pull)] == [(1, 6)]
    assert ReleasePayload(2) in effects


def test_a_newcomer_begins_with_a_version_before_a_round_that_nobody_computes() -> None:
    driver = Driver(shards=(2,))
    driver.join()
    driver.control(driver.view([]))
    call, _ = driver.call(DeclareCalled, table_spec("t0", 8))
    driver.control(Accepted(call, 0))
    driver.pulled(0, 0, 6)
    driver.pulled(0, 1, 5)
    driver.wait(100 * MS)
    driver.server(RoundStatus(0, 1, 5, [PartMissing(0, [])], is_meta_missing=True))
    pulls = sent(driver.wait(400 * MS), Pull)
    assert {(p.shard, p.version) for p in pulls if isinstance(p, Pull)} >= {(0, 5), (1, 5)}
    driver.pulled(0, 0, 5)
    (snapshot,) = completed(driver.pulled(0, 1, 5))
    assert isinstance(snapshot, Snapshot)
    assert snapshot.version == 5


def test_tables_of_two_versions_are_brought_to_one_before_anything_is_computed() -> None:
    driver = Driver(shards=(1, 1))
    driver.join()
    driver.control(driver.view([]))
    for table, version in ((0, 3), (1, 4)):
        call, _ = driver.call(DeclareCalled, table_spec(f"t{table}"))
        driver.control(Accepted(call, table))
        driver.pulled(table, 0, version)
    assert not completed(driver.enter([ME, ME], plan(rounds=4, slots=2)))[1:]
    driver.pulled(0, 0, 4)
    (end,) = completed(driver.pulled(1, 0, 4))
    assert isinstance(end, LoopEnd)
    assert [(s.table, s.version) for s in end.snapshots] == [(0, 4), (1, 4)]


def test_a_loop_does_not_end_on_tables_that_differ() -> None:
    driver = Driver(shards=(1, 1))
    driver.join()
    driver.control(driver.view([]))
    for table, version in ((0, 3), (1, 4)):
        call, _ = driver.call(DeclareCalled, table_spec(f"t{table}"))
        driver.control(Accepted(call, table))
        driver.pulled(table, 0, version)
    driver.enter([ME, ME], plan(rounds=4, slots=2))
    driver.pulled(0, 0, 6)
    assert not completed(driver.pulled(1, 0, 7))


# ---- versions part by part -----------------------------------------------------------------------


@pytest.mark.parametrize("is_word_first", [True, False])
def test_a_version_is_here_with_all_parts_and_its_word_in_either_order(is_word_first: bool) -> None:
    driver = Driver(parts=3)
    driver.declare()
    driver.enter([OTHER])
    if is_word_first:
        found = [driver.published(0, 0, 1), driver.run(0, 0, 1, 2, 1), driver.run(0, 0, 1, 0, 2)]
    else:
        found = [driver.run(0, 0, 1, 1, 2), driver.run(0, 0, 1, 0, 1), driver.published(0, 0, 1)]
    assert [len(completed(effects)) for effects in found] == [0, 0, 1]
    assert b"s1" in [s.state for s in snapshots(found[-1])]


def test_word_of_another_version_is_not_word_of_the_one_that_is_here() -> None:
    driver = Driver()
    driver.declare(version=3)
    driver.enter([OTHER])
    driver.run(0, 0, 4, 0, 1)
    assert not completed(driver.published(0, 0, 3))
    assert completed(driver.published(0, 0, 4))


def test_word_of_a_newer_version_lets_go_of_the_parts_of_an_older_one() -> None:
    driver = Driver(parts=2)
    driver.declare()
    driver.enter([OTHER])
    driver.run(0, 0, 1, 0, 2)
    effects = driver.published(0, 0, 2)
    assert [ReleasePayload(3), ReleasePayload(4)] == [
        e for e in effects if isinstance(e, ReleasePayload)
    ]
    assert [s.version for s in snapshots(driver.run(0, 0, 2, 0, 2))] == [2]


def test_parts_that_are_here_are_not_asked_for_again() -> None:
    driver = Driver(parts=3)
    driver.declare()
    driver.enter([OTHER])
    driver.run(0, 0, 1, 1, 1)
    pulls = sent(driver.wait(200 * MS), Pull)
    assert [p.parts for p in pulls if isinstance(p, Pull)] == [[0, 2]]


def test_word_that_was_lost_is_asked_for_with_one_part() -> None:
    driver = Driver(parts=3)
    driver.declare()
    driver.enter([OTHER])
    driver.run(0, 0, 1, 0, 3)
    pulls = sent(driver.wait(200 * MS), Pull)
    assert [p.parts for p in pulls if isinstance(p, Pull)] == [[0]]
    assert ReleasePayload(7) in driver.run(0, 0, 1, 0, 1)
    assert completed(driver.published(0, 0, 1))


def test_parts_that_come_twice_are_kept_once() -> None:
    driver = Driver(parts=2)
    driver.declare()
    driver.enter([OTHER])
    driver.run(0, 0, 1, 0, 1)
    effects = driver.run(0, 0, 1, 0, 2)
    assert [e for e in effects if isinstance(e, ReleasePayload)] == [ReleasePayload(4)]


def test_a_run_that_ends_beyond_the_shard_is_let_go() -> None:
    driver = Driver(parts=2)
    driver.declare()
    driver.enter([OTHER])
    assert driver.run(0, 0, 1, 1, 2) == [ReleasePayload(3), ReleasePayload(4)]


def test_a_version_that_was_overwritten_while_it_was_read_is_followed_by_the_newest() -> None:
    driver = Driver(shards=(2,))
    driver.declare(version=4)
    driver.enter([ME])
    _, effects = driver.call(TaskCalled, True)
    assert not completed(effects)
    pulls = sent(effects, Pull)
    assert [(p.shard, p.version) for p in pulls if isinstance(p, Pull)] == [(0, 4), (1, 4)]
    driver.pulled(0, 0, 6)
    (task,) = completed(driver.pulled(0, 1, 6))
    assert isinstance(task, Task)
    assert (task.round, [s.version for s in task.snapshots]) == (6, [6])


def test_a_first_version_that_was_overwritten_is_declared_anew() -> None:
    driver = Driver()
    driver.declare(version=4)
    call, _ = driver.call(DeclareCalled, table_spec("t0"))
    assert sent(driver.control(Accepted(call, 0)), Pull)
    assert [s.version for s in snapshots(driver.pulled(0, 0, 6))] == [6]
    assert driver.core.position == 6


# ---- waiting -------------------------------------------------------------------------------------


def test_a_task_is_not_waited_for_without_end_when_no_server_answers() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([OTHER])
    (error,) = failed(driver.wait(11 * SECOND))
    assert isinstance(error, errors.UnavailableError)
    assert "no server answered for 10 s" in str(error)


def test_a_pause_of_the_script_is_no_silence_of_servers() -> None:
    driver = Driver()
    driver.declare()
    driver.wait(60 * SECOND)
    driver.enter([OTHER])
    assert not failed(driver.wait(5 * SECOND))


def test_time_in_which_a_worker_was_stopped_is_no_silence_of_others() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([OTHER])
    driver.now_ns += 60 * SECOND
    assert not failed(driver.feed(Tick()))


def test_a_slot_that_was_held_up_says_little_of_how_long_the_next_one_takes() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([ME, ME])
    driver.wait(100 * MS)
    driver.contribute(0, 0)
    driver.wait(20 * SECOND)
    driver.contribute(0, 1)
    assert driver.core.membership.vitals.slot_time_ns == 100 * MS


def test_a_worker_that_has_become_slower_is_known_as_such_a_few_slots_later() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([ME])
    told = []
    for round_, took_ms in enumerate([100] * 7 + [400] * 4):
        driver.wait(took_ms * MS)
        driver.contribute(round_, 0)
        driver.pulled(0, 0, round_ + 1)
        told.append(driver.core.membership.vitals.slot_time_ns // MS)
    assert told[6:] == [100, 100, 100, 100, 400]


def test_a_worker_says_in_its_heartbeat_what_it_waits_for() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([OTHER])
    driver.server(RoundStatus(0, 0, 0, [PartMissing(0, [2])], is_meta_missing=False))
    beats = sent(driver.wait(600 * MS), Heartbeat)
    assert isinstance(beats[-1], Heartbeat)
    assert beats[-1].waiting == (
        "version 1 of table t0 shard 0 from server-0, which lacks slots 2 of round 0"
    )
    driver.server(RoundStatus(0, 0, 0, [], is_meta_missing=False))
    beats = sent(driver.wait(600 * MS), Heartbeat)
    assert isinstance(beats[-1], Heartbeat)
    assert beats[-1].waiting.endswith("which has all of round 0 and waits for its chain")


def test_a_silent_scheduler_stops_no_training() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([OTHER])
    for version in range(1, 8):
        driver.wait(5 * SECOND)
        assert not failed(driver.pulled(0, 0, version))
        driver.call(TaskCalled)
