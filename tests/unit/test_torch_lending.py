"""Gradients that are sent from where they lie, and when they are copied instead."""

import pytest
import torch
from torch import Tensor, nn

from tests.support.sessions import backward
from treefold.common.layout import Layout
from treefold.common.process import Spent
from treefold.common.spec import Dtype, OptimizerSpec, Placement, Rule, TableSpec, TensorSpec
from treefold.torch.pushing import Lending, Pushing, TablePort
from treefold.transport.lanes import Lanes, LaneSettings
from treefold.worker.flats import Flats
from treefold.worker.handed import PartRun, Task
from treefold.worker.pulls import PartRange
from treefold.worker.shell import Values

ELEMENTS = 4


class Hands:
    """A client that keeps what it is handed."""

    def __init__(self) -> None:
        self.spent = Spent()
        self.flats = Flats(Lanes(LaneSettings(is_enabled=False, bytes_max=0)))
        self.values: list[Values] = []

    def parts(self, _: int) -> list[PartRange]:
        return [PartRange(0, 0, 0, ELEMENTS, 1)]

    def scratch(self, elements: int) -> Tensor:
        return torch.empty(elements)

    def contribute(self, task: Task, where: PartRun, values: Values | None) -> None:
        del task, where
        assert values is not None
        self.values.append(values)


class Script:
    """A script with one parameter, whose gradient in a slot is the slot's number."""

    def __init__(self) -> None:
        tensors = [TensorSpec("w", [ELEMENTS], Dtype.FLOAT32, 0)]
        optimizer = OptimizerSpec("SGD", [{"lr": 0.1}])
        spec = TableSpec("t", Rule.OPTIMIZER, Placement.ELEMENTWISE, tensors, optimizer)
        self.client = Hands()
        self.parameter = nn.Parameter(torch.zeros(ELEMENTS))
        port = TablePort(self.client, 0, Layout(spec))  # type: ignore[arg-type]  # all that it needs
        self.pushing = Pushing(port, [("w", self.parameter)], False, False)
        self.pushing.lending = Lending.ON

    def slot(self, slot: int, *, is_kept: bool = False, is_lent: bool = False) -> Values:
        """Run a loop body; returns what it handed over."""
        task = Task(0, slot, [], is_kept=is_kept, is_lent=is_lent)
        self.pushing.begin(task, 1.0, is_stale_allowed=False)
        self.pushing.gradients.zero(set_to_none=True)
        backward((self.parameter * slot).sum())
        self.pushing.step()
        self.pushing.end([])
        return self.client.values[-1]


@pytest.fixture
def script() -> Script:
    """A script that lends."""
    return Script()


def test_a_gradient_is_lent_where_it_lies(script: Script) -> None:
    values = script.slot(1)
    assert values.owner is None
    assert script.pushing.gradients.flat is not None
    assert values.flat.data_ptr() == script.pushing.gradients.flat.data_ptr()


def test_a_gradient_that_waits_for_another_slot_is_copied(script: Script) -> None:
    assert script.slot(1, is_kept=True).owner is not None


def test_a_slot_leaves_alone_what_is_lent(script: Script) -> None:
    first = script.slot(1)
    script.slot(2, is_lent=True)
    assert first.flat.tolist() == [1.0] * ELEMENTS


def test_however_many_slots_follow_they_leave_alone_what_is_lent(script: Script) -> None:
    lent = [script.slot(1), script.slot(2, is_lent=True), script.slot(3, is_lent=True)]
    assert [values.flat.tolist() for values in lent] == [[float(n)] * ELEMENTS for n in (1, 2, 3)]


def test_what_came_back_is_lent_again(script: Script) -> None:
    script.slot(1)
    script.slot(2, is_lent=True)
    assert script.slot(3).owner is None
