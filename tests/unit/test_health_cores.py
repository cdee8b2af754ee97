"""What a server and the scheduler decide about contributions that are looked at."""

import math
from typing import Any

import pytest
from msgspec.structs import replace

from tests.unit.scheduler_driver import SERVER, WORKERS, Driver, plan
from tests.unit.scheduler_driver import SPEC as SCHEDULER_SPEC
from tests.unit.scheduler_driver import sent as told
from tests.unit.server_driver import (
    SPEC,
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
from treefold.common.round_state import decode_watched
from treefold.common.spec import Aggregation, Consistency, ConsistencyKind, Guard, HealthPolicy
from treefold.scheduler.core import SchedulerCore
from treefold.scheduler.effects import Persist
from treefold.scheduler.memory import take_up
from treefold.scheduler.records import decode, encode
from treefold.server.core import ServerCore
from treefold.server.effects import (
    CombinePayloads,
    ComputeProducts,
    Effect,
    FoldPayloads,
    MakeParts,
    ProductsComputed,
    RecordVersion,
    ReleasePayload,
    ScaleParts,
    ScalePayload,
)
from treefold.wire.decisions import HealthDecision, HealthReport, NormReport
from treefold.wire.exchange import Note, Tick
from treefold.wire.membership import MS
from treefold.wire.messages import AssignTable, DeclarePlan, DeclareTable, Pulled, Refused

SLOTS = 3
GUARD = Guard(HealthPolicy.REJECT, warmup=4)
WATCH = Guard(HealthPolicy.WARN, warmup=4)


@pytest.fixture(autouse=True)
def _tiny_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight elements make two parts of one block each."""
    monkeypatch.setattr(layout, "BLOCK_ELEMENTS", 4)
    monkeypatch.setattr(layout, "PART_BLOCKS_MAX", 1)


# ---- the server ----------------------------------------------------------------------------------


def begun(guard: Guard = GUARD) -> ServerCore:
    """A server whose shard has its initial values."""
    core = member()
    control(core, AssignTable(0, replace(SPEC, guard=guard)))
    control(core, view(2))
    for part in (0, 1):
        data(core, push(-1, 0, part=part, active=1), part + 1)
    return core


def measured(core: ServerCore, effects: list[Effect], norm: float = 1.0) -> list[Effect]:
    """Effects, and what follows when everything that they ask to be measured is."""
    found = list(effects)
    for one in of(effects, ComputeProducts):
        assert isinstance(one, ComputeProducts)
        count = len(one.slots) * (len(one.slots) + 1) // 2
        of_part = one.table, one.shard, one.round, one.part, one.slots
        found += measured(core, core.handle(0, ProductsComputed(*of_part, [[norm] * count])))
    return found


def contribute(core: ServerCore, slot: int, round_: int = 0, norm_max: float = 0.0) -> list[Effect]:
    """Send all of a contribution; returns what all of it makes the server do."""
    effects: list[Effect] = []
    for part in (0, 1):
        one = push(round_, slot, part=part, active=SLOTS)
        effects += measured(core, data(core, one, 100 * (round_ + 1) + 10 * slot + part))
    brought = meta(
        round_, norm_max, slot=slot, active=SLOTS, due=SLOTS, samples=1, total=SLOTS,
        state=b"of %d" % slot,
    )  # fmt: skip
    return effects + measured(core, data(core, brought))


def all_of(core: ServerCore, round_: int = 0, norm_max: float = 0.0) -> list[Effect]:
    """Send everything of a round."""
    return [one for slot in range(SLOTS) for one in contribute(core, slot, round_, norm_max)]


def decided(
    core: ServerCore, coefficients: list[float], factor: float = 1.0, round_: int = 0
) -> list[Effect]:
    """The scheduler says what counts."""
    return control(core, HealthDecision(0, round_, coefficients, factor, [0.5, 0.25]))


def test_every_part_is_measured_as_it_comes_and_nothing_is_folded_before_the_decision() -> None:
    core = begun()
    effects = data(core, push(0, 1, part=0, active=SLOTS), 110)
    assert of(effects, ComputeProducts) == [ComputeProducts(0, 0, 0, 0, (1,), (110,))]
    assert not of(effects, FoldPayloads, MakeParts)


def test_what_is_measured_of_a_shard_that_is_closed_by_then_is_let_go() -> None:
    core = begun()
    effects = contribute(core, 0)
    core.shards.clear()
    assert not sent(measured(core, effects), HealthReport)


def test_a_report_has_all_slots_their_senders_and_what_went_with_the_version() -> None:
    core = begun()
    assert not sent([*contribute(core, 1), *contribute(core, 2)], HealthReport)
    (report,) = sent(contribute(core, 0), HealthReport)
    sums = [(1, 0, [2.0, 2.0, 2.0])]
    assert report == HealthReport(3, 0, 0, 0, [5] * 3, [1] * 3, 3, sums, [])
    decided(core, [1.0] * 3)
    (report,) = sent(all_of(core, 1), HealthReport)
    assert isinstance(report, HealthReport)
    assert report.norms == [0.5, 0.25]


def test_with_everything_in_a_round_is_what_it_is_without_a_guard() -> None:
    core = begun()
    all_of(core)
    effects = decided(core, [1.0] * 3)
    assert of(effects, FoldPayloads) == [
        FoldPayloads(left + part, right + part)
        for part in (0, 1)
        for left, right in ((100, 110), (100, 120))
    ]
    assert of(effects, MakeParts)
    assert not of(effects, ScaleParts, ScalePayload, CombinePayloads)


def test_what_is_left_out_is_let_go_and_the_rest_is_a_mean() -> None:
    core = begun()
    all_of(core)
    effects = decided(core, [1.0, 0.0, 1.0], 1.5)
    assert {ReleasePayload(110), ReleasePayload(111)} <= set(of(effects, ReleasePayload))
    assert of(effects, FoldPayloads) == [FoldPayloads(100, 120), FoldPayloads(101, 121)]
    (scaled,) = of(effects, ScaleParts)
    assert isinstance(scaled, ScaleParts)
    assert (scaled.factor, scaled.is_all) == (1.5, True)
    (record,) = of(effects, RecordVersion)
    assert isinstance(record, RecordVersion)
    assert record.contributors == [(0, 0, 5), (0, 2, 5)]
    watched = decode_watched(core.shards[0, 0].kept[1].state)
    assert (watched.norms, watched.record) == ([0.5, 0.25], b"of 0")


def test_a_contribution_is_scaled_before_it_is_folded() -> None:
    core = begun()
    all_of(core)
    effects = decided(core, [1.0, 0.125, 1.0])
    wanted = of(effects, ScalePayload, FoldPayloads)
    assert wanted[:2] == [ScalePayload(0, 0, 0, 110, 0.125, 0.125), FoldPayloads(100, 110)]


@pytest.mark.parametrize(
    ("rule", "counts", "buffers"),
    [
        (Aggregation.MEAN, [1.0, 0.125, 1.0], [1.0]),
        (Aggregation.MEDIAN, [1.0, 0.125, 1.0], [1.0]),
        (Aggregation.KRUM, [0.0, 0.75, 0.0], [3.0]),  # all of its statistics, a third each was sent
        (Aggregation.CENTERED_CLIPPING, [1.5, 0.75, 0.0], [2.0, 1.0]),
    ],
)
def test_a_gradient_is_clipped_and_the_buffers_beside_it_are_a_mean(
    rule: Aggregation, counts: list[float], buffers: list[float]
) -> None:
    core = begun(Guard(HealthPolicy.CLIP, warmup=4, aggregation=rule, iterations=1))
    all_of(core)
    made = decided(core, counts)
    scaled = [one for one in made if isinstance(one, ScalePayload) and one.part == 0]
    assert [one.factor for one in scaled] == [one for one in counts if one not in (0.0, 1.0)]
    assert [one.buffers for one in scaled] == buffers


def test_a_round_of_which_nothing_is_in_is_a_version_all_the_same() -> None:
    core = begun()
    all_of(core)
    effects = decided(core, [0.0] * 3)
    (make, *_) = of(effects, MakeParts)
    assert isinstance(make, MakeParts)
    assert [(part.root, part.absent) for part in make.parts] == [(None, b"\x03"), (None, b"\x01")]
    assert core.shards[0, 0].version == 1
    assert len(of(effects, ReleasePayload)) == 2 * SLOTS
    assert sent(data(core, pull(1)), Pulled)


def test_coordinates_are_made_of_what_is_in_each_as_a_whole_gradient() -> None:
    core = begun(Guard(aggregation=Aggregation.MEDIAN))
    all_of(core)
    effects = decided(core, [1.0, 0.0, 1.0])
    assert of(effects, CombinePayloads) == [
        CombinePayloads([100, 120], [3.0, 3.0], 0, 0),
        CombinePayloads([101, 121], [3.0, 3.0], 0, 0),
    ]
    assert not of(effects, FoldPayloads)
    released = [110, 120, 111, 121]
    assert of(effects, ReleasePayload)[:4] == [ReleasePayload(one) for one in released]
    assert of(effects, MakeParts)


def test_pairs_are_measured_once_everything_is_here() -> None:
    core = begun(Guard(aggregation=Aggregation.KRUM, byzantine=0))
    effects = all_of(core)
    asked = of(effects, ComputeProducts)
    assert asked == [
        ComputeProducts(0, 0, 0, part, (0, 1, 2), (100 + part, 110 + part, 120 + part))
        for part in (0, 1)
    ]
    (report,) = sent(effects, HealthReport)
    assert isinstance(report, HealthReport)
    assert report.sums == [(1, 0, [2.0] * 6)]


def test_a_report_is_repeated_until_there_is_a_decision_and_then_no_more() -> None:
    core = begun()
    all_of(core)
    assert len(sent(core.handle(501 * MS, Tick()), HealthReport)) == 1
    control(core, HealthDecision(0, 0, [1.0] * 3, 1.0, []), 502)
    assert not sent(core.handle(1_600 * MS, Tick()), HealthReport)


def test_a_decision_about_another_round_or_of_other_slots_changes_nothing() -> None:
    core = begun()
    all_of(core)
    assert not of(control(core, HealthDecision(0, 1, [1.0] * 3, 1.0, [])), MakeParts)
    assert not of(control(core, HealthDecision(0, 0, [1.0] * 2, 1.0, [])), MakeParts)
    assert not of(control(core, HealthDecision(1, 0, [1.0] * 3, 1.0, [])), MakeParts)
    assert of(decided(core, [1.0] * 3), MakeParts)


def test_a_limit_for_the_norm_is_that_of_what_counts() -> None:
    core = begun()
    all_of(core, norm_max=1.0)
    effects = decided(core, [1.0, 0.0, 1.0], 1.5)
    assert not of(effects, MakeParts)
    assert core.shards[0, 0].waiting_for().endswith("the global gradient norm")
    assert not sent(effects, NormReport)


def test_where_everything_counts_nothing_waits_and_each_part_is_measured_before_it_is_folded() -> (
    None
):
    core = begun(WATCH)
    asked: list[Effect] = []
    for slot in range(SLOTS):
        for part in (0, 1):
            one = push(0, slot, part=part, active=SLOTS)
            effects = data(core, one, 100 + 10 * slot + part)
            asked += of(effects, ComputeProducts)
            assert asked[-1] == ComputeProducts(0, 0, 0, part, (slot,), (100 + 10 * slot + part,))
            kinds = [type(effect) for effect in effects]
            if FoldPayloads in kinds:
                assert kinds.index(ComputeProducts) < kinds.index(FoldPayloads)
            assert not of(data(core, one, 999), ComputeProducts)
    assert of(data(core, meta(0, active=SLOTS)), RecordVersion)
    effects = []
    for ask in asked:
        assert isinstance(ask, ComputeProducts)
        assert not sent(effects, HealthReport)
        rows = ProductsComputed(ask.table, ask.shard, ask.round, ask.part, ask.slots, [[1.0]])
        effects = core.handle(0, rows)
    sums = [(1, 0, [2.0] * SLOTS)]
    assert sent(effects, HealthReport) == [HealthReport(3, 0, 0, 0, [5] * 3, [], 0, sums, [])]
    assert not core.exchange.guarding._watches[0, 0]


def test_what_was_never_whole_is_not_measured_for_ever() -> None:
    core = begun(WATCH)
    for round_ in range(9):
        for slot in range(SLOTS):
            for part in (0, 1):
                data(core, push(round_, slot, part=part, active=SLOTS), 1_000 * (round_ + 1) + slot)
        data(core, meta(round_, active=SLOTS))
    assert list(core.exchange.guarding._watches[0, 0]) == [7, 8]


def test_the_same_slot_twice_is_measured_and_counted_once() -> None:
    core = begun()
    contribute(core, 1)
    again = contribute(core, 1)
    assert not of(again, ComputeProducts)
    assert of(again, ReleasePayload) == [ReleasePayload(110), ReleasePayload(111)]


# ---- the scheduler -------------------------------------------------------------------------------


def trained(guard: Guard = GUARD, slots: int = SLOTS) -> Driver:
    """Two workers in a pass of three slots, with one table."""
    driver = Driver()
    driver.form()
    spec = replace(SCHEDULER_SPEC, guard=guard)
    for number in range(2):
        driver.say(WORKERS[number], DeclareTable(2 + number, 1, spec))
    for number in range(2):
        driver.say(WORKERS[number], DeclarePlan(2 + number, 2, plan(slots=slots)))
    return driver


def report(round_: int, *squares: float, norms: list[float] | None = None) -> HealthReport:
    """The only shard has gradients of these squared norms; slot 2 is of worker 1."""
    known = [0.0] * 8 if norms is None else norms
    sums = [(0, 0, [square / SLOTS**2 for square in squares])]
    return HealthReport(1, 0, 0, round_, [2, 2, 3], [1] * 3, 3, sums, known)


def test_the_worker_the_slot_and_the_round_are_named() -> None:
    driver = trained()
    effects = driver.say(SERVER, report(7, 1.0, 1.0, 1e6))
    (note,) = [one for one in effects if isinstance(one, Note)]
    assert note.text == (
        "table 't' round 7: slot 2 of worker-1 has a gradient of norm 1e+03, usual are 0.67 to "
        "1.49; left out"
    )
    (decision,) = told(effects, HealthDecision)
    assert isinstance(decision, HealthDecision)
    assert (decision.coefficients, decision.factor) == ([1.0, 1.0, 0.0], 1.5)
    assert decision.norms == pytest.approx([*[0.0] * 10, math.log(1e3)])
    tally = driver.core.health.tallies[0]
    assert (tally.faults, tally.left_out) == ({"worker-1": {"high": 1}}, {"high": 1})


def test_a_gradient_that_is_not_finite_is_named_as_such() -> None:
    driver = trained(Guard(HealthPolicy.SKIP_ROUND))
    effects = driver.say(SERVER, report(0, math.nan, 1.0, 1.0))
    (note,) = [one for one in effects if isinstance(one, Note)]
    expected = "slot 0 of worker-0 has a gradient that is not finite; the round is skipped"
    assert note.text == f"table 't' round 0: {expected}"
    assert driver.core.health.tallies[0].skipped == 1


def test_many_faults_of_one_worker_are_not_as_many_lines() -> None:
    driver = trained()
    notes = 0
    for round_ in range(40):
        effects = driver.say(SERVER, report(round_, 1.0, 1.0, 1e6))
        notes += sum(isinstance(one, Note) for one in effects)
    assert notes == 8 + 2  # the 16th and the 32nd
    assert driver.core.health.tallies[0].faults == {"worker-1": {"high": 40}}


def test_rounds_that_are_too_short_for_a_rule_are_not_as_many_lines() -> None:
    driver = trained(Guard(aggregation=Aggregation.TRIMMED_MEAN, share=0.4), 5)
    effects = [
        one for round_ in range(100) for one in driver.say(SERVER, report(round_, 1.0, 1.0, 1.0))
    ]
    notes = [one.text for one in effects if isinstance(one, Note) and "too few" in one.text]
    rounds = [*range(8), 15, 31, 63]
    assert [text.split(":")[0] for text in notes] == [f"table 't' round {n}" for n in rounds]
    assert notes[-1].endswith("it is skipped (number 64 of this table)")


def seen(round_: int, *squares: float) -> HealthReport:
    """The same of a table in which everything counts as it is."""
    return replace(report(round_, *squares, norms=[]), samples=[], total=0)


def test_where_everything_counts_the_scheduler_says_what_it_found_and_nothing_else() -> None:
    driver = trained(WATCH)
    for round_ in range(2):
        assert not driver.say(SERVER, seen(round_, 1.0, 1.0, 1.0))
    (note,) = driver.say(SERVER, seen(2, 1.0, 1.0, 1e6))
    assert isinstance(note, Note)
    assert note.text.endswith(
        "slot 2 of worker-1 has a gradient of norm 1e+03, usual are 0.67 to 1.49; counted as it is"
    )
    assert not driver.say(SERVER, seen(2, 1.0, 1.0, 1e6))
    assert driver.core.health.tallies[0].faults == {"worker-1": {"high": 1}}
    assert not driver.core.health.decided


def test_a_decision_is_told_again_and_never_made_again() -> None:
    driver = trained()
    (first,) = told(driver.say(SERVER, report(3, 1.0, 1.0, 1e6)), HealthDecision)
    (again,) = told(driver.say(SERVER, report(3, 1.0, 1.0, 1.0)), HealthDecision)
    assert again == first
    assert not told(driver.say(SERVER, report(2, 1.0, 1.0, 1.0)), HealthDecision)


def test_what_was_decided_is_written_down_first_and_another_scheduler_says_the_same() -> None:
    driver = trained()
    effects = driver.say(SERVER, report(3, 1.0, 1.0, 1e6))
    kinds = [type(effect).__name__ for effect in effects]
    assert kinds.index("Persist") < kinds.index("Send")
    records = driver.core.memory.snapshot(driver.core)
    assert any(isinstance(effect, Persist) for effect in effects)
    other = SchedulerCore(driver.core.limits)
    take_up(other, decode(encode(records)))
    assert other.health.decided == driver.core.health.decided


def test_a_way_back_forgets_what_was_decided() -> None:
    driver = trained()
    driver.say(SERVER, report(3, 1.0, 1.0, 1e6))
    driver.core.health.forget()
    (decision,) = told(driver.say(SERVER, report(3, 1.0, 1.0, 1.0)), HealthDecision)
    assert isinstance(decision, HealthDecision)
    assert decision.coefficients == [1.0] * 3


def test_a_report_about_a_table_that_looks_at_nothing_is_passed_over() -> None:
    driver = trained(Guard())
    assert not driver.say(SERVER, report(0, 1.0, 1.0, 1.0))
    assert not driver.say(SERVER, replace(report(0, 1.0, 1.0, 1.0), table=9))


@pytest.mark.parametrize(
    ("guard", "slots", "text"),
    [
        (Guard(aggregation=Aggregation.KRUM, byzantine=1), 4, "krum against 1 needs 5 slots"),
        (
            Guard(aggregation=Aggregation.TRIMMED_MEAN, share=0.2),
            2,
            "a trimmed mean of share=0.2 leaves nothing of 2 slots; take more slots",
        ),
        (Guard(aggregation=Aggregation.KRUM), 129, "krum takes at most 128 slots"),
        (
            Guard(aggregation=Aggregation.CENTERED_CLIPPING, iterations=1),
            129,
            "centered clipping takes at most 128 slots",
        ),
    ],
)
def test_slots_that_a_rule_cannot_have_are_refused_by_name(
    guard: Guard, slots: int, text: str
) -> None:
    driver = Driver()
    driver.form()
    driver.say(WORKERS[0], DeclareTable(2, 1, replace(SCHEDULER_SPEC, guard=guard)))
    (refused,) = told(driver.say(WORKERS[0], DeclarePlan(2, 2, plan(slots=slots))), Refused)
    assert isinstance(refused, Refused)
    assert text in refused.text


def test_a_guard_needs_rounds_that_all_slots_are_in() -> None:
    for kind in (ConsistencyKind.ASYNC, ConsistencyKind.SSP, ConsistencyKind.QUORUM):
        with pytest.raises(Exception, match=r"gradient health and robust aggregation need sync"):
            replace(SCHEDULER_SPEC, guard=GUARD, consistency=Consistency(kind))


@pytest.mark.parametrize(
    "changes",
    [{"samples": [1, 1]}, {"senders": [2, 2]}, {"sums": [(0, 0, [1.0, 1.0])]}],
)
def test_a_report_that_contradicts_itself_is_ignored_and_said(changes: dict[str, Any]) -> None:
    driver = trained()
    wrong = replace(report(0, 1.0, 1.0, 1.0), **changes)
    effects = driver.say(SERVER, wrong)
    (note,) = [one for one in effects if isinstance(one, Note)]
    assert "other numbers than there are slots: ignored" in note.text
    assert told(driver.say(SERVER, report(0, 1.0, 1.0, 1.0)), HealthDecision)
