"""Folding: one addition, always in the same order, and never into a received frame."""

import struct
import warnings

import pytest
import torch
from torch import Tensor

from treefold.common.errors import DataError
from treefold.common.fold import Folder, Payload, view_frame
from treefold.common.spec import Dtype


def _values(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def fold(left: Tensor, right: Tensor, out: Tensor, scales: tuple[float, float] = (1, 1)) -> None:
    """One fold of payloads."""
    Folder().fold(Payload(left, scales[0]), Payload(right, scales[1]), out)


def _frame(values: Tensor) -> bytes:
    return struct.pack(f"<{values.numel()}f", *values.tolist())


def test_a_fold_is_the_float32_sum_of_left_and_right() -> None:
    left, right, out = _values(1000, 1), _values(1000, 2), torch.empty(1000)
    fold(left, right, out)
    assert torch.equal(out, left + right)


def test_a_fold_may_be_written_over_its_left_operand() -> None:
    left, right = _values(1000, 1), _values(1000, 2)
    wanted = left + right
    fold(left, right, left)
    assert torch.equal(left, wanted)


def test_minus_zero_changes_no_bit_of_what_it_is_added_to() -> None:
    left = torch.tensor([-0.0, 0.0, 1e-45, -3.0])
    out = torch.empty(4)
    fold(left, torch.full((4,), -0.0), out)
    assert torch.equal(out.view(torch.int32), left.view(torch.int32))


def test_plus_zero_would_change_a_bit() -> None:
    left, out = torch.tensor([-0.0]), torch.empty(1)
    fold(left, torch.zeros(1), out)
    assert not torch.equal(out.view(torch.int32), left.view(torch.int32))


def test_the_order_of_a_fold_of_three_shows_in_its_bits() -> None:
    a, b, c = _values(1000, 1), _values(1000, 2), _values(1000, 3)
    left_first, right_first = torch.empty(1000), torch.empty(1000)
    fold(a, b, left_first)
    fold(left_first, c, left_first)
    fold(b, c, right_first)
    fold(a, right_first, right_first)
    assert not torch.equal(left_first, right_first)


def test_a_received_frame_is_viewed_without_a_copy() -> None:
    frame = bytearray(_frame(torch.tensor([1.0, -2.5])))
    view = view_frame(frame)
    frame[:4] = struct.pack("<f", 7.0)
    assert view.tolist() == [7.0, -2.5]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_bytes_are_viewed_without_a_warning(kind: type) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert view_frame(kind(_frame(torch.tensor([0.5, 3.0])))).tolist() == [0.5, 3.0]


def test_a_frame_at_an_odd_address_folds_to_the_same_bits() -> None:
    values, right, out = _values(1001, 1), _values(1001, 2), torch.empty(1001)
    view = view_frame(memoryview(b"x" + _frame(values))[1:])
    fold(view, right, out)
    assert view.data_ptr() % 4 != 0
    assert torch.equal(out, values + right)


def test_an_empty_frame_is_an_empty_tensor() -> None:
    assert view_frame(b"").shape == (0,)


def test_a_frame_that_is_no_whole_number_of_values_is_refused() -> None:
    with pytest.raises(DataError, match="7 bytes"):
        view_frame(bytes(7))


def test_a_fold_of_received_frames_leaves_them_as_they_came() -> None:
    left, right = bytearray(_frame(_values(100, 1))), bytearray(_frame(_values(100, 2)))
    before = bytes(left), bytes(right)
    fold(view_frame(left), view_frame(right), torch.empty(100))
    assert (bytes(left), bytes(right)) == before


@pytest.mark.parametrize("where", [slice(0, 100), slice(10, 20)])
def test_a_fold_into_a_received_frame_is_refused_before_it_writes(where: slice) -> None:
    frame = bytearray(_frame(_values(100, 1)))
    before = bytes(frame)
    view = view_frame(frame)[where]
    with pytest.raises(DataError, match="received frame"):
        fold(view, torch.ones_like(view), view)
    assert bytes(frame) == before


def test_without_the_refusal_the_frame_would_have_been_written() -> None:
    frame = bytearray(_frame(_values(100, 1)))
    before = bytes(frame)
    view = torch.frombuffer(frame, dtype=torch.float32)
    torch.add(view, torch.ones(100), out=view)
    assert bytes(frame) != before


def test_torch_itself_reports_a_write_to_a_received_frame() -> None:
    view = view_frame(bytearray(8))
    with pytest.raises(RuntimeError, match="inference tensor"):
        view.add_(1.0)


@pytest.mark.parametrize(
    ("left", "right", "out"),
    [
        (torch.zeros(3), torch.zeros(1), torch.zeros(3)),
        (torch.zeros(3), torch.zeros(3), torch.zeros(4)),
        (torch.zeros(3, dtype=torch.float64), torch.zeros(3), torch.zeros(3)),
        (torch.zeros(3), torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)),
    ],
)
def test_a_fold_of_unlike_tensors_is_refused(left: Tensor, right: Tensor, out: Tensor) -> None:
    with pytest.raises(DataError, match="one wire type and of one shape"):
        fold(left, right, out)


@pytest.mark.parametrize("scales", [(0.3, 1.0), (1.0, 0.3), (0.3, 0.7), (1 / 3, 1 / 3)])
@pytest.mark.parametrize("place", ["left", "right", "other"])
def test_scales_are_roundings_of_their_own(scales: tuple[float, float], place: str) -> None:
    left, right = _values(100_003, 1), _values(100_003, 2)
    wanted = (left * scales[0]) + (right * scales[1])
    out = {"left": left, "right": right, "other": torch.empty_like(left)}[place]
    fold(left, right, out, scales)
    assert torch.equal(out, wanted)


def test_a_fused_multiply_add_would_round_otherwise() -> None:
    left, right = _values(100_003, 1), _values(100_003, 2)
    assert not torch.equal(torch.add(left, right, alpha=0.3), left + right * 0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_fold_is_the_float32_sum_rounded_once(dtype: torch.dtype) -> None:
    left, right = _values(100_003, 1).to(dtype), _values(100_003, 2).to(dtype)
    out = torch.empty_like(left)
    fold(left, right, out)
    assert torch.equal(out, (left.float() + right.float()).to(dtype))


def test_a_narrow_frame_is_viewed_as_what_it_is() -> None:
    values = torch.tensor([1.0, -2.5]).bfloat16()
    frame = values.view(torch.uint8).numpy().tobytes()
    assert torch.equal(view_frame(frame, Dtype.BFLOAT16), values)
