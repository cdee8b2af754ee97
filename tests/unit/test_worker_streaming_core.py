"""A worker's core that lets a slot begin while parts of its version are on their way."""

import math

import pytest

from tests.unit.worker_driver import GROUPS, ME, OTHER, Driver, completed, plan, sent, snapshots
from treefold.common import layout as layouts
from treefold.common.errors import JobFailedError
from treefold.wire.messages import (
    Grant,
    PartMissing,
    Published,
    Pull,
    Push,
    RoundMeta,
    RoundStatus,
    Stop,
)
from treefold.wire.words import Outcome
from treefold.worker.effects import (
    Arrived,
    Contributed,
    Effect,
    LoopEnd,
    ReleasePayload,
    SlotFinished,
    SlotMeta,
    StreamBegun,
    StreamsOver,
    Task,
    TaskCalled,
)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "BLOCK_ELEMENTS", 4)
    monkeypatch.setattr(layouts, "PART_BLOCKS_MAX", 1)


def begun(driver: Driver, version: int) -> list[Effect]:
    """Word arrives that a version has begun."""
    return driver.server(Published(0, 0, version, b"s%d" % version, math.nan, is_whole=False))


def finish(driver: Driver, round_: int, slot: int) -> list[Effect]:
    """The script ends a slot whose three parts it contributed, and asks for the next one."""
    payloads = tuple(100 * (slot + 1) + 10 * round_ + part for part in range(3))
    effects = driver.feed(Contributed(0, 0, 3, round_, slot, payloads, []))
    effects += driver.feed(SlotFinished(round_, slot, {0: SlotMeta(GROUPS, 0.0, b"state")}))
    return effects + driver.call(TaskCalled, False, True)[1]


def streaming(leases: list[int] | None = None) -> Driver:
    """A worker that is done with round 0 of three parts."""
    driver = Driver(parts=3)
    driver.declare()
    driver.enter(leases or [ME, OTHER])
    finish(driver, 0, 0)
    return driver


def arrived(effects: list[Effect]) -> list[int]:
    """Parts that were handed on."""
    return [effect.part for effect in effects if isinstance(effect, Arrived)]


def test_a_slot_begins_when_what_goes_with_its_version_is_known_and_parts_follow() -> None:
    driver = streaming()
    assert completed(driver.run(0, 0, 1, 2, 1)) == []
    effects = begun(driver, 1)
    (task,) = completed(effects)
    assert isinstance(task, Task)
    assert (task.round, task.slot, driver.core.position) == (1, 0, 1)
    (snapshot,) = snapshots(effects)
    assert (snapshot.state, snapshot.payloads, snapshot.is_streaming) == (b"s1", [], True)
    kinds = [type(effect) for effect in effects if isinstance(effect, StreamBegun | Arrived)]
    assert (kinds, arrived(effects)) == ([StreamBegun, Arrived], [2])
    assert arrived(driver.run(0, 0, 1, 0, 2)) == [0, 1]


def test_parts_alone_do_not_begin_a_slot() -> None:
    driver = streaming()
    assert completed(driver.run(0, 0, 1, 0, 3)) == []


def test_nothing_begins_early_for_a_script_that_cannot_wait() -> None:
    driver = Driver(parts=3)
    driver.declare()
    driver.enter([ME, OTHER])
    driver.contribute(0, 0)
    driver.run(0, 0, 1, 0, 2)
    assert completed(begun(driver, 1)) == []


def test_nothing_begins_early_without_a_slot_in_the_next_round() -> None:
    driver = streaming()
    driver.control(driver.view([OTHER, OTHER], from_round=1, previous=[ME, OTHER]))
    assert completed(begun(driver, 1)) == []


def test_the_round_before_is_kept_and_sent_again_until_the_version_is_whole() -> None:
    driver = streaming()
    begun(driver, 1)
    lacking = RoundStatus(0, 0, 0, [PartMissing(1, [0])], is_meta_missing=True)
    effects = driver.server(lacking)
    (push,) = sent(effects, Push)
    assert isinstance(push, Push)
    assert (push.round, push.part) == (0, 1)
    assert len(sent(effects, RoundMeta)) == 1
    released = [e.payload for e in driver.published(0, 0, 1) if isinstance(e, ReleasePayload)]
    assert released == [100, 101, 102]


def test_nothing_of_a_round_is_sent_before_its_version_is_whole() -> None:
    driver = streaming()
    begun(driver, 1)
    effects = finish(driver, 1, 0)
    assert (sent(effects, Push), sent(effects, RoundMeta)) == ([], [])
    effects = driver.published(0, 0, 1)
    assert [push.round for push in sent(effects, Push) if isinstance(push, Push)] == [1]
    assert len(sent(effects, RoundMeta)) == 1


def test_the_version_after_is_asked_for_when_all_parts_are_here() -> None:
    driver = streaming()
    begun(driver, 1)
    driver.run(0, 0, 1, 0, 2)
    assert sent(driver.published(0, 0, 1), Pull) == []
    effects = driver.run(0, 0, 1, 2, 1)
    assert [pull.version for pull in sent(effects, Pull) if isinstance(pull, Pull)] == [2]


def test_only_parts_that_are_missing_are_asked_for_again() -> None:
    driver = streaming()
    begun(driver, 1)
    driver.run(0, 0, 1, 1, 1)
    pulls = [pull for pull in sent(driver.wait(200_000_000), Pull) if isinstance(pull, Pull)]
    assert [pull.parts for pull in pulls][:1] == [[0, 2]]


def test_a_slot_of_the_round_before_is_computed_first_if_others_wait_for_it() -> None:
    driver = streaming()
    begun(driver, 1)
    effects = driver.control(Grant(0, [1]))
    assert StreamsOver() in effects
    assert [pull.version for pull in sent(effects, Pull) if isinstance(pull, Pull)] == [0]
    assert driver.core.position == 0
    assert sent(finish(driver, 1, 0), Push) == []  # the body that does not count any more
    effects = driver.pulled(0, 0, 0)
    assert [t for t in completed(effects) if isinstance(t, Task) and t.slot == 1]
    effects = finish(driver, 0, 1)
    assert [push.round for push in sent(effects, Push) if isinstance(push, Push)] == [0]


def test_a_body_does_not_count_when_servers_have_gone_on() -> None:
    driver = streaming()
    begun(driver, 1)
    effects = driver.run(0, 0, 3, 0, 1)
    assert StreamsOver() in effects
    driver.call(TaskCalled, False, True)
    tasks = [task for task in completed(driver.pulled(0, 0, 3)) if isinstance(task, Task)]
    assert [task.round for task in tasks] == [3]


def test_a_forward_that_waits_hears_that_the_job_failed() -> None:
    driver = streaming()
    begun(driver, 1)
    over = [e for e in driver.control(Stop(Outcome.FAILED, "gone")) if isinstance(e, StreamsOver)]
    assert [type(effect.error) for effect in over] == [JobFailedError]


def test_the_last_version_of_a_pass_is_never_streamed() -> None:
    driver = Driver(parts=3)
    driver.declare()
    driver.enter([ME, OTHER], plan(rounds=1, slots=2))
    finish(driver, 0, 0)
    assert completed(begun(driver, 1)) == []
    (end,) = completed(driver.pulled(0, 0, 1))
    assert isinstance(end, LoopEnd)
    assert not end.snapshots[0].is_streaming
