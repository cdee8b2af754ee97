"""Model buffers: statistics that fold, constants that stay, counters that follow slot 0."""

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import treefold.torch as ps
from tests.support.reference import ReferenceJob, bits
from tests.support.sessions import (
    BATCH,
    backward,
    dataset,
    joined,
    loss_of,
    network,
    parameters_of,
    sgd,
    state_bits,
    train,
)
from treefold.common.errors import CapacityError, LocalProtocolError
from treefold.torch import table as tables
from treefold.torch.buffers import Buffers


class _Buffered(nn.Module):
    """Buffers of every kind: a constant, one that moves late, a counter, a table of doubles."""

    constant: Tensor
    late: Tensor
    count: Tensor
    doubles: Tensor
    passing: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("constant", torch.tensor([0.1, -torch.inf, 1 / 3]))
        self.register_buffer("late", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("doubles", torch.tensor([0.1, 0.2], dtype=torch.float64))
        self.register_buffer("passing", torch.tensor([0.7]), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.count += 1
            if self.count > 2:
                self.late += inputs[:, :3].mean(dim=0)
        output: Tensor = self.layer(self.norm(inputs))
        return output


def _run(slots: int, buffers: str = "mean", rounds: int = 4) -> tuple[ReferenceJob, _Buffered]:
    job = ReferenceJob(slots, part_elements=11)
    with joined(job):
        model = _Buffered()
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model, buffers=buffers)
        for batch in ps.batches(dataset(), BATCH, max_rounds=rounds):
            optimizer.zero_grad()
            backward(loss_of(model, batch))
            optimizer.step()
    return job, model


def test_statistics_are_the_weighted_mean_of_the_slots() -> None:
    seen: list[tuple[int, Tensor]] = []
    with joined(ReferenceJob(slots=3)):
        model = network()
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        for batch in ps.batches(dataset(), BATCH, max_rounds=1):
            optimizer.zero_grad()
            backward(loss_of(model, batch))
            optimizer.step()
            seen.append((len(batch[1]), model.state_dict()["1.running_mean"].clone()))
    first, second, third = (mean * (count / BATCH) for count, mean in seen)
    assert bits(model.state_dict()["1.running_mean"]) == bits((first + second) + third)


def test_with_slot0_statistics_are_those_of_slot_0() -> None:
    seen: dict[int, Tensor] = {}
    job = ReferenceJob(slots=3, order=lambda active: list(range(active))[::-1])
    with joined(job):
        model = network()
        own = sgd(parameters_of(model))
        optimizer = ps.DistributedOptimizer(own, model, buffers="slot0")
        for batch in ps.batches(dataset(), BATCH, max_rounds=1):
            optimizer.zero_grad()
            backward(loss_of(model, batch))
            optimizer.step()
            seen[job.seen[-1][1]] = model.state_dict()["1.running_mean"].clone()
        assert bits(model.state_dict()["1.running_mean"]) == bits(seen[0])
        assert bits(seen[0]) != bits(seen[2])


def test_with_local_buffers_do_not_travel() -> None:
    job, model = _run(slots=2, buffers="local")
    assert [tensor.name for tensor in job.tables[0].spec.tensors] == [
        "layer.weight",
        "layer.bias",
        "norm.weight",
        "norm.bias",
    ]
    assert int(model.count) == 8, "every body counts"


def test_a_counter_counts_rounds_and_not_slots() -> None:
    assert int(_run(slots=3)[1].count) == 4


def test_counters_come_to_a_worker_that_joins() -> None:
    job = ReferenceJob(slots=2)
    trained = train(job, sgd)
    with joined(job):
        model = network()
        ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        assert state_bits(model) == trained


def test_constants_keep_every_bit_although_shares_do_not_add_up_to_one() -> None:
    for slots in (1, 3):
        _, model = _run(slots)
        for name in ("constant", "doubles", "passing"):
            assert bits(getattr(model, name)) == bits(getattr(_Buffered(), name)), name


def test_folding_a_constant_would_change_its_bits() -> None:
    with mock.patch.object(Buffers, "moved", lambda self: list(range(len(self._floats)))):
        _, model = _run(slots=3)
    assert bits(model.constant) != bits(_Buffered().constant)


def test_a_buffer_that_begins_to_move_takes_slot_0s_value_and_then_the_mean() -> None:
    job = ReferenceJob(slots=3)
    late: dict[tuple[int, int], Tensor] = {}
    started: dict[int, Tensor] = {}
    with joined(job):
        model = _Buffered()
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        for batch in ps.batches(dataset(), BATCH, max_rounds=4):
            started[job.version] = model.late.clone()
            optimizer.zero_grad()
            backward(loss_of(model, batch))
            optimizer.step()
            late[job.seen[-1]] = model.late.clone()
    assert bits(started[2]) == bits(torch.zeros(3))
    assert bits(started[3]) == bits(late[2, 0])
    first, second, third = (late[3, slot] for slot in range(3))
    assert bits(model.late) == bits((first * (2 / 6) + second * (2 / 6)) + third * (2 / 6))


def test_a_frozen_batch_norm_keeps_its_statistics() -> None:
    with joined(ReferenceJob(slots=3)):
        model = network()
        model[1].eval()
        with torch.no_grad():
            model.state_dict()["1.running_mean"].copy_(torch.linspace(0.1, 0.9, 8))
        before = bits(model.state_dict()["1.running_mean"])
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        for batch in ps.batches(dataset(), BATCH):
            optimizer.zero_grad()
            backward(loss_of(model, batch))
            optimizer.step()
        assert bits(model.state_dict()["1.running_mean"]) == before


def test_a_buffer_that_a_module_replaces_is_followed() -> None:
    class Replacing(nn.Module):
        mean: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, inputs: Tensor) -> Tensor:
            self.mean = 0.5 * self.mean + 0.5 * inputs.detach().mean(dim=0)
            output: Tensor = self.layer(inputs - self.mean)
            return output

    def run(order: list[int]) -> dict[str, bytes]:
        with joined(ReferenceJob(slots=2, order=lambda _: order)):
            model = Replacing()
            optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
            for batch in ps.batches(dataset(), BATCH):
                optimizer.zero_grad()
                backward(loss_of(model, batch))
                optimizer.step()
            return state_bits(model)

    assert run([0, 1]) == run([1, 0])
    assert run([0, 1])["mean"] != bits(torch.zeros(6))


def test_a_buffer_that_changes_its_shape_is_an_error() -> None:
    with joined(ReferenceJob()):
        model = network()
        ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        loop = ps.batches(dataset(), BATCH)
        next(loop)
        model[1].register_buffer("running_mean", torch.zeros(3))
        with pytest.raises(LocalProtocolError, match=r"'1\.running_mean' was .*\[8\].*\[3\]"):
            next(loop)


def test_too_many_bytes_beside_the_tensors_are_an_error_with_advice() -> None:
    with joined(ReferenceJob()):
        model = network()
        ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        loop = ps.batches(dataset(), BATCH)
        next(loop)
        with (
            mock.patch.object(tables, "STATE_BYTES_MAX", 10),
            pytest.raises(CapacityError, match="buffers='local'"),
        ):
            next(loop)
