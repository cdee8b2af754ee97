"""What a server measures on the way: contributions that are watched, once folds are compiled."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from treefold.common.fold import Payload
from treefold.common.kernels import Kernels
from treefold.common.layout import BLOCK_ELEMENTS, Layout, ShardSpan
from treefold.common.process import Spent
from treefold.common.spec import Dtype, OptimizerSpec, Placement, Rule, TableSpec, TensorSpec
from treefold.server.effects import ComputeProducts, FoldPayloads, ProductsComputed
from treefold.server.folding import Folding
from treefold.server.handling import Handling
from treefold.server.shard import ShardState
from treefold.transport.carrier import Carrier, Held
from treefold.transport.lanes import LaneSettings
from treefold.transport.outbox import Outbox
from treefold.transport.pool import BufferPool
from treefold.transport.sockets import Hub

ELEMENTS = BLOCK_ELEMENTS + 100  # two blocks
OPTIMIZER = OptimizerSpec("SGD", [{"lr": 0.1}])
PLAIN = [TensorSpec("w", [ELEMENTS], Dtype.FLOAT32, 0)]
WITH_BUFFER = [*PLAIN, TensorSpec("mean", [3], Dtype.FLOAT32, -1)]


class Server:
    """The part of a server's shell that folds."""

    def __init__(self, tensors: list[TensorSpec]) -> None:
        spec = TableSpec("t", Rule.OPTIMIZER, Placement.ELEMENTWISE, tensors, OPTIMIZER)
        state = ShardState(spec, ShardSpan(0, Layout(spec).blocks))
        self.hub = Hub()
        self.carrier = Carrier(Outbox(self.hub), LaneSettings(is_enabled=False, bytes_max=0))
        pool = BufferPool()
        self.handling = Handling(self.carrier, pool, {(0, 0): state})
        self.folding = Folding(self.carrier, pool, self.handling, Spent())

    def hold(self, values: Tensor, scale: float = 0.5) -> int:
        """A contribution that was lent."""
        return self.carrier.hold(Held(Payload(values, scale), None))

    def measure(self, slot: int, payload: int) -> list[object]:
        """What comes of measuring it."""
        return list(self.folding.measure(ComputeProducts(0, 0, 7, 0, (slot,), (payload,))))


@pytest.fixture(params=[PLAIN, WITH_BUFFER], ids=["plain", "buffer"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """One without compiled kernels."""
    made = Server(request.param)
    yield made
    made.hub.close()


@pytest.fixture
def plain() -> Iterator[Server]:
    """One with compiled kernels, and nothing but parameters."""
    made = Server(PLAIN)
    made.folding.compiler.kernels = Kernels()
    yield made
    made.hub.close()


def rows(events: list[object]) -> dict[int, list[list[float]]]:
    """What was measured of each slot."""
    assert all(isinstance(event, ProductsComputed) for event in events)
    return {one.slots[0]: one.rows for one in events if isinstance(one, ProductsComputed)}


def test_without_compiled_folds_it_is_measured_at_once(server: Server) -> None:
    elements = ELEMENTS + 3 * (len(server.handling._states[0, 0].spec.tensors) - 1)
    values = torch.randn(elements)
    found = rows(server.measure(0, server.hold(values)))
    wanted = (values[:ELEMENTS].double() * 0.5).square()
    right = [float(part.sum()) for part in torch.split(wanted, BLOCK_ELEMENTS)]
    assert [row[0] for row in found[0]] == pytest.approx(right, rel=1e-4)


def test_with_them_it_is_measured_by_the_fold_and_both_are_right(plain: Server) -> None:
    left, right = torch.randn(2, ELEMENTS).unbind()
    one, other = plain.hold(left, 0.3), plain.hold(right, 0.7)
    assert plain.measure(0, one) == plain.measure(1, other) == []
    found = rows(list(plain.folding.fold(FoldPayloads(one, other))))
    for slot, scaled in enumerate((left * 0.3, right * 0.7)):
        wanted = [
            float(part.double().square().sum()) for part in torch.split(scaled, BLOCK_ELEMENTS)
        ]
        assert [row[0] for row in found[slot]] == pytest.approx(wanted, rel=1e-4)
    folded = plain.carrier.held(one).payload.tensor
    assert torch.equal(folded, (left * 0.3).add_(right * 0.7))
    assert len(plain.carrier) == 1


def test_one_that_is_folded_into_a_sum_is_measured_beside_it(plain: Server) -> None:
    left, right, third = torch.randn(3, ELEMENTS).unbind()
    numbers = [plain.hold(one) for one in (left, right, third)]
    plain.folding.fold(FoldPayloads(numbers[0], numbers[1]))
    assert plain.measure(2, numbers[2]) == []
    found = rows(list(plain.folding.fold(FoldPayloads(numbers[0], numbers[2]))))
    assert list(found) == [2]
    wanted = (left * 0.5).add_(right * 0.5).add_(third * 0.5)
    assert torch.equal(plain.carrier.held(numbers[0]).payload.tensor, wanted)


def test_what_float32_cannot_hold_is_measured_once_more(plain: Server) -> None:
    one, other = plain.hold(torch.full((ELEMENTS,), 1e25), 1.0), plain.hold(torch.ones(ELEMENTS))
    plain.measure(0, one)
    plain.measure(1, other)
    found = rows(list(plain.folding.fold(FoldPayloads(one, other))))
    wanted = [BLOCK_ELEMENTS * 1e50, 100 * 1e50]
    assert [row[0] for row in found[0]] == pytest.approx(wanted, rel=1e-4)


def test_what_is_not_finite_is_seen(plain: Server) -> None:
    odd = torch.zeros(ELEMENTS)
    odd[-1] = float("nan")
    one, other = plain.hold(odd), plain.hold(torch.ones(ELEMENTS))
    plain.measure(0, one)
    found = rows(list(plain.folding.fold(FoldPayloads(one, other))))
    assert found[0][1][0] != found[0][1][0]


def test_what_is_not_folded_is_measured_when_it_goes(plain: Server) -> None:
    number = plain.hold(torch.ones(ELEMENTS), 1.0)
    plain.measure(0, number)
    found = rows(list(plain.folding.settle([None, number])))
    assert [row[0] for row in found[0]] == [BLOCK_ELEMENTS, 100.0]
    assert plain.folding.settle([number]) == []


def test_of_a_shard_that_is_closed_nothing_is_measured(plain: Server) -> None:
    number = plain.hold(torch.ones(ELEMENTS))
    plain.measure(0, number)
    plain.folding.forget(0, 0)
    assert plain.folding.settle([number]) == []


def test_parts_with_buffers_are_measured_at_once() -> None:
    made = Server(WITH_BUFFER)
    made.folding.compiler.kernels = Kernels()
    values = torch.randn(ELEMENTS + 3)
    values[-1] = float("inf")
    found = rows(made.measure(0, made.hold(values)))
    made.hub.close()
    assert found[0][0][0] != found[0][0][0]
