"""The worker's decisions within a round: events in, effects out."""

import pytest

from tests.unit.worker_driver import (
    GROUPS,
    ME,
    OTHER,
    SECOND,
    Driver,
    completed,
    nodes,
    plan,
    sent,
)
from treefold.common import layout
from treefold.common.spec import Dtype
from treefold.wire.exchange import Send
from treefold.wire.messages import (
    Accepted,
    Flush,
    Grant,
    PartMissing,
    Pull,
    Push,
    RoundHyper,
    RoundMeta,
    RoundStatus,
)
from treefold.worker import sending
from treefold.worker.effects import (
    Contributed,
    DrainAsked,
    Effect,
    FoldPayloads,
    HyperKnown,
    LoopCalled,
    LoopEnd,
    ReleasePayload,
    SlotFinished,
    SlotMeta,
    Task,
    TaskCalled,
)
from treefold.worker.pulls import PartRange
from treefold.worker.rounds import runs


@pytest.fixture(autouse=True)
def _tiny_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four elements make a part of one block."""
    monkeypatch.setattr(layout, "BLOCK_ELEMENTS", 4)
    monkeypatch.setattr(layout, "PART_BLOCKS_MAX", 1)


# ---- rounds --------------------------------------------------------------------------------------


def test_a_worker_gets_its_leased_slots_one_after_the_other() -> None:
    driver = Driver()
    driver.declare()
    assert completed(driver.enter([ME, OTHER, ME, OTHER])) == [Task(0, 0, [], is_kept=True)]
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
    assert (push.frame, push.absent) == (None, [b"\1"])


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
    assert ReleasePayload(55) in driver.feed(Contributed(0, 0, 1, 0, 0, (55,), []))


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


# ---- runs of parts -------------------------------------------------------------------------------


def pushes(effects: list[Effect]) -> list[tuple[int, int, int]]:
    """Shard, first part and number of parts of pushes."""
    return [(m.shard, m.part, m.count) for m in sent(effects, Push) if isinstance(m, Push)]


def test_adjacent_parts_of_a_shard_are_pushed_in_one_message() -> None:
    driver = Driver(shards=(2,), parts=2)
    driver.declare()
    driver.enter([ME, OTHER])
    effects = driver.contribute(0, 0)
    assert pushes(effects) == [(0, 0, 2), (1, 0, 2)]
    payloads = [e.payload for e in effects if isinstance(e, Send) and isinstance(e.message, Push)]
    assert payloads == [(100, 101), (102, 103)]


def test_marks_travel_for_all_parts_of_a_run_or_for_none() -> None:
    driver = Driver(parts=2)
    driver.declare()
    driver.enter([ME, OTHER])
    effects = driver.feed(Contributed(0, 0, 2, 0, 0, (7, 8), [b"\0", b"\1"]))
    assert [m.absent for m in sent(effects, Push) if isinstance(m, Push)] == [[b"\0", b"\1"]]


def test_parts_with_and_without_a_gradient_are_pushed_in_two_messages() -> None:
    driver = Driver(parts=3)
    driver.declare()
    driver.enter([ME, OTHER])
    effects = driver.feed(Contributed(0, 0, 2, 0, 0, (7, 8), []))
    effects += driver.feed(Contributed(0, 2, 1, 0, 0, (), [b"\1"]))
    assert pushes(effects) == [(0, 0, 2), (0, 2, 1)]


def test_nodes_of_two_kinds_are_pushed_in_two_messages() -> None:
    driver = Driver(parts=2)
    driver.declare()
    driver.enter([ME, OTHER, OTHER, OTHER])
    driver.feed(Contributed(0, 0, 1, 0, 0, (7,), []))
    driver.control(Grant(0, [1]))
    driver.feed(Contributed(0, 1, 1, 0, 0, (8,), []))
    effects = driver.feed(Contributed(0, 0, 2, 0, 1, (9, 10), []))
    assert nodes(effects) == [(0, 1), (1, 0)]
    assert pushes(effects) == [(0, 0, 1), (0, 1, 1)]


def test_a_part_that_was_contributed_is_released_when_it_comes_again_in_a_run() -> None:
    driver = Driver(parts=2)
    driver.declare()
    driver.enter([ME, OTHER])
    driver.feed(Contributed(0, 1, 1, 0, 0, (7,), []))
    effects = driver.feed(Contributed(0, 0, 2, 0, 0, (8, 9), []))
    assert [e for e in effects if isinstance(e, ReleasePayload)] == [ReleasePayload(9)]
    assert pushes(effects) == [(0, 0, 1)]


def test_what_a_server_lacks_of_adjacent_parts_is_sent_again_in_one_message() -> None:
    driver = Driver(parts=3)
    driver.declare()
    driver.enter([ME, OTHER])
    driver.contribute(0, 0)
    lacking = [PartMissing(1, [0]), PartMissing(2, [0, 1])]
    status = RoundStatus(0, 0, 0, lacking, is_meta_missing=False)
    assert pushes(driver.server(status)) == [(0, 1, 2)]


# ---- hyper-parameters before the end of a slot ---------------------------------------------------


def test_servers_hear_early_of_what_slot_zero_steps_with() -> None:
    driver = Driver(shards=(2,))
    driver.declare()
    driver.enter([ME, OTHER])
    messages = sent(driver.feed(HyperKnown(0, 0, 0, GROUPS, 0.5)), RoundHyper)
    found = [(m.shard, m.groups, m.norm_max) for m in messages if isinstance(m, RoundHyper)]
    assert found == [(0, GROUPS, 0.5), (1, GROUPS, 0.5)]


@pytest.mark.parametrize(("round_", "slot"), [(0, 1), (1, 0)])
def test_what_another_slot_or_round_steps_with_is_told_to_nobody(round_: int, slot: int) -> None:
    driver = Driver()
    driver.declare()
    driver.enter([ME, ME])
    assert driver.feed(HyperKnown(0, round_, slot, GROUPS, 0.5)) == []


def test_hyper_parameters_that_were_lost_are_sent_again() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([ME, OTHER])
    driver.feed(HyperKnown(0, 0, 0, GROUPS, 0.0))
    status = RoundStatus(0, 0, 0, [], is_meta_missing=True)
    assert sent(driver.server(status), RoundHyper)


# ---- what a contribution may stay in -------------------------------------------------------------


def test_a_contribution_is_kept_while_another_slot_is_computed_before_its_sibling() -> None:
    driver = Driver()
    driver.declare()
    (first,) = completed(driver.enter([ME, ME, ME, OTHER]))
    (second,) = completed(driver.contribute(0, 0))
    (third,) = completed(driver.contribute(0, 1))
    tasks = [first, second, third]
    assert [(t.slot, t.is_kept) for t in tasks if isinstance(t, Task)] == [
        (0, True),
        (1, False),
        (2, False),
    ]


def test_initial_values_of_parts_of_two_wire_types_travel_in_two_messages() -> None:
    wires = (Dtype.BFLOAT16, Dtype.BFLOAT16, Dtype.FLOAT32)
    parts = [PartRange(0, n, 4 * n, 4 * n + 4, 1, wire) for n, wire in enumerate(wires)]
    found = runs(parts, sending._is_after)
    assert [[part.number for part in run] for run in found] == [[0, 1], [2]]
