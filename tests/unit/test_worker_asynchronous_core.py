"""A worker's decisions about asynchronous tables: which slot is next, what is asked for."""

import math

import msgspec
import pytest
from msgspec.structs import replace

from tests.unit import worker_driver
from tests.unit.worker_driver import (
    ME,
    OTHER,
    Driver,
    completed,
    failed,
    plan,
    sent,
    table_spec,
)
from treefold.common.round_state import Applied
from treefold.common.spec import Consistency, ConsistencyKind, TableSpec
from treefold.wire.messages import PartMissing, Published, Pull, RoundStatus, Stop
from treefold.wire.words import Need, Outcome
from treefold.worker.aligned import TRIES_MAX
from treefold.worker.effects import (
    Aligned,
    AlignedCalled,
    DrainAsked,
    Effect,
    LoopEnd,
    Task,
)

ASYNC = Consistency(ConsistencyKind.ASYNC)


@pytest.fixture(autouse=True)
def _asynchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are asynchronous."""

    def spec(name: str, elements: int = 4) -> TableSpec:
        return replace(table_spec(name, elements), consistency=ASYNC)

    monkeypatch.setattr(worker_driver, "table_spec", spec)


def arrive(driver: Driver, version: int, clocks: list[int]) -> list[Effect]:
    """A version of the only shard arrives, with what is in it."""
    state = msgspec.msgpack.encode(Applied(clocks, (0, 0, ME), max(clocks) - 1, b"state"))
    effects = driver.run(0, 0, version, 0, 1)
    return effects + driver.server(Published(0, 0, version, state, math.nan))


def asked(effects: list[Effect]) -> list[Need | None]:
    """What must be in the versions that are asked for."""
    return [pull.need for pull in sent(effects, Pull) if isinstance(pull, Pull)]


def test_who_ends_a_pass_asks_for_its_end_so_that_servers_save_it() -> None:
    driver = Driver()
    driver.declare()
    assert completed(driver.enter([ME, ME], plan(rounds=1, slots=2))) == [Task(0, 0, [])]
    assert asked(driver.contribute(0, 0)) == [Need(0, 1)]
    (task,) = completed(arrive(driver, 1, [1]))
    assert isinstance(task, Task)
    assert (task.round, task.slot) == (0, 1)
    assert asked(driver.contribute(0, 1)) == [Need(1, 1, 0, 2, 2)]
    (end,) = completed(arrive(driver, 2, [1, 1]))
    assert isinstance(end, LoopEnd)
    assert [(snapshot.version, snapshot.front) for snapshot in end.snapshots] == [(2, 0)]


def test_who_hears_that_others_have_ended_the_pass_asks_for_its_end_too() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([ME, ME], plan(rounds=1, slots=2))
    driver.contribute(0, 0)
    effects = arrive(driver, 2, [1, 1])
    assert completed(effects) == []
    assert asked(effects) == [Need(0, 0, 0, 2, 2)]
    (end,) = completed(arrive(driver, 2, [1, 1]))
    assert isinstance(end, LoopEnd)


def test_who_has_nothing_left_asks_for_the_end_of_the_pass_once() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([ME, OTHER], plan(rounds=1, slots=2))
    assert asked(driver.contribute(0, 0)) == [Need(0, 1, 0, 2, 2)]
    assert completed(arrive(driver, 1, [1])) == []
    (end,) = completed(arrive(driver, 2, [1, 1]))
    assert isinstance(end, LoopEnd)


def test_who_gets_a_slot_while_it_waits_for_the_end_goes_on_when_its_own_is_in() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([ME, OTHER], plan(rounds=1, slots=2))
    driver.contribute(0, 0)
    assert asked(driver.control(driver.view([ME, ME]))) == [Need(0, 1)]
    (task,) = completed(arrive(driver, 1, [1]))
    assert isinstance(task, Task)
    assert (task.round, task.slot) == (0, 1)


def test_who_drains_waits_for_its_own_contribution_alone() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([ME, OTHER], plan(rounds=1, slots=2))
    driver.contribute(0, 0)
    assert asked(driver.feed(DrainAsked())) == [Need(0, 1)]
    (end,) = completed(arrive(driver, 1, [1]))
    assert isinstance(end, LoopEnd)
    assert end.is_draining


def too_stale(shard: int, slot: int) -> RoundStatus:
    """A shard does not want a contribution to round 0."""
    missing = [PartMissing(0, [slot])]
    return RoundStatus(0, shard, 0, missing, is_meta_missing=False, is_stale=True)


def test_what_one_shard_does_not_want_is_computed_again_when_the_other_one_has_it() -> None:
    driver = Driver(shards=(2,))
    driver.declare()
    driver.enter([ME, OTHER], plan(rounds=1, slots=2))
    assert asked(driver.contribute(0, 0)) == [Need(0, 1, 0, 2, 2)] * 2
    effects = driver.server(too_stale(1, 0))
    assert asked(effects) == [Need(0, 1), None], "others may wait for this one at the pass's end"
    assert asked(driver.server(too_stale(1, 0))) == [], "it is told twice"
    assert completed(driver.pulled(0, 1, 3)) == []
    state = msgspec.msgpack.encode(Applied([1], (0, 0, ME), 0, b"state"))
    driver.run(0, 0, 2, 0, 1)
    (task,) = completed(driver.server(Published(0, 0, 2, state, math.nan)))
    assert isinstance(task, Task)
    assert (task.round, task.slot) == (0, 0)
    assert [one.version for one in task.snapshots] == [2]
    assert asked(driver.contribute(0, 0)) == [Need(0, 1, 0, 2, 2)] * 2


def test_word_of_another_contribution_changes_nothing() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([ME, OTHER], plan(rounds=1, slots=2))
    driver.contribute(0, 0)
    assert driver.server(too_stale(0, 1)) == []


def of_shard(driver: Driver, shard: int, version: int, clocks: list[int]) -> list[Effect]:
    """A version of a shard arrives, with what is in it."""
    state = msgspec.msgpack.encode(Applied(clocks, (0, 0, ME), max(clocks) - 1, b"state"))
    effects = driver.run(0, shard, version, 0, 1)
    return effects + driver.server(Published(0, shard, version, state, math.nan))


def test_shards_are_asked_for_what_any_of_them_has_until_all_have_the_same() -> None:
    driver = Driver(shards=(2,))
    driver.declare()
    assert asked(driver.call(AlignedCalled)[1]) == [Need(0, 0)] * 2
    of_shard(driver, 0, 3, [2, 1])
    effects = of_shard(driver, 1, 2, [1, 0, 1])
    assert asked(effects) == [Need(0, 0, exact=[2, 1, 1])] * 2
    of_shard(driver, 0, 4, [2, 1, 1])
    assert asked(of_shard(driver, 1, 5, [2, 1, 2])) == [Need(0, 0, exact=[2, 1, 2])] * 2
    of_shard(driver, 0, 5, [2, 1, 2])
    (found,) = completed(of_shard(driver, 1, 5, [2, 1, 2]))
    assert isinstance(found, Aligned)
    assert [(one.table, one.version) for one in found.snapshots] == [(0, 5)]


def test_who_waits_for_its_own_contribution_reads_nothing_else() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([ME, OTHER], plan(rounds=1, slots=2))
    driver.contribute(0, 0)
    (error,) = failed(driver.call(AlignedCalled)[1])
    assert "is read between two loops" in str(error)


def test_a_read_is_answered_when_the_job_ends_meanwhile() -> None:
    driver = Driver(shards=(2,))
    driver.declare()
    driver.call(AlignedCalled)
    (error,) = failed(driver.control(Stop(Outcome.FAILED, "the job has ended")))
    assert "the job has ended" in str(error)


def test_a_read_that_never_comes_to_an_end_fails_with_what_to_do() -> None:
    driver = Driver(shards=(2,))
    driver.declare()
    driver.call(AlignedCalled)
    effects: list[Effect] = []
    for number in range(TRIES_MAX + 1):
        of_shard(driver, 0, 2 * number + 1, [number + 1])
        effects = of_shard(driver, 1, 2 * number + 1, [number + 2])
    (error,) = failed(effects)
    assert f"after {TRIES_MAX} tries" in str(error)
    assert completed(driver.enter([ME, ME], plan(rounds=1, slots=2))) != []
