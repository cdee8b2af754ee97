"""What a server and the scheduler decide about rounds that go on without the last slots."""

import math

import msgspec
import pytest
from msgspec.structs import replace

from tests.unit.scheduler_driver import SERVER, WORKERS, Driver, loader, plan
from tests.unit.scheduler_driver import SPEC as SCHEDULER_SPEC
from tests.unit.scheduler_driver import sent as told
from tests.unit.server_driver import (
    GROUPS,
    JOB,
    ME,
    SECOND,
    SPEC,
    WORKER,
    control,
    data,
    member,
    meta,
    of,
    pull,
    push,
    sent,
    view,
)
from treefold.common import layout
from treefold.common.round_state import Progress, decode_progress
from treefold.common.spec import Consistency, ConsistencyKind, Late
from treefold.server.core import ServerCore
from treefold.server.effects import (
    Effect,
    FoldPayloads,
    MakeParts,
    RecordVersion,
    ReleasePayload,
    ScaleParts,
)
from treefold.wire.chain import ChainRound
from treefold.wire.decisions import QuorumDecision, QuorumReport
from treefold.wire.exchange import Halt, Received, Tick
from treefold.wire.membership import MS
from treefold.wire.messages import AssignTable, DeclarePlan, DeclareTable, Push, Refused, View
from treefold.wire.words import Code, Leases, Phase, ShardPlace, TablePlace

SLOTS = 3
RULE = Consistency(ConsistencyKind.QUORUM, quorum=2, grace=0.5)


