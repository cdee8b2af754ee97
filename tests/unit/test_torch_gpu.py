"""Models on a GPU: bits as on the host, copies beside the computing, no stale pinned memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import treefold.torch as ps
from tests.support.accelerator import POISON, PoisonedRing
from tests.support.contributions import Case, Slots, numbers, poisoned
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
from treefold.common.errors import LocalProtocolError, UnsupportedError
from treefold.common.spec import Dtype
from treefold.torch import staging, streams
from treefold.torch.inward import Inward
from treefold.torch.optimizer import DistributedOptimizer
from treefold.torch.pushing import Overlap
from treefold.torch.streams import PINS, CudaPort
from treefold.transport import segments
from treefold.worker.flats import Flats

pytestmark = pytest.mark.gpu

A_WHILE = 100_000_000  # cycles of the GPU: some tens of milliseconds
LARGE = (300_000, 70_001, 5, 1_200_000, 33)
LARGE_PART = 1 << 18
LANES = pytest.mark.parametrize("pinned_from", [0, 1 << 40], ids=["in place", "through the ring"])


@contextmanager
def _poisoned(pinned_from: int) -> Iterator[None]:
    """Every pinned buffer is full of NaN before it is used; memory is pinned from a size on."""

    def ring(port: streams.Port) -> staging.Ring:
        return PoisonedRing(port, 2, 1 << 18)

    take = Flats.take

    def taken(flats: Flats, elements: int) -> Tensor:
        return take(flats, elements).fill_(torch.nan)

    try:
        with (
            mock.patch.object(staging, "default_ring", ring),
            mock.patch.object(streams, "PIN_BYTES_MIN", pinned_from),
            mock.patch.object(Flats, "take", taken),
        ):
            yield
    finally:
        torch.cuda.synchronize()
        PINS.release()


@contextmanager
def _unstaged() -> Iterator[None]:
    """Every copy waits for the GPU and the GPU for it, as it used to be."""
    with mock.patch.object(streams, "port_of", return_value=None):
        yield


def _gpu() -> CudaPort:
    return CudaPort(torch.device("cuda", torch.cuda.current_device()))


# ---- contributions -------------------------------------------------------------------------------


@LANES
@pytest.mark.parametrize("wire", [Dtype.FLOAT32, Dtype.BFLOAT16, Dtype.FLOAT16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1 / 3])
def test_contributions_have_the_bits_of_those_from_the_host(
    wire: Dtype, dtype: torch.dtype, scale: float, pinned_from: int
) -> None:
    case = Case(wire, dtype, scale, LARGE, LARGE_PART)
    wanted = Slots(case).run()
    with _poisoned(pinned_from):
        slots = Slots(case, "cuda")
        for number, parts in enumerate(slots.run()):
            differing = [n for n, part in parts.items() if part != wanted[number][n]]
            assert parts.keys() == wanted[number].keys()
            assert differing == [], f"parts of slot {number}"
        assert slots.pushing.overlap is Overlap.ON
        slots.pushing.close()


@LANES
def test_nothing_is_handed_over_while_the_gpu_is_still_computing_it(pinned_from: int) -> None:
    case = Case(Dtype.FLOAT32, torch.float32, 0.5, LARGE, LARGE_PART)
    wanted = Slots(case).run()
    with _poisoned(pinned_from):
        slots = Slots(case, "cuda")
        slots.begin(0)
        slots.end()
        torch.cuda._sleep(A_WHILE)  # type: ignore[no-untyped-call] # as torch's own tests do
        slots.begin(1)
        before = len(slots.client.handed)
        still_busy = not torch.cuda.current_stream().query()
        after = slots.end()
        assert still_busy, "backward waited for the GPU"
        assert before == 0
        assert after == wanted[1]
        slots.pushing.close()


def test_parts_are_handed_over_before_the_step_when_backward_takes_long() -> None:
    with _poisoned(0):
        slots = Slots(Case(Dtype.FLOAT32, torch.float32, 0.5, LARGE, LARGE_PART), "cuda")
        slots.begin(0)
        slots.end()
        slots.begin(1)
        torch.cuda.synchronize()
        outward = slots.pushing._outward
        assert outward is not None
        outward.poll()
        assert slots.client.handed
        slots.end()
        slots.pushing.close()


def test_backward_on_a_stream_of_the_scripts_own_is_waited_for() -> None:
    case = Case(Dtype.FLOAT32, torch.float32, 0.5, LARGE, LARGE_PART)
    wanted = Slots(case).run()
    with _poisoned(0):
        slots = Slots(case, "cuda")
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call] # torch's own
        for number in range(4):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                torch.cuda._sleep(A_WHILE // 10)  # type: ignore[no-untyped-call] # as above
                slots.begin(number)
            torch.cuda.current_stream().wait_stream(side)
            assert slots.end() == wanted[number]
        slots.pushing.close()


# ---- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", [torch.float32, torch.bfloat16, torch.float16])
def test_parameters_have_the_bits_of_the_host_and_change_between_computations(
    wire: torch.dtype, model: torch.dtype
) -> None:
    with _poisoned(1 << 40):
        inward = Inward(_gpu())
        old, new = numbers(700_000, model, 1), numbers(700_000, wire, 2)
        flat = old.cuda()
        torch.cuda._sleep(A_WHILE)  # type: ignore[no-untyped-call] # as torch's own tests do
        before = flat.clone()
        parts = [
            (at, at + len(piece), piece)
            for at, piece in zip(
                range(0, 700_000, 50_000), torch.split(new.clone(), 50_000), strict=True
            )
        ]
        inward.load(flat, parts, [])
        for _, _, values in parts:
            values.fill_(torch.nan)
        after = flat.clone()
        assert bits(before.cpu()) == bits(old)
        assert bits(after.cpu()) == bits(new.to(model))


def test_shared_memory_of_this_process_can_be_pinned() -> None:
    own = segments.create("test", 1 << 21)
    try:
        assert _gpu().pin(own.body, is_read_only=False), "gradients go through the ring here"
    finally:
        PINS.release()


def test_a_servers_memory_is_read_in_place_or_staged_and_leaves_no_error_behind() -> None:
    own = segments.create("test", 1 << 21)
    peer = segments.attach(own.offer)
    values = numbers(300_000)
    own.body[: values.nbytes].view(torch.float32).copy_(values)
    try:
        is_pinned = _gpu().pin(peer.body, is_read_only=True)
        print(f"a server's memory is {'read in place' if is_pinned else 'staged'}")  # noqa: T201
        flat = poisoned(300_000).cuda()
        lying = peer.body[: values.nbytes].view(torch.float32)
        Inward(_gpu()).load(flat, [(0, 300_000, lying)], [peer])
        own.body.fill_(POISON)  # the server goes on
        assert bits(flat.cpu()) == bits(values)
    finally:
        torch.cuda.synchronize()
        PINS.release()


# ---- whole scripts -------------------------------------------------------------------------------


class _Model(nn.Module):
    """BatchNorm, a tied weight, a parameter that is seldom used and one that is unfrozen later."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.tied = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.tied.weight
        self.seldom = nn.Parameter(torch.ones(8))
        self.later = nn.Parameter(torch.ones(8), requires_grad=False)
        self.out = nn.Linear(8, 3)
        self.uses = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.uses += 1
        hidden = self.norm(self.into(inputs)).relu()
        hidden = self.again(self.tied(hidden).relu()) * self.later
        if self.uses % 3 == 0:
            hidden = hidden * self.seldom
        found: Tensor = self.out(hidden)
        return found


