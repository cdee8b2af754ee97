"""What moves slots: forecast speed, what somebody has not begun, or nothing but a loss."""

import pytest
from msgspec.structs import replace

from tests.unit.scheduler_driver import SERVER, SPEC, WORKERS, Driver, plan, sent
from treefold.common.plan import LoopPlan, Policy
from treefold.common.spec import Consistency, ConsistencyKind, TableSpec
from treefold.scheduler.effects import Effect
from treefold.wire.membership import MS
from treefold.wire.messages import DeclarePlan, DeclareTable, Grant, Heartbeat, RoundLate
from treefold.wire.words import Role

ASYNC = replace(SPEC, consistency=Consistency(ConsistencyKind.ASYNC))
SLOTS = 6


def begun(policy: Policy, spec: TableSpec = ASYNC, workers: int = 2) -> Driver:
    """Workers in a pass over data shards: two batches in each of the slots."""
    shards: LoopPlan = plan(
        rounds=2, slots=SLOTS, samples=2 * SLOTS, batch_size=SLOTS, policy=policy,
        lengths=[2] * SLOTS, shards=[[2]] * SLOTS,
    )  # fmt: skip
    driver = Driver()
    driver.form(workers)
    for number in range(workers):
        driver.say(WORKERS[number], DeclareTable(2 + number, 1, spec))
    for number in range(workers):
        driver.say(WORKERS[number], DeclarePlan(2 + number, 2, shards))
    driver.beats(1, *range(2, 2 + workers))
    return driver


def tell(
    driver: Driver, who: int, *spare: int, is_idle: bool = False, slot_ms: int = 0
) -> list[Effect]:
    """A worker beats, and says what it has not begun."""
    view = driver.core.view.number
    beat = Heartbeat(
        who, view, 1, 0, slot_ms * MS, 0, None, "", 0, 0.0, spare=list(spare), is_idle=is_idle
    )
    return driver.say(WORKERS[who - 2], beat)


def test_who_is_done_takes_half_of_what_another_has_not_begun() -> None:
    driver = begun(Policy.QUEUE)
    assert driver.leases.workers == [2, 2, 2, 3, 3, 3]
    tell(driver, 2, is_idle=True)
    tell(driver, 3, 4, 5)
    driver.wait(500 * MS)
    assert driver.leases.workers == [2, 2, 2, 3, 3, 2]
    tell(driver, 2, is_idle=True)
    tell(driver, 3, 4)
    driver.wait(500 * MS)
    assert driver.leases.workers == [2, 2, 2, 3, 2, 2]
    tell(driver, 2, is_idle=True)
    tell(driver, 3)
    driver.wait(500 * MS)
    assert driver.leases.workers == [2, 2, 2, 3, 2, 2], "what is begun stays"


def test_what_was_said_before_slots_moved_does_not_count() -> None:
    driver = begun(Policy.QUEUE)
    tell(driver, 2, is_idle=True)
    tell(driver, 3, 0, 1, 5)
    driver.wait(500 * MS)
    assert driver.leases.workers == [2, 2, 2, 3, 3, 2]


def test_only_predictive_shares_follow_speed_and_only_static_ones_get_no_help() -> None:
    for policy, moves in ((Policy.PREDICTIVE, True), (Policy.QUEUE, False), (Policy.STATIC, False)):
        driver = begun(policy)
        tell(driver, 2, slot_ms=10)
        tell(driver, 3, 3, 4, slot_ms=100)
        driver.wait(500 * MS)
        assert (driver.leases.workers != [2, 2, 2, 3, 3, 3]) is moves, policy
    driver = begun(Policy.STATIC)
    tell(driver, 2, is_idle=True)
    tell(driver, 3, 4, 5)
    driver.wait(500 * MS)
    assert driver.leases.workers == [2, 2, 2, 3, 3, 3]


def test_who_is_done_takes_what_a_worker_has_that_hangs() -> None:
    driver = begun(Policy.QUEUE)
    tell(driver, 3, slot_ms=10)
    tell(driver, 2, slot_ms=10, is_idle=True)
    driver.wait(500 * MS)
    assert driver.leases.workers == [2, 2, 2, 3, 3, 3]
    for moved in ([2, 2, 2, 3, 2, 2], [2] * SLOTS):
        tell(driver, 3, slot_ms=5_000)
        tell(driver, 2, slot_ms=10, is_idle=True)
        driver.wait(500 * MS)
        assert driver.leases.workers == moved


def test_who_joins_gets_an_equal_share_also_where_shares_do_not_follow_speed() -> None:
    for policy, spec in ((Policy.STATIC, ASYNC), (Policy.STATIC, SPEC), (Policy.QUEUE, SPEC)):
        driver = begun(policy, spec)
        driver.register(WORKERS[2], Role.WORKER, 103)
        driver.beats(1, 2, 3, 4)
        driver.wait(500 * MS)
        assert driver.leases.workers == [2, 2, 3, 3, 4, 4], policy


def test_a_worker_without_slots_is_given_another_chance_whatever_it_repeats() -> None:
    driver = begun(Policy.PREDICTIVE)
    for _ in range(2):
        tell(driver, 2, slot_ms=10)
        tell(driver, 3, slot_ms=500)
        driver.wait(500 * MS)
    assert driver.leases.workers == [2] * SLOTS
    for _ in range(60):
        tell(driver, 2, slot_ms=10)
        tell(driver, 3, slot_ms=500)  # its last slot's, still
        driver.beats(1)
        driver.wait(500 * MS)
    assert 3 in driver.leases.workers


def test_a_late_round_gets_no_help_where_shares_are_static() -> None:
    for policy, is_helped in ((Policy.QUEUE, True), (Policy.STATIC, False)):
        driver = begun(policy, SPEC)
        effects: list[Effect] = []
        for _ in range(8):
            driver.now_ns += 200 * MS
            driver.beats(1, 2, 3)
            effects += driver.say(SERVER, RoundLate(1, 0, [5]))
        assert bool(effects) is is_helped, policy


@pytest.mark.parametrize(("spec", "is_helped"), [(SPEC, True), (ASYNC, False)])
def test_where_slots_are_at_rounds_of_their_own_no_round_gets_help(
    spec: TableSpec, is_helped: bool
) -> None:
    driver = begun(Policy.PREDICTIVE, spec)
    effects: list[Effect] = []
    for _ in range(8):
        driver.now_ns += 200 * MS
        driver.beats(1, 2, 3)
        effects += driver.say(SERVER, RoundLate(1, 0, [5]))
    assert bool(sent(effects, Grant)) is is_helped


def test_shares_of_the_gone_go_to_others_whatever_the_policy() -> None:
    for policy in Policy:
        driver = begun(policy, workers=3)
        driver.pass_time(3, 1, 2, 4)
        assert 3 not in driver.leases.workers
        assert len(driver.leases.workers) == SLOTS
