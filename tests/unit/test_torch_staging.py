"""Gradients out of an accelerator and parameters into it, whose copies are done late."""

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.support.accelerator import POISON, FakeDevice, accelerated
from tests.support.contributions import Case, Slots, numbers, poisoned
from tests.support.reference import bits
from treefold.common.spec import Dtype
from treefold.torch.inward import Inward
from treefold.torch.pushing import Overlap
from treefold.torch.staging import Copy, Outward
from treefold.transport import segments

SEEDS = range(25)  # of the order in which streams get on
RING_BYTES = 64
GATHERED_BYTES = 192
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
LANES = pytest.mark.parametrize("is_pinned", [True, False], ids=["in place", "through the ring"])


def _outward(device: FakeDevice) -> Outward:
    with accelerated(device, RING_BYTES):
        return Outward(device)


def _inward(device: FakeDevice) -> Inward:
    with accelerated(device, RING_BYTES):
        return Inward(device)


def _nothing() -> None:
    pass


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)


# ---- gradients out -------------------------------------------------------------------------------


@LANES
def test_what_is_sent_is_handed_over_when_it_is_there_and_not_before(is_pinned: bool) -> None:
    device = FakeDevice()
    outward = _outward(device)
    source, target = numbers(40), poisoned(40)
    handed: list[bytes] = []
    outward.send(
        [Copy(source, target, 1.0)],
        is_pinned=is_pinned,
        hand=lambda: handed.append(bits(target)),
    )
    assert handed == []
    outward.drain()
    assert handed == [bits(source)]
    assert outward.is_idle


@LANES
@pytest.mark.parametrize("seed", SEEDS)
def test_a_copy_waits_for_all_streams_that_gradients_are_computed_on(
    seed: int, is_pinned: bool
) -> None:
    device = FakeDevice(seed)
    outward = _outward(device)
    other = device.another()
    values = numbers(48)
    source, target = poisoned(48), poisoned(48)
    with device.on(other):
        other.do(partial(_copy, source[:24], values[:24]))
        outward.note()
    device.computing.do(partial(_copy, source[24:], values[24:]))
    outward.send([Copy(source, target, 1.0)], is_pinned=is_pinned, hand=_nothing)
    outward.drain()
    assert bits(target) == bits(values)


@LANES
@pytest.mark.parametrize("seed", SEEDS)
def test_backward_goes_on_while_copies_are_late_and_all_arrive_in_order(
    seed: int, is_pinned: bool
) -> None:
    device = FakeDevice(seed)
    outward = _outward(device)
    values = numbers(600)
    source, target = poisoned(600), poisoned(600)
    handed: list[int] = []

    def hand(at: int) -> None:
        assert bits(target[at : at + 60]) == bits(values[at : at + 60])
        handed.append(at)

    for at in range(540, -1, -60):
        device.computing.do(partial(_copy, source[at : at + 60], values[at : at + 60]))
        copies = [
            Copy(source[at : at + 20], target[at : at + 20], 1.0),
            Copy(source[at + 20 : at + 60], target[at + 20 : at + 60], 1.0),
        ]
        outward.send(copies, is_pinned=is_pinned, hand=partial(hand, at))
        outward.poll()
    assert device.waits == 0, "a hook waited for the accelerator"
    outward.drain()
    assert handed == list(range(540, -1, -60))
    assert device.made == (0 if is_pinned else 3), "the ring has no bound, or was not used"


@pytest.mark.parametrize("source_dtype", FLOATS)
@pytest.mark.parametrize("target_dtype", FLOATS)
@pytest.mark.parametrize("scale", [1.0, 1 / 3, 0.0625])
def test_a_scaled_and_narrowed_gradient_has_the_bits_of_the_rule(
    source_dtype: torch.dtype, target_dtype: torch.dtype, scale: float
) -> None:
    device = FakeDevice()
    outward = _outward(device)
    source, target = numbers(100, source_dtype), poisoned(100, target_dtype)
    outward.send([Copy(source, target, scale)], is_pinned=True, hand=_nothing)
    outward.drain()
    exact = source.to(torch.float32) * torch.tensor(scale)
    assert bits(target) == bits(exact.to(target_dtype))


