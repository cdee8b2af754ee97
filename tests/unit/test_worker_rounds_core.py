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
from treefold.wire.messages import (
    Accepted,
    Flush,
    Grant,
    PartMissing,
    Pull,
    Push,
    RoundMeta,
    RoundStatus,
)
from treefold.worker.effects import (
    Contributed,
    DrainAsked,
    FoldPayloads,
    LoopCalled,
    LoopEnd,
    ReleasePayload,
    SlotFinished,
    SlotMeta,
    Task,
    TaskCalled,
)


@pytest.fixture(autouse=True)
def _tiny_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four elements make a part of one block."""
    monkeypatch.setattr(layout, "BLOCK_ELEMENTS", 4)
    monkeypatch.setattr(layout, "PART_BLOCKS_MAX", 1)


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
