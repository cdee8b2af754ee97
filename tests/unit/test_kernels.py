"""Compiled folds: they have the bits of torch's, and nobody needs them."""

import importlib
import importlib.util
import logging
import threading

import pytest
import torch
from torch import Tensor

from treefold.common import kernels as module
from treefold.common.fold import Folder, Payload
from treefold.common.kernels import WORTH_ELEMENTS, Compiler, Kernels, Scaled

SIZES = [1, 2, 15, 16, 17, 2_047, 2_049, 65_536, 70_001]
SCALES = [(0.3, 0.7), (1.0, 0.1), (1 / 3, 1.0), (1e-30, 1e30)]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    """Compiled once."""
    return Kernels()


@pytest.fixture
def compiler(kernels: Kernels) -> Compiler:
    """One that is done."""
    made = Compiler()
    made.kernels = kernels
    return made


def values(count: int, seed: int) -> Tensor:
    """Numbers of all sizes, and what is odd."""
    made = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-140, 120, (count,), generator=made).float()
    found = torch.randn(count, generator=made) * torch.exp2(exponents)
    for number, odd in enumerate((-0.0, 0.0, float("inf"), 1e-45, -3e38)):
        if number + 10 * seed < count:
            found[number + 10 * seed] = odd
    return found


def bits(tensor: Tensor) -> Tensor:
    """For comparing: NaN is equal to itself, and 0.0 is not -0.0."""
    return tensor.view(torch.int32)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("where", ["apart", "left", "right"])
def test_a_compiled_fold_has_the_bits_of_torch(
    compiler: Compiler, count: int, scales: tuple[float, float], where: str
) -> None:
    found = []
    for one in (None, compiler):
        left, right = values(count, 1), values(count, 2)
        out = {"apart": torch.empty(count), "left": left, "right": right}[where]
        Folder(one).fold(Payload(left, scales[0]), Payload(right, scales[1]), out)
        found.append(out)
    assert torch.equal(bits(found[0]), bits(found[1]))


@pytest.mark.parametrize("count", SIZES)
def test_what_is_measured_on_the_way_is_right_and_the_fold_the_same(
    compiler: Compiler, count: int
) -> None:
    left, right = torch.randn(count), torch.randn(count)
    out, wanted = torch.empty(count), torch.empty(count)
    one, other = Payload(left, 0.25), Payload(right, 1 / 3)
    sums = Folder(compiler).fold_measured(one, other, out, 1_000)
    Folder().fold(one, other, wanted)
    assert torch.equal(bits(out), bits(wanted))
    assert sums is not None
    for tensor, found in zip((left, right), sums, strict=True):
        right_ones = [float(block.double().square().sum()) for block in torch.split(tensor, 1_000)]
        assert found == pytest.approx(right_ones, rel=1e-4)


def test_what_float32_cannot_hold_is_infinite(kernels: Kernels) -> None:
    big, out = torch.full((100,), 1e30), torch.empty(100)
    sums, _ = kernels.fold_measured((big, 1.0), (torch.ones(100), 1.0), out, 50)
    assert sums == [float("inf")] * 2


@pytest.mark.parametrize("case", ["narrow", "gaps", "over the left one", "over the right one"])
def test_what_compiled_folds_cannot_do_is_left_to_torch(compiler: Compiler, case: str) -> None:
    dtype = torch.bfloat16 if case == "narrow" else torch.float32
    left, right = torch.randn(2, 100).to(dtype).unbind()
    out = torch.empty(100, dtype=dtype)
    if case == "gaps":
        right = torch.randn(200)[::2]
    elif case != "narrow":
        out = left if "left" in case else right
    one, other = Payload(left, 0.5), Payload(right, 0.25)
    folder = Folder(compiler)
    assert folder.fold_measured(one, other, out, 100) is None
    wanted = torch.empty(100, dtype=dtype)
    Folder().fold(one, other, wanted)
    folder.fold(one, other, out)
    assert torch.equal(out, wanted)


def compiling() -> list[threading.Thread]:
    """Threads that compile."""
    return [one for one in threading.enumerate() if one.name == "treefold-compile"]


def test_it_is_compiled_in_a_thread_of_its_own_once_so_much_was_folded_that_it_pays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "WORTH_ELEMENTS", 2_500)
    compiler = Compiler()
    folder = Folder(compiler)
    one, other, out = (
        Payload(torch.randn(1_000), 0.5),
        Payload(torch.randn(1_000)),
        torch.empty(1_000),
    )
    for _ in range(2):
        folder.fold(one, other, out)
    assert not compiling()
    folder.fold(one, other, out)
    for thread in compiling():
        thread.join()
    assert compiler.kernels is not None
    assert not compiling()


def test_folds_of_what_is_not_scaled_are_one_pass_anyway() -> None:
    compiler = Compiler()
    before = compiler._left
    folder = Folder(compiler)
    folder.fold(Payload(torch.randn(10)), Payload(torch.randn(10)), torch.empty(10))
    assert compiler._left == before == WORTH_ELEMENTS


def test_without_numba_torch_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    compiler = Compiler()
    compiler.count(2 * WORTH_ELEMENTS)
    assert not compiling()
    assert compiler.kernels is None


def test_if_it_cannot_be_compiled_the_log_says_why_and_torch_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(name: str) -> object:
        raise ImportError(f"{name} needs another numpy")

    monkeypatch.setattr(importlib, "import_module", broken)
    compiler = Compiler()
    with caplog.at_level(logging.WARNING):
        compiler.compile()
    assert compiler.kernels is None
    assert "needs another numpy" in caplog.text


def test_a_compiler_with_other_bits_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fused(self: Kernels, left: Scaled, right: Scaled, out: Tensor) -> None:
        del self
        out.copy_((left[0].double() * left[1] + right[0].double() * right[1]).float())

    monkeypatch.setattr(Kernels, "fold", fused)
    compiler = Compiler()
    with caplog.at_level(logging.WARNING):
        compiler.compile()
    assert compiler.kernels is None
    assert "other bits than torch" in caplog.text