@pytest.fixture(autouse=True)
def _tiny_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight elements make two parts of one block each."""
    monkeypatch.setattr(layout, "BLOCK_ELEMENTS", 4)
    monkeypatch.setattr(layout, "PART_BLOCKS_MAX", 1)


# ---- the server ----------------------------------------------------------------------------------


def begun(rule: Consistency = RULE) -> ServerCore:
    """A server whose shard has its initial values."""
    core = member()
    control(core, AssignTable(0, replace(SPEC, consistency=rule)))
    control(core, view(2))
    for part in (0, 1):
        data(core, push(-1, 0, part=part, active=1), part + 1)
    return core


def leaf(round_: int, slot: int, part: int) -> Push:
    """One part of a contribution."""
    return push(round_, slot, part=part, active=SLOTS)


def contribute(core: ServerCore, round_: int, slot: int, **other: object) -> list[Effect]:
    """Send all of a contribution; returns what all of it makes the server do."""
    fields: dict[str, object] = {
        "slot": slot, "active": SLOTS, "due": SLOTS, "first": round_, "samples": 1, "total": SLOTS,
        "state": b"of %d" % slot,
    }  # fmt: skip
    effects: list[Effect] = []
    view_ = other.get("view", 2)
    for part in (0, 1):
        push_ = replace(leaf(round_, slot, part), view=view_)
        effects += data(core, push_, 100 * (round_ + 1) + 10 * slot + part)
    return effects + data(core, meta(round_, 0.0, **{**fields, **other}))


def test_nothing_is_folded_before_it_is_decided_what_is_in() -> None:
    core = begun()
    assert not sent(contribute(core, 0, 1), QuorumReport)
    effects = contribute(core, 0, 2)
    assert sent(effects, QuorumReport) == [QuorumReport(3, 0, 0, 0, [1, 2], SLOTS, 0)]
    assert not of(effects, FoldPayloads, MakeParts)
    effects = control(core, QuorumDecision(0, [1, 2]))
    assert of(effects, FoldPayloads) == [FoldPayloads(110, 120), FoldPayloads(111, 121)]
    (scaled,) = of(effects, ScaleParts)
    assert isinstance(scaled, ScaleParts)
    assert (scaled.factor, scaled.is_all) == (1.5, False)
    (record,) = of(effects, RecordVersion)
    assert isinstance(record, RecordVersion)
    assert record.contributors == [(0, 1, 5), (0, 2, 5)]
    progress = decode_progress(core.shards[0, 0].kept[1].state)
    assert (progress.next, progress.again, progress.missed) == (1, [(0, 0)], 1)
    assert progress.record == b"of 1"


def test_all_slots_count_as_they_are() -> None:
    core = begun()
    for slot in range(SLOTS):
        contribute(core, 0, slot)
    effects = control(core, QuorumDecision(0, [0, 1, 2]))
    assert of(effects, MakeParts)
    assert not of(effects, ScaleParts)


def test_what_is_left_out_is_let_go_and_what_comes_later_is_late() -> None:
    core = begun()
    for slot in range(SLOTS):
        contribute(core, 0, slot)
    effects = control(core, QuorumDecision(0, [0, 2]))
    assert {ReleasePayload(110), ReleasePayload(111)} <= set(of(effects, ReleasePayload))
    late = data(core, leaf(0, 1, 0), 77)
    assert late == [ReleasePayload(77)]
    assert core.exchange.quorum.late == 3


def test_a_slot_that_is_in_and_not_here_is_waited_for() -> None:
    core = begun()
    contribute(core, 0, 0)
    contribute(core, 0, 1)
    assert not of(control(core, QuorumDecision(0, [0, 2])), MakeParts)
    status = core.shards[0, 0].status(64)
    assert [(one.part, one.slots) for one in status.missing] == [(0, [2]), (1, [2])]
    assert of(contribute(core, 0, 2), MakeParts)


def test_a_report_is_repeated_until_there_is_a_decision() -> None:
    core = begun()
    contribute(core, 0, 0)
    contribute(core, 0, 1)
    (again,) = sent(core.handle(501 * MS, Tick()), QuorumReport)
    assert isinstance(again, QuorumReport)
    assert again.slots == [0, 1]
    control(core, QuorumDecision(0, [0, 1]), 502)
    assert not sent(core.handle(1_600 * MS, Tick()), QuorumReport)


def test_dropped_batches_are_not_computed_again() -> None:
    core = begun(replace(RULE, late=Late.DROP))
    contribute(core, 0, 0)
    contribute(core, 0, 1)
    (scaled,) = of(control(core, QuorumDecision(0, [0, 1])), ScaleParts)
    assert isinstance(scaled, ScaleParts)
    assert (scaled.factor, scaled.is_all) == (1.5, True)
    progress = decode_progress(core.shards[0, 0].kept[1].state)
    assert (progress.again, progress.missed) == ([], 1)


def test_sums_and_other_plans_are_refused() -> None:
    core = begun()
    (refused,) = sent(data(core, push(0, 0, active=SLOTS, level=1), 9), Refused)
    assert isinstance(refused, Refused)
    assert refused.code is Code.BAD_NODE
    assert "is not one slot; workers do not fold here" in refused.text
    contribute(core, 0, 0)
    for other, code in (
        ({"due": 2}, Code.SPEC_MISMATCH),
        ({"first": 1}, Code.SPEC_MISMATCH),
        ({"samples": 0}, Code.BAD_NODE),
        ({"due": SLOTS + 1}, Code.BAD_NODE),
    ):
        (refused,) = sent(contribute(core, 0, 1, **other), Refused)
        assert isinstance(refused, Refused)
        assert refused.code is code, other


def led_by(number: int, primary: int, backups: list[int]) -> View:
    """A view in which the chain of the only shard is this one."""
    place = ShardPlace(0, number, 0, 2, primary, number, backups)
    table = TablePlace(0, "t", 5, [place])
    return View(number, Phase.RUNNING, 5, [], [table], Leases(0, []), Leases(0, []))


def test_more_late_batches_than_there_are_are_refused() -> None:
    core = begun()
    (refused,) = sent(contribute(core, 0, 0, is_again=True), Refused)
    assert isinstance(refused, Refused)
    assert "3 late batches are due, and there are 0" in refused.text


def test_who_leads_a_round_once_more_reports_it_once_more() -> None:
    core = begun(replace(RULE, quorum=SLOTS))
    for number, chain in ((3, (ME, [7])), (4, (7, [ME])), (5, (ME, []))):
        control(core, led_by(number, *chain))
        effects: list[Effect] = []
        for slot in range(SLOTS):
            effects += contribute(core, 0, slot, view=number)
        assert len(sent(effects, QuorumReport)) == (chain[0] == ME), number


def test_who_is_promoted_gets_itself_what_it_was_only_told_of() -> None:
    core = begun()
    control(core, led_by(3, 7, [ME]))
    state = msgspec.msgpack.encode(Progress(1, [], 0, b""))
    of_round = (0, 0, 0, SLOTS, GROUPS, 0.0, math.nan, state, None, [(0, 0, 5)], False)
    told_of = ChainRound(JOB, 7, 3, *of_round)
    core.handle(0, Received(7, told_of))
    assert core.shards[0, 0].round is not None
    assert core.shards[0, 0].round.meta is not None, "its end is known, and none of its parts"
    control(core, led_by(4, ME, []))
    effects = [one for slot in range(SLOTS) for one in contribute(core, 0, slot, view=4)]
    assert sent(effects, QuorumReport)


def test_a_server_that_has_all_slots_waits_for_the_scheduler() -> None:
    core = begun()
    contribute(core, 0, 0)
    shard = core.shards[0, 0]
    assert shard.waiting_for().endswith("round 0: slots 1, 2")
    assert shard.status(64).is_meta_missing
    for slot in (1, 2):
        contribute(core, 0, slot)
    assert shard.waiting_for().endswith("round 0: the scheduler to say which slots are in")
    status = shard.status(64)
    assert (status.missing, status.is_meta_missing) == ([], False)


def test_a_server_does_not_wait_for_ever_for_a_scheduler_that_is_gone() -> None:
    core = begun()
    for slot in range(SLOTS):
        contribute(core, 0, slot)
    halts = [
        effect
        for second in range(1, 600)
        for effect in core.handle(second * SECOND, Received(WORKER, pull(1, attempt=second)))
        if isinstance(effect, Halt)
    ]
    assert halts
    assert "the scheduler was not heard for" in halts[0].text


# ---- the scheduler -------------------------------------------------------------------------------


def trained(rule: Consistency = RULE) -> Driver:
    """Two workers in a pass of three slots, with one table."""
    driver = Driver()
    driver.form()
    spec = replace(SCHEDULER_SPEC, consistency=rule)
    for number in range(2):
        driver.say(WORKERS[number], DeclareTable(2 + number, 1, spec))
    for number in range(2):
        driver.say(WORKERS[number], DeclarePlan(2 + number, 2, plan(slots=SLOTS)))
    return driver


def report(driver: Driver, round_: int, slots: list[int], due: int = SLOTS) -> list[object]:
    """The server's only shard has these slots; what is decided."""
    return told(driver.say(SERVER, QuorumReport(1, 0, 0, round_, slots, due)), QuorumDecision)


