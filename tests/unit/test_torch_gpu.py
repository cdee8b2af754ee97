"""Models on an accelerator: gradients live there, servers and the client stay on the CPU."""

import pytest
import torch
from torch import Tensor, nn

import treefold.torch as ps
from tests.support.reference import ReferenceJob, bits
from tests.support.sessions import (
    BATCH,
    adamw,
    backward,
    dataset,
    joined,
    loss_of,
    parameters_of,
    sgd,
)
from treefold.common.errors import LocalProtocolError
from treefold.torch.pushing import Overlap

pytestmark = pytest.mark.gpu


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def _train(device: str, slots: int) -> dict[str, Tensor]:
    job = ReferenceJob(slots, part_elements=20)
    with joined(job):
        model = _network().to(device)
        optimizer = ps.DistributedOptimizer(adamw(parameters_of(model)), model)
        for epoch in range(2):
            for batch in ps.batches(dataset(), BATCH, epoch):
                optimizer.zero_grad()
                backward(loss_of(model, [tensor.to(device) for tensor in batch]))
                optimizer.step()
        assert optimizer.table.pushing.overlap is (Overlap.ON if device == "cpu" else Overlap.OFF)
        return {name: value.cpu() for name, value in ps.state_dict().items()}


@pytest.mark.parametrize("slots", [1, 3])
def test_a_model_on_a_gpu_trains_like_one_on_the_cpu(slots: int) -> None:
    on_cpu, on_gpu = _train("cpu", slots), _train("cuda", slots)
    for name, value in on_cpu.items():
        torch.testing.assert_close(on_gpu[name], value, rtol=1e-2, atol=1e-4)


def test_what_is_contributed_is_the_gradient_on_the_gpu_bit_for_bit() -> None:
    job = ReferenceJob()
    with joined(job):
        model = nn.Linear(6, 3).cuda()
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        for batch in ps.batches(dataset(), BATCH, max_rounds=1):
            optimizer.zero_grad()
            backward(loss_of(model, [tensor.cuda() for tensor in batch]))
            optimizer.step()
            assert model.bias.grad is not None
            assert bits(job.leaves[0, 0][0].values[18:21]) == bits(model.bias.grad.cpu())


def test_moving_the_model_after_making_the_optimizer_is_an_error() -> None:
    with joined(ReferenceJob()):
        model = _network()
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        next(ps.batches(dataset(), BATCH))
        model.cuda()
        with pytest.raises(LocalProtocolError, match="before making the optimizer"):
            optimizer.step()