def test_what_a_failed_slot_has_left_goes_nowhere() -> None:
    device = FakeDevice()
    outward = _outward(device)
    target = poisoned(400)
    handed: list[int] = []
    outward.send([Copy(numbers(400), target, 1.0)], is_pinned=False, hand=lambda: handed.append(1))
    outward.begin()
    target.fill_(1.0)
    device.finish()
    assert bool((target == 1.0).all()), "a late copy writes to memory that others use by now"
    outward.send([Copy(numbers(40), target[:40], 1.0)], is_pinned=False, hand=_nothing)
    outward.drain()
    assert handed == []
    assert bits(target[:40]) == bits(numbers(40))
    assert device.made == 3, "buffers of the failed slot were lost"


# ---- parameters in -------------------------------------------------------------------------------


def _parts(values: Tensor, size: int) -> list[tuple[int, int, Tensor]]:
    return [
        (at, at + len(piece), piece)
        for at, piece in zip(range(0, values.numel(), size), torch.split(values, size), strict=True)
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_parameters_change_between_what_was_computed_before_and_after(seed: int) -> None:
    device = FakeDevice(seed)
    inward = _inward(device)
    old, new, newest = numbers(200), numbers(201)[1:].clone(), numbers(202)[2:].clone()
    flat = old.clone()
    seen: list[bytes] = []
    for values in (new, newest):
        device.computing.do(lambda: seen.append(bits(flat)))
        given = values.clone()
        inward.load(flat, _parts(given, 9), [])
        given.fill_(torch.nan)  # a received frame is not kept
    device.computing.do(lambda: seen.append(bits(flat)))
    device.finish()
    assert seen == [bits(old), bits(new), bits(newest)]
    assert device.made == 3


@pytest.mark.parametrize("wire", FLOATS)
@pytest.mark.parametrize("model", FLOATS)
def test_parameters_are_rounded_and_widened_as_on_the_host(
    wire: torch.dtype, model: torch.dtype
) -> None:
    device = FakeDevice()
    inward = _inward(device)
    values, flat = numbers(100, wire), poisoned(90, model)
    inward.load(flat, _parts(values, 30), [])
    device.finish()
    assert bits(flat) == bits(values[:90].to(model))


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
def test_servers_memory_is_read_in_place_and_not_after_load_returns(wire: torch.dtype) -> None:
    device = FakeDevice(is_pinnable=True)
    inward = _inward(device)
    values, flat = numbers(300, wire), poisoned(270)
    segment = segments.create("test", 4096)
    lying = segment.body[128 : 128 + 300 * wire.itemsize].view(wire)
    lying.copy_(values)
    inward.load(flat, _parts(lying, 60), [segment])
    segment.body.fill_(POISON)  # the server goes on
    device.finish()
    assert bits(flat) == bits(values[:270].to(torch.float32))
    assert device.launched == 1, "adjacent parts are one copy"
    assert device.made == 0


# ---- contributions of a table --------------------------------------------------------------------


@pytest.mark.parametrize("wire", [Dtype.FLOAT32, Dtype.BFLOAT16, Dtype.FLOAT16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1 / 3])
@LANES
def test_contributions_have_the_bits_of_those_from_the_host(
    wire: Dtype, dtype: torch.dtype, scale: float, is_pinned: bool
) -> None:
    case = Case(wire, dtype, scale)
    wanted = Slots(case).run()
    for seed in SEEDS:
        device = FakeDevice(seed, is_pinnable=is_pinned)
        with accelerated(device, GATHERED_BYTES):
            slots = Slots(case)
            assert slots.run() == wanted
        assert slots.pushing.overlap is Overlap.ON
        assert device.launched < 4 * len(wanted[0]), "adjacent parts are copied together"


def test_parts_leave_while_backward_runs_and_step_brings_the_rest() -> None:
    device = FakeDevice()
    with accelerated(device, 1 << 20):
        slots = Slots(Case(Dtype.FLOAT32, torch.float32, 0.5))
        slots.begin(0)
        assert device.launched == 0, "the first slot shows how the script works"
        slots.end()
        before = device.launched, device.waits
        slots.begin(1)
    assert device.launched > before[0]
    assert device.waits == before[1], "backward waited for the accelerator"
    assert len(slots.end()) == len(slots.client.parts(0))


def test_closing_waits_for_copies_that_nobody_will_take() -> None:
    device = FakeDevice(is_pinnable=True)
    with accelerated(device, GATHERED_BYTES):
        slots = Slots(Case(Dtype.FLOAT32, torch.float32, 0.5))
        slots.begin(0)
        slots.end()
        slots.begin(1)
    handed = len(slots.client.handed)
    slots.pushing.close()
    assert not device.work_on(), "the accelerator still writes to memory that will be gone"
    assert len(slots.client.handed) == handed