def test_a_round_is_closed_at_once_when_all_are_there() -> None:
    driver = trained()
    assert report(driver, 0, [0, 2]) == []
    assert report(driver, 0, [0, 1, 2]) == [QuorumDecision(0, [0, 1, 2])]
    assert report(driver, 1, [0], due=1) == [QuorumDecision(1, [0])]


def test_others_are_waited_for_half_as_long_as_it_took_to_get_a_quorum() -> None:
    driver = trained()
    report(driver, 0, [0, 1, 2])
    driver.wait(400 * MS)
    assert report(driver, 1, [0, 1]) == []
    assert told(driver.wait(199 * MS), QuorumDecision) == []
    assert told(driver.wait(1 * MS), QuorumDecision) == [QuorumDecision(1, [0, 1])]
    assert driver.core.quorums.missed == 1


def test_a_decision_is_told_again_and_never_made_again() -> None:
    driver = trained(replace(RULE, grace=0.0))
    assert report(driver, 0, [0, 1]) == []
    driver.wait(1)
    assert report(driver, 0, [0, 1, 2]) == [QuorumDecision(0, [0, 1])]


def test_what_was_decided_is_written_down_before_it_is_said() -> None:
    driver = trained()
    effects = driver.say(SERVER, QuorumReport(1, 0, 0, 0, [0, 1, 2], SLOTS))
    kinds = [type(effect).__name__ for effect in effects]
    assert kinds.index("Persist") < kinds.index("Send")


def test_a_server_that_was_replaced_may_have_less() -> None:
    driver = trained()
    report(driver, 0, [0, 1])
    report(driver, 0, [1])
    assert told(driver.wait(10_000 * MS), QuorumDecision) == []


def test_a_quorum_that_no_round_can_have_is_refused() -> None:
    driver = Driver()
    driver.form()
    spec = replace(SCHEDULER_SPEC, consistency=replace(RULE, quorum=5))
    driver.say(WORKERS[0], DeclareTable(2, 1, spec))
    for one, text in ((plan(), "a quorum of 5 of 4 slots"), (loader(9), "own loaders do not have")):
        (refused,) = told(driver.say(WORKERS[0], DeclarePlan(2, 2, one)), Refused)
        assert isinstance(refused, Refused)
        assert text in refused.text


def test_tables_of_one_job_have_one_quorum() -> None:
    driver = Driver()
    driver.form()
    spec = replace(SCHEDULER_SPEC, consistency=RULE)
    driver.say(WORKERS[0], DeclareTable(2, 1, spec))
    other = msgspec.structs.replace(SCHEDULER_SPEC, name="other")
    (refused,) = told(driver.say(WORKERS[0], DeclareTable(2, 2, other)), Refused)
    assert isinstance(refused, Refused)
    assert "all have the same" in refused.text
    assert len(driver.core.tables) == 1
