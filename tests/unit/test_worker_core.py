"""The worker's decisions: events in, effects out."""

import itertools
from collections.abc import Iterator

import pytest

from treefold.common import errors, layout
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
from treefold.wire.membership import MS, Identity, Membership, Standing
from treefold.wire.messages import (
    Accepted,
    Code,
    DeclarePlan,
    DeclareTable,
    Fenced,
    Flush,
    Frame,
    Grant,
    Heartbeat,
    HeartbeatSeen,
    Leases,
    Leave,
    Member,
    Outcome,
    PartMissing,
    Phase,
    Pull,
    Pulled,
    Push,
    Refused,
    Register,
    Registered,
    Role,
    RoundMeta,
    RoundStatus,
    ShardPlace,
    Stop,
    TablePlace,
    View,
)
from treefold.worker.core import WorkerCore
from treefold.worker.effects import (
    Complete,
    Connect,
    Contributed,
    DeclareCalled,
    DrainAsked,
    Effect,
    Fail,
    FoldPayloads,
    Initial,
    JoinCalled,
    LeaveCalled,
    LoopCalled,
    LoopEnd,
    ReleasePayload,
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


@pytest.fixture(autouse=True)
def _tiny_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Four elements make a part of one block."""
    monkeypatch.setattr(layout, "BLOCK_ELEMENTS", 4)
    monkeypatch.setattr(layout, "PART_BLOCKS_MAX", 1)
    yield


def plan(rounds: int = 9, slots: int = 4, index: int = 0, first: int = 0) -> LoopPlan:
    """A pass over so many rounds."""
    samples = rounds * slots
    return LoopPlan(PlanKind.SLOTS, index, first, rounds, slots, samples, slots, 0, True, 0)


class Driver:
    """A worker core, with everybody else's part in short.

    Attributes
    ----------
    shards : list of int
        Shards of each table; each has one part.
    """

    def __init__(self, shards: tuple[int, ...] = (1,)) -> None:
        identity = Identity(Role.WORKER, 9, "", "host", 1, "0")
        self.limits = WorkerLimits(15 * SECOND, 100 * MS, 10 * SECOND)
        self.core = WorkerCore(Membership(identity), self.limits)
        self.now_ns = 0
        self.shards = shards
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

    def server(self, message: object, payload: int | None = None) -> list[Effect]:
        """The server sends a message."""
        return self.feed(Received(SERVER, message, payload))  # type: ignore[arg-type]  # any

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
            TablePlace(
                number, f"t{number}", ME, [ShardPlace(n, 2, n, 1, SERVER) for n in range(count)]
            )
            for number, count in enumerate(self.shards)
        ]
        newest, before = Leases(from_round, leases), Leases(0, previous or leases)
        return View(next(self.views), Phase.RUNNING, ME, members, tables, newest, before)

    def join(self, incarnation: int = ME) -> list[Effect]:
        """The scheduler answers the registration."""
        nonce = 9 + self.core.membership.registrations
        return self.control(Registered(nonce, JOB, incarnation, 0, 500, 2_000, 1, 1))

    def call(self, kind: type, *fields: object) -> tuple[int, list[Effect]]:
        """The script makes a call."""
        number = next(self.calls)
        return number, self.feed(kind(number, *fields))

    def pulled(self, table: int, shard: int, version: int) -> list[Effect]:
        """A part of a version arrives."""
        frame = Frame(Dtype.FLOAT32, 4)
        message = Pulled(table, shard, 0, version, b"s%d" % version, float("nan"), frame)
        return self.server(message, next(self.payloads))

    def declare(self, version: int = 0) -> None:
        """Join, and declare every table; all shards are at one version."""
        self.join()
        self.control(self.view([]))
        for table, count in enumerate(self.shards):
            call, _ = self.call(DeclareCalled, table_spec(f"t{table}", 4 * count))
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
            for part in range(count):
                number = 100 * (slot + 1) + 10 * table + part if payload is None else payload
                effects += self.feed(Contributed(table, part, round_, slot, number, b"\0"))
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


def failed(effects: list[Effect]) -> list[Exception]:
    """Errors that calls came to."""
    return [effect.error for effect in effects if isinstance(effect, Fail)]


# ---- becoming a member ---------------------------------------------------------------------------


@pytest.mark.parametrize("is_view_first", [True, False])
def test_a_join_ends_with_name_and_running_cluster_in_either_order(is_view_first: bool) -> None:
    driver = Driver()
    driver.call(JoinCalled)
    steps = [lambda: driver.control(driver.view([])), driver.join]
    effects = [step() for step in (steps if is_view_first else reversed(steps))]
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
    assert sent(driver.wait(600 * MS), DeclareTable)
    driver.control(Accepted(1, 0))
    assert not sent(driver.wait(600 * MS), DeclareTable)


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
    assert effect.payload == Initial(0, 0, 4)
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


# ---- rounds --------------------------------------------------------------------------------------


def test_a_worker_gets_its_leased_slots_one_after_the_other() -> None:
    driver = Driver()
    driver.declare()
    assert completed(driver.enter([ME, OTHER, ME, OTHER])) == [Task(0, 0, [])]
    assert completed(driver.contribute(0, 0)) == [Task(0, 2, [])]
    assert not completed(driver.contribute(0, 2))


def test_leases_that_begin_later_leave_a_round_to_those_before() -> None:
    driver = Driver()
    driver.declare()
    call, _ = driver.call(LoopCalled, plan(slots=2))
    driver.control(Accepted(call, 0))
    driver.control(driver.view([OTHER, OTHER], from_round=3, previous=[OTHER, ME]))
    assert completed(driver.call(TaskCalled)[1]) == [Task(0, 1, [])]


def test_a_whole_subtree_is_folded_here_and_pushed_as_one_node() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([ME, ME, OTHER, OTHER])
    assert nodes(driver.contribute(0, 0)) == []
    effects = driver.contribute(0, 1)
    assert [e for e in effects if isinstance(e, FoldPayloads)] == [FoldPayloads(100, 200)]
    assert nodes(effects) == [(1, 0)]


def test_a_slot_whose_sibling_is_computed_elsewhere_is_pushed_at_once() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([ME, OTHER, ME, OTHER])
    assert nodes(driver.contribute(0, 0)) == [(0, 0)]


def test_a_granted_slot_whose_sibling_was_pushed_is_pushed_as_well() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([ME, OTHER])
    driver.contribute(0, 0)
    assert completed(driver.control(Grant(0, [1]))) == [Task(0, 1, [])]
    assert nodes(driver.contribute(0, 1)) == [(0, 1)]


def test_a_flush_pushes_what_is_held_and_what_comes_afterwards() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([ME, ME, OTHER, OTHER])
    driver.contribute(0, 0)
    assert nodes(driver.control(Flush(0))) == [(0, 0)]
    assert nodes(driver.contribute(0, 1)) == [(0, 1)]


def test_help_for_another_round_is_ignored() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([OTHER, OTHER])
    assert not completed(driver.control(Grant(7, [1])))


def test_a_slot_of_a_dead_worker_is_taken_over_in_the_same_round() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([ME, OTHER])
    driver.contribute(0, 0)
    assert completed(driver.control(driver.view([ME, ME]))) == [Task(0, 1, [])]


def test_what_was_not_contributed_counts_as_absent() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([ME, OTHER])
    effects = driver.feed(SlotFinished(0, 0, {0: SlotMeta(GROUPS, 0.0, b"")}))
    (push,) = sent(effects, Push)
    assert isinstance(push, Push)
    assert (push.frame, push.absent) == (None, b"\1")


def test_only_slot_zero_brings_the_hyper_parameters() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([ME, OTHER, ME, OTHER])
    (meta,) = sent(driver.contribute(0, 0), RoundMeta)
    assert isinstance(meta, RoundMeta)
    assert (meta.groups, meta.state) == (GROUPS, b"state")
    assert not sent(driver.contribute(0, 2), RoundMeta)


def test_the_next_version_releases_what_was_pushed_and_begins_the_next_round() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([ME, OTHER])
    driver.contribute(0, 0)
    effects = driver.pulled(0, 0, 1)
    assert ReleasePayload(100) in effects
    (task,) = completed(effects)
    assert isinstance(task, Task)
    assert (task.round, task.slot, [s.version for s in task.snapshots]) == (1, 0, [1])


def test_a_contribution_to_a_round_that_is_over_is_released() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([ME, OTHER])
    driver.pulled(0, 0, 1)
    assert ReleasePayload(55) in driver.feed(Contributed(0, 0, 0, 0, 55, b"\0"))


def test_a_worker_without_slots_loads_versions_and_asks_again() -> None:
    driver = Driver()
    driver.declare()
    assert not completed(driver.enter([OTHER, OTHER]))
    (task,) = completed(driver.pulled(0, 0, 1))
    assert isinstance(task, Task)
    assert (task.slot, len(task.snapshots)) == (-1, 1)


def test_a_version_that_is_not_answered_is_asked_for_again_and_more_slowly() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([OTHER])
    pulls = sent(driver.wait(SECOND), Pull)
    assert [p.attempt for p in pulls if isinstance(p, Pull)] == [1, 2, 3]


def test_what_a_server_lacks_is_sent_again() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([ME, OTHER])
    driver.contribute(0, 0)
    status = RoundStatus(0, 0, 0, [PartMissing(0, [0, 1])], is_meta_missing=True)
    effects = driver.server(status)
    assert nodes(effects) == [(0, 0)]
    assert sent(effects, RoundMeta)
    others = RoundStatus(0, 0, 0, [PartMissing(0, [1])], is_meta_missing=False)
    assert driver.server(others) == []


def test_the_end_of_a_pass_ends_the_loop_with_the_last_version() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([OTHER], plan(rounds=1, slots=1))
    (end,) = completed(driver.pulled(0, 0, 1))
    assert isinstance(end, LoopEnd)
    assert (end.version, [s.version for s in end.snapshots], end.is_draining) == (1, [1], False)


def test_a_joiner_skips_passes_that_are_over() -> None:
    driver = Driver()
    driver.declare(version=5)
    assert completed(driver.enter([ME], plan(rounds=3, slots=1))) == [LoopEnd(5, [])]
    entered = completed(driver.enter([ME], plan(rounds=4, slots=1, index=1, first=3)))
    assert entered == [Task(5, 0, [])]


def test_a_worker_that_drains_pushes_what_it_has_and_ends_its_loop() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([ME, ME])
    driver.contribute(0, 0)
    driver.feed(DrainAsked())
    effects = driver.contribute(0, 1)
    (end,) = completed(effects)
    assert isinstance(end, LoopEnd)
    assert end.is_draining


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


def test_a_silent_scheduler_stops_no_training() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([OTHER])
    for version in range(1, 8):
        driver.wait(5 * SECOND)
        assert not failed(driver.pulled(0, 0, version))
        driver.call(TaskCalled)


def test_a_plan_is_declared_again_until_it_is_accepted() -> None:
    driver = Driver()
    driver.declare()
    call, effects = driver.call(LoopCalled, plan())
    assert sent(effects, DeclarePlan)
    assert sent(driver.wait(600 * MS), DeclarePlan)
    assert Complete(call, None) in driver.control(Accepted(call, 0))
    driver.control(HeartbeatSeen(ME, 1))
    assert not sent(driver.wait(600 * MS), DeclarePlan)


def test_a_refused_declaration_fails_that_call_and_nothing_else() -> None:
    driver = Driver()
    driver.declare()
    call, _ = driver.call(LoopCalled, plan())
    effects = driver.control(Refused(call, Code.SPEC_MISMATCH, "slots differ"))
    assert [str(error) for error in failed(effects)] == ["slots differ"]
    assert driver.core.failure is None
