"""A worker that is a member but gets no further: its slots go to others until it does."""

import msgspec
import pytest

from tests.unit.scheduler_driver import Driver
from treefold.common.spec import Consistency, ConsistencyKind
from treefold.wire.membership import MS


def test_slots_leave_a_worker_that_stands_still_while_others_go_on_and_come_back() -> None:
    driver = Driver()
    driver.train()
    for round_ in range(5, 10):
        driver.wait(500 * MS)
        driver.beat(2, round_, slot_ns=10 * MS)
        driver.beat(3, 5, slot_ns=10 * MS)  # a server's versions do not reach it
    driver.wait(500 * MS)
    assert driver.leases.workers == [2, 2, 2, 2]
    driver.beat(2, 10, slot_ns=10 * MS)
    driver.beat(3, 10, slot_ns=10 * MS)
    driver.wait(500 * MS)
    assert driver.leases.workers == [2, 2, 3, 3]


def test_a_worker_whose_heartbeats_are_older_keeps_its_slots() -> None:
    driver = Driver()
    driver.train()
    for round_ in range(10, 50, 10):
        driver.wait(100 * MS)
        driver.beat(3, round_, slot_ns=10 * MS)
        driver.wait(400 * MS)
        driver.beat(2, round_ + 8, slot_ns=10 * MS)
    driver.wait(450 * MS)
    assert driver.leases.workers == [2, 2, 3, 3]


def test_where_slots_are_at_rounds_of_their_own_nobody_is_thought_to_stand_still() -> None:
    driver = Driver()
    driver.train()
    (table,) = driver.core.declared.tables
    rule = Consistency(ConsistencyKind.ASYNC)
    table.spec = msgspec.structs.replace(table.spec, consistency=rule)
    for round_ in range(5, 9):
        driver.wait(500 * MS)
        driver.beat(2, round_, slot_ns=10 * MS)
        driver.beat(3, 5, slot_ns=10 * MS)  # at the slot that is furthest behind
    driver.wait(500 * MS)
    assert driver.leases.workers == [2, 2, 3, 3]


@pytest.mark.parametrize(("slot_ms", "holder"), [(15, 2), (400, 3)])
def test_slots_leave_a_worker_that_hangs_though_nobody_else_has_computed_one(
    slot_ms: int, holder: int
) -> None:
    driver = Driver()
    driver.train(slots=1)
    (table,) = driver.core.declared.tables
    rule = Consistency(ConsistencyKind.ASYNC)
    table.spec = msgspec.structs.replace(table.spec, consistency=rule)
    assert driver.leases.workers == [2]
    for slot_ns in (10 * MS, slot_ms * MS):
        driver.wait(500 * MS)
        driver.beat(2, 5, slot_ns)
        driver.beat(3, 0)
    driver.wait(500 * MS)
    assert driver.leases.workers == [holder]


def test_a_worker_keeps_its_slots_after_a_lull_in_which_all_stood_still() -> None:
    """The first heartbeats after it are older at one than at the other, and name the round before.

    Between two loops, for instance, in which the script evaluates.
    """
    driver = Driver()
    driver.train()
    for _ in range(4):
        driver.wait(500 * MS)
        driver.beat(2, 10, slot_ns=10 * MS)
        driver.beat(3, 10, slot_ns=10 * MS)
    for round_ in range(30, 90, 20):  # they go on right after what the second one says
        driver.wait(490 * MS)
        driver.beat(2, round_, slot_ns=10 * MS)
        driver.wait(5 * MS)
        assert driver.leases.workers == [2, 2, 3, 3]
        driver.wait(5 * MS)
        driver.beat(3, round_ - 1, slot_ns=10 * MS)
    driver.wait(450 * MS)
    assert driver.leases.workers == [2, 2, 3, 3]
