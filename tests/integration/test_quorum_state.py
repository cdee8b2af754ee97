"""What goes with a version where rounds go on without some slots: buffers and schedules."""

import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import treefold.torch as ps
from treefold.common.errors import UnsupportedError

SLOTS, ROUNDS, LEVEL = 4, 6, 3.0


class _Model(nn.Module):
    constant: Tensor
    ticks: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.layer = nn.Linear(2, 1)
        self.register_buffer("constant", torch.tensor([0.1, 7.0]))
        self.register_buffer("ticks", torch.ones(1))

    def forward(self, inputs: Tensor) -> Tensor:
        self.ticks += 1 / 1024
        output: Tensor = self.layer(self.norm(inputs))
        return output


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """A cluster in this process, whose rounds go on with one slot."""
    ps.init(slots=SLOTS)
    yield
    ps.shutdown()


def test_buffers_and_schedules_count_rounds_whatever_is_left_out() -> None:
    model = _Model()
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = ps.DistributedOptimizer(inner, model, consistency=ps.Quorum(1, grace=0))
    schedule = torch.optim.lr_scheduler.OneCycleLR(inner, max_lr=0.1, total_steps=2 * ROUNDS)
    inputs = LEVEL + torch.linspace(-1, 1, 4 * SLOTS * ROUNDS * 2).view(-1, 2)
    bodies = 0
    for epoch in range(2):
        for (batch,) in ps.batches(TensorDataset(inputs), 4 * SLOTS, epoch):
            time.sleep(0.01)  # the round goes on meanwhile
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
            schedule.step()
            bodies += 1
        assert schedule.last_epoch == (epoch + 1) * ROUNDS
    assert bodies > 2 * SLOTS * ROUNDS, "no slot was left out"
    assert torch.equal(model.constant, torch.tensor([0.1, 7.0]))
    assert 1 < model.ticks.item() < 1 + bodies / 1024
    assert (model.norm.running_mean.abs() <= LEVEL + 1).all()  # type: ignore[union-attr] # it has one


def test_buffers_of_slot_0_are_refused() -> None:
    model = _Model()
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(UnsupportedError, match="needs slot 0 in every round"):
        ps.DistributedOptimizer(inner, model, buffers="slot0", consistency=ps.Quorum(2))
