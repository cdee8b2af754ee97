"""Declarations of a worker: sent until they are answered, each by the incarnation that it is of."""

import pytest

from tests.unit.worker_driver import (
    ME,
    OTHER,
    Driver,
    failed,
    plan,
    sent,
    table_spec,
)
from treefold.common import layout
from treefold.wire.membership import MS
from treefold.wire.messages import (
    Accepted,
    DeclarePlan,
    DeclareTable,
    Fenced,
    HeartbeatSeen,
    Pull,
    Refused,
)
from treefold.wire.words import Code
from treefold.worker.effects import (
    Complete,
    DeclareCalled,
    LoopCalled,
)


@pytest.fixture(autouse=True)
def _tiny_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four elements make a part of one block."""
    monkeypatch.setattr(layout, "BLOCK_ELEMENTS", 4)
    monkeypatch.setattr(layout, "PART_BLOCKS_MAX", 1)


def test_a_plan_is_declared_again_until_it_is_accepted() -> None:
    driver = Driver()
    driver.declare()
    call, effects = driver.call(LoopCalled, plan())
    assert sent(effects, DeclarePlan)
    assert sent(driver.wait(600 * MS), DeclarePlan)
    assert Complete(call, None) in driver.control(Accepted(call, 0))
    driver.control(HeartbeatSeen(ME, 1))
    assert not sent(driver.wait(600 * MS), DeclarePlan)


def test_an_answer_to_an_incarnation_that_was_given_up_does_not_count() -> None:
    driver = Driver()
    driver.join()
    call, _ = driver.call(DeclareCalled, table_spec("t0"))
    driver.control(Fenced(ME))
    (declared,) = sent(driver.join(OTHER), DeclareTable)
    driver.control(driver.view([]))
    assert sent(driver.control(Accepted(call, 0)), Pull) == []
    assert isinstance(declared, DeclareTable)
    assert declared.incarnation == OTHER
    assert sent(driver.control(Accepted(declared.call, 0)), Pull) != []


def test_a_refused_declaration_fails_that_call_and_nothing_else() -> None:
    driver = Driver()
    driver.declare()
    call, _ = driver.call(LoopCalled, plan())
    effects = driver.control(Refused(call, Code.SPEC_MISMATCH, "slots differ"))
    assert [str(error) for error in failed(effects)] == ["slots differ"]
    assert driver.core.failure is None
