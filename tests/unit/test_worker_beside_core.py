"""A worker's decisions where one table has rounds and the other one takes every slot by itself."""

import math
from collections.abc import Callable

import msgspec
import pytest
from msgspec.structs import replace

from tests.unit import worker_driver
from tests.unit.worker_driver import ME, OTHER, SECOND, Driver, completed, nodes, plan, sent
from treefold.common.round_state import Applied
from treefold.common.spec import Consistency, ConsistencyKind, TableSpec
from treefold.wire.messages import PartMissing, Published, Pull, Push, RoundMeta, RoundStatus
from treefold.wire.words import Need
from treefold.worker.effects import Effect, LoopEnd, Task

ROUNDS, APART = 0, 1
BESIDE = Consistency(ConsistencyKind.ASYNC)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Driver]:
    """Makes a worker that has declared both tables, which are at some version."""
    made = worker_driver.table_spec

    def spec(name: str, elements: int = 4) -> TableSpec:
        known = made(name, elements)
        return replace(known, consistency=BESIDE) if name == f"t{APART}" else known

    def declared(version: int) -> Driver:
        driver = Driver(shards=(1, 1))
        driver.declare(version)
        return driver

    monkeypatch.setattr(worker_driver, "table_spec", spec)
    return declared


@pytest.fixture
def driver(make: Callable[[int], Driver]) -> Driver:
    """The same at the beginning."""
    return make(0)


def apart(driver: Driver, version: int, clocks: list[int]) -> list[Effect]:
    """A version of the table without rounds arrives, with what is in it."""
    state = msgspec.msgpack.encode(Applied(clocks, (0, 0, ME), max(clocks) - 1, b"state"))
    effects = driver.run(APART, 0, version, 0, 1)
    return effects + driver.server(Published(APART, 0, version, state, math.nan))


def needs(effects: list[Effect], table: int) -> list[Need | None]:
    """What must be in the versions of a table that are asked for."""
    return [one.need for one in sent(effects, Pull) if isinstance(one, Pull) and one.table == table]


def test_slots_are_folded_for_one_table_and_pushed_one_by_one_to_the_other(driver: Driver) -> None:
    driver.enter([ME, ME], plan(rounds=2, slots=2))
    first = driver.contribute(0, 0)
    last = driver.contribute(0, 1)
    pushes = [one for one in sent(first + last, Push) if isinstance(one, Push)]
    assert [one.table for one in pushes] == [APART, ROUNDS, APART]
    assert nodes(first + last) == [(0, 0), (1, 0), (0, 1)]
    metas = [one for one in sent(first + last, RoundMeta) if isinstance(one, RoundMeta)]
    assert [(one.table, one.slot) for one in metas] == [(ROUNDS, 0), (APART, 0), (APART, 1)]


def test_a_round_is_left_when_all_of_it_is_in_both_tables(driver: Driver) -> None:
    effects = driver.enter([ME, OTHER], plan(rounds=3, slots=2))
    assert needs(effects, APART) == [Need(0, 0, 1, 0, 2)]
    assert needs(effects, ROUNDS) == [None]
    driver.contribute(0, 0)
    assert completed(driver.pulled(ROUNDS, 0, 1)) == []
    (task,) = completed(apart(driver, 3, [1, 1]))
    assert isinstance(task, Task)
    assert (task.round, task.slot) == (1, 0)
    assert [(one.table, one.version) for one in task.snapshots] == [(ROUNDS, 1), (APART, 3)]


def test_what_another_one_lost_is_computed_while_its_round_is_still_here(driver: Driver) -> None:
    driver.enter([ME, OTHER], plan(rounds=3, slots=2))
    driver.contribute(0, 0)
    driver.pulled(ROUNDS, 0, 1)
    (task,) = completed(driver.control(driver.view([ME, ME])))
    assert isinstance(task, Task)
    assert (task.round, task.slot, task.snapshots) == (0, 1, [])
    pushes = [one for one in sent(driver.contribute(0, 1), Push) if isinstance(one, Push)]
    assert [one.table for one in pushes] == [APART], "the other table has the round already"


def test_what_a_server_lacks_is_sent_again(driver: Driver) -> None:
    driver.enter([ME, OTHER], plan(rounds=3, slots=2))
    driver.contribute(0, 0)
    lacking = RoundStatus(APART, 0, 0, [PartMissing(0, [0, 1])], is_meta_missing=True)
    effects = driver.server(lacking)
    assert nodes(effects) == [(0, 0)]
    assert len(sent(effects, RoundMeta)) == 1


def test_who_joins_where_a_round_was_lost_to_one_table_computes_it_again(
    make: Callable[[int], Driver],
) -> None:
    driver = make(1)
    effects = driver.enter([ME, ME], plan(rounds=3, slots=2))
    assert completed(effects) == []
    assert needs(effects, APART) == [Need(0, 0, 1, 0, 2)]
    driver.pulled(ROUNDS, 0, 1)
    driver.server(RoundStatus(APART, 0, 0, [PartMissing(0, [1])], is_meta_missing=True))
    pulls = sent(driver.wait(SECOND // 5), Pull)
    assert [(one.table, one.version) for one in pulls if isinstance(one, Pull)][:2] == [
        (0, 0),
        (1, 0),
    ]
    driver.pulled(ROUNDS, 0, 0)
    (task,) = completed(apart(driver, 1, [1]))
    assert isinstance(task, Task)
    assert (task.round, task.slot) == (0, 0)


def test_a_pass_ends_with_all_of_it_in_and_servers_hear_that_it_ends(driver: Driver) -> None:
    effects = driver.enter([ME, OTHER], plan(rounds=1, slots=2))
    assert needs(effects, ROUNDS) == needs(effects, APART) == [Need(0, 0, 0, 2, 2)]
    driver.contribute(0, 0)
    driver.pulled(ROUNDS, 0, 1)
    (end,) = completed(apart(driver, 2, [1, 1]))
    assert isinstance(end, LoopEnd)
    assert (end.version, [one.version for one in end.snapshots]) == (1, [1, 2])


def test_a_version_that_is_older_than_others_are_at_is_asked_for_anew(driver: Driver) -> None:
    driver.enter([ME, OTHER], plan(rounds=4, slots=2))
    driver.contribute(0, 0)
    apart(driver, 2, [1, 1])
    effects = driver.pulled(ROUNDS, 0, 2)
    assert completed(effects) == []
    assert needs(effects, APART) == [Need(0, 0, 2, 0, 2)]
    (task,) = completed(apart(driver, 4, [2, 2]))
    assert isinstance(task, Task)
    assert task.round == 2