Body = Callable[[DistributedOptimizer, nn.Module, list[Tensor], int], None]
Script = tuple[Body, torch.dtype, Overlap]


def _network() -> nn.Sequential:
    # Without a bias before the norm, whose gradient is rounding error, which AdamW makes large.
    first = nn.Linear(6, 8, bias=False)
    return nn.Sequential(first, nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def _plain(
    optimizer: DistributedOptimizer, model: nn.Module, batch: list[Tensor], number: int
) -> None:
    del number
    optimizer.zero_grad()
    backward(loss_of(model, batch))
    optimizer.step()


def _accumulating(
    optimizer: DistributedOptimizer, model: nn.Module, batch: list[Tensor], number: int
) -> None:
    optimizer.zero_grad()
    with optimizer.no_sync() if number else nullcontext():
        if number:
            backward(loss_of(model, batch) / 2)
    backward(loss_of(model, batch) / 2)
    optimizer.step()


def _scaled(
    optimizer: DistributedOptimizer, model: nn.Module, batch: list[Tensor], number: int
) -> None:
    del number
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    optimizer.zero_grad()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = loss_of(model, batch)
    backward(scaler.scale(loss))
    scaler.step(optimizer)


def _on_a_side_stream(
    optimizer: DistributedOptimizer, model: nn.Module, batch: list[Tensor], number: int
) -> None:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call] # torch's own
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _plain(optimizer, model, batch, number)
    torch.cuda.current_stream().wait_stream(side)


