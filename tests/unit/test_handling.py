"""What a server's shell makes of contributions that do not count as they are."""

import pytest
import torch
from torch import Tensor

from treefold.common.fold import Payload
from treefold.common.layout import Layout, ShardSpan
from treefold.common.spec import Dtype, OptimizerSpec, Placement, Rule, TableSpec, TensorSpec
from treefold.server.effects import CombinePayloads, ScalePayload
from treefold.server.handling import Handling
from treefold.server.shard import ShardState
from treefold.transport.carrier import Carrier, Held
from treefold.transport.lanes import LaneSettings
from treefold.transport.outbox import Outbox
from treefold.transport.pool import BufferPool
from treefold.transport.sockets import Hub

TENSORS = [
    TensorSpec("w", [2], Dtype.FLOAT32, 0),
    TensorSpec("mean", [2], Dtype.FLOAT32, -1),
    TensorSpec("var", [1], Dtype.FLOAT32, -1),
]


@pytest.mark.parametrize("is_lent", [False, True])
def test_a_gradient_and_the_buffers_beside_it_have_factors_of_their_own(*, is_lent: bool) -> None:
    optimizer = OptimizerSpec("SGD", [{"lr": 0.1}])
    spec = TableSpec("t", Rule.OPTIMIZER, Placement.ELEMENTWISE, TENSORS, optimizer)
    state = ShardState(spec, ShardSpan(0, Layout(spec).blocks))
    hub = Hub()
    carrier = Carrier(Outbox(hub), LaneSettings(is_enabled=False, bytes_max=0))
    sent = torch.tensor([8.0, 16.0, 4.0, 2.0, 1.0])
    payload = Payload(sent, 0.5) if is_lent else Payload(sent)
    number = carrier.hold(Held(payload, None if is_lent else sent))
    Handling(carrier, BufferPool(), {(0, 0): state}).perform(
        ScalePayload(0, 0, 0, number, 0.125, 2.0)
    )
    found: Tensor = carrier.held(number).payload.tensor
    hub.close()
    whole = torch.tensor([1.0, 2.0, 8.0, 4.0, 2.0])
    assert torch.equal(found, whole / 2 if is_lent else whole)
    assert carrier.held(number).payload.scale == 1.0


def test_a_slot_without_a_gradient_adds_nothing_to_what_nobody_has_touched() -> None:
    optimizer = OptimizerSpec("SGD", [{"lr": 0.1}])
    spec = TableSpec("t", Rule.OPTIMIZER, Placement.ELEMENTWISE, TENSORS[:1], optimizer)
    state = ShardState(spec, ShardSpan(0, Layout(spec).blocks))
    hub = Hub()
    carrier = Carrier(Outbox(hub), LaneSettings(is_enabled=False, bytes_max=0))
    rows = [torch.tensor([-0.0, 3.0]), torch.tensor([-0.0, 6.0])]
    numbers = [carrier.hold(Held(Payload(row), row)) for row in rows]
    effect = CombinePayloads(numbers, [1.0, 1.0], nothing=1, trimmed=0)
    Handling(carrier, BufferPool(), {(0, 0): state}).perform(effect)
    found: Tensor = carrier.held(numbers[0]).payload.tensor
    hub.close()
    assert found.tolist() == [0.0, 3.0]
    assert found.signbit().tolist() == [True, False]