def _script(
    body: Body,
    dtype: torch.dtype = torch.float32,
    wire: str = "float32",
    consistency: str = "sync",
) -> tuple[dict[str, bytes], Overlap]:
    """Three epochs on the GPU: every bit that they end with, and whether parts left early."""
    model = _Model().to("cuda", dtype)
    optimizer = ps.DistributedOptimizer(
        adamw(parameters_of(model)), model, wire=wire, consistency=consistency
    )
    for epoch in range(3):
        model.later.requires_grad_(epoch > 0)
        for number, batch in enumerate(ps.batches(dataset(), BATCH, epoch, drop_last=True)):
            inputs, targets = (tensor.cuda() for tensor in batch)
            body(optimizer, model, [inputs.to(dtype), targets], number)
    found = {name: bits(value.cpu()) for name, value in model.state_dict().items()}
    return found, optimizer.table.pushing.overlap


SCRIPTS: list[Script] = [
    (_plain, torch.float32, Overlap.ON),
    (_plain, torch.bfloat16, Overlap.ON),
    (_accumulating, torch.float32, Overlap.ON),
    (_on_a_side_stream, torch.float32, Overlap.ON),
    (_scaled, torch.float32, Overlap.OFF),  # gradients change between backward and step
]


@LANES
@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("script", SCRIPTS)
def test_copying_beside_the_computing_changes_no_bit(
    script: Script, slots: int, pinned_from: int
) -> None:
    body, dtype, overlap = script
    with _unstaged(), joined(ReferenceJob(slots, part_elements=20)):
        wanted, _ = _script(body, dtype)
    with _poisoned(pinned_from), joined(ReferenceJob(slots, part_elements=20)):
        found, reached = _script(body, dtype)
    assert reached is overlap
    assert found == wanted


@LANES
@pytest.mark.parametrize("wire", ["float32", "bfloat16", "float16"])
def test_a_cluster_makes_the_same_bits_however_copies_are_made(wire: str, pinned_from: int) -> None:
    def run() -> tuple[dict[str, bytes], Overlap]:
        ps.init(slots=2)
        try:
            return _script(_plain, wire=wire)
        finally:
            ps.shutdown()

    with _unstaged():
        wanted, _ = run()
    with _poisoned(pinned_from):
        found, reached = run()
    assert reached is Overlap.ON
    assert found == wanted


@LANES
@pytest.mark.parametrize("consistency", ["async", "ssp"])
def test_an_asynchronous_cluster_makes_the_same_bits_however_copies_are_made(
    consistency: str, pinned_from: int
) -> None:
    def run() -> tuple[dict[str, bytes], Overlap]:
        ps.init(slots=2)
        try:
            return _script(_plain, consistency=consistency)
        finally:
            ps.shutdown()

    with _unstaged():
        wanted, _ = run()
    with _poisoned(pinned_from):
        found, _ = run()
    assert found == wanted


def _train(device: str, slots: int) -> dict[str, Tensor]:
    with joined(ReferenceJob(slots, part_elements=20)):
        model = _network().to(device)
        optimizer = ps.DistributedOptimizer(adamw(parameters_of(model)), model)
        for epoch in range(2):
            for batch in ps.batches(dataset(), BATCH, epoch):
                optimizer.zero_grad()
                backward(loss_of(model, [tensor.to(device) for tensor in batch]))
                optimizer.step()
        assert optimizer.table.pushing.overlap is Overlap.ON
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


def test_a_backward_that_is_captured_into_a_graph_is_refused() -> None:
    slots = Slots(Case(Dtype.FLOAT32, torch.float32, 0.5), "cuda")
    slots.begin(0)
    slots.end()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(UnsupportedError, match="CUDA graph"), torch.cuda.graph(graph):
        slots.begin(1)
