"""When folds are compiled by numba, and how compiled ones are called.

Nobody needs them: where numba is not installed, and until it has compiled, torch does the same in
more passes over memory, with the same bits. They are compiled in a thread of its own, and only by
who has folded so much that it pays.
"""

import ctypes
import importlib
import importlib.util
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from treefold.common.errors import UnsupportedError
from treefold.common.log import logger

if TYPE_CHECKING:
    from collections.abc import Callable

WORTH_ELEMENTS = 1 << 29
"""Compiling takes a second or two and 50 MB; torch folds so many elements in less than a second."""
Scaled = tuple[Tensor, float]
_CHECKED = 1_000


class Kernels:
    """Compiled loops over float32 tensors without gaps.

    Raises
    ------
    ImportError
        There is no numba, or it does not work here.
    UnsupportedError
        What it compiles has other bits than torch.
    """

    def __init__(self) -> None:
        compiled: Any = importlib.import_module("treefold.common.compiled")
        self._fold: Callable[..., None] = compiled.fold.ctypes
        self._fold_into: Callable[..., None] = compiled.fold_into.ctypes
        self._fold_measured: Callable[..., None] = compiled.fold_measured.ctypes
        self._check()

    def fold(self, left: Scaled, right: Scaled, out: Tensor) -> None:
        """Write the sum of two operands to ``out``.

        Parameters
        ----------
        left, right : (Tensor, float)
            Values, float32 [n], and what they are multiplied with, rounded to float32.
        out : Tensor, float32 [n]
            May be the left one, and overlaps with nothing else.
        """
        one, other = left[0].data_ptr(), right[0].data_ptr()
        numbers = (ctypes.c_double * 4)(left[1], right[1], out.numel(), 0)
        if out.data_ptr() == one:
            self._fold_into(one, other, ctypes.addressof(numbers))
        else:
            self._fold(one, other, out.data_ptr(), ctypes.addressof(numbers))

    def fold_measured(
        self, left: Scaled, right: Scaled, out: Tensor, block: int
    ) -> tuple[list[float], list[float]]:
        """Do as `fold`, and sum the squares of both operands, not scaled, block by block.

        Parameters
        ----------
        left, right : (Tensor, float)
            As for `fold`.
        out : Tensor, float32 [n]
            Overlaps with neither.
        block : int
            Elements of a block; the last one may be shorter.

        Returns
        -------
        (list of float, list of float)
            Of ``left`` and of ``right``. To a few digits: the order of summing is not said, and
            what float32 cannot hold is infinite.
        """
        elements = out.numel()
        blocks = -(-elements // block)
        numbers = (ctypes.c_double * 4)(left[1], right[1], elements, block)
        sums = (ctypes.c_double * (2 * blocks))()
        at = left[0].data_ptr(), right[0].data_ptr(), out.data_ptr()
        self._fold_measured(*at, ctypes.addressof(numbers), ctypes.addressof(sums))
        return sums[:blocks], sums[blocks:]

    def _check(self) -> None:
        """Compare with torch."""
        left, right = torch.randn(2, _CHECKED, generator=torch.Generator().manual_seed(0)).unbind()
        odd = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 3e38, float("inf"), 1e-38])
        left[: len(odd)] = odd
        right[2 : 2 + len(odd)] = odd
        for one, other in ((0.3, 0.7), (1.0, 1 / 3), (0.5, 0.5)):
            wanted = (left * one).add_(right * other)
            apart, into, measured = torch.empty(_CHECKED), left.clone(), torch.empty(_CHECKED)
            self.fold((left, one), (right, other), apart)
            self.fold((into, one), (right, other), into)
            self.fold_measured((left, one), (right, other), measured, _CHECKED)
            for found in (apart, into, measured):
                if not torch.equal(found.view(torch.int32), wanted.view(torch.int32)):
                    raise UnsupportedError("what numba compiles has other bits than torch")


class Compiler:
    """Compiles the kernels once they are worth it.

    Attributes
    ----------
    kernels : Kernels or None
        None until they are there.
    """

    def __init__(self) -> None:
        self.kernels: Kernels | None = None
        self._left = WORTH_ELEMENTS if importlib.util.find_spec("numba") else 0

    def count(self, elements: int) -> None:
        """So many elements were folded without them."""
        if self._left > 0:
            self._left -= elements
            if self._left <= 0:
                threading.Thread(target=self.compile, name="treefold-compile", daemon=True).start()

    def compile(self) -> None:
        """Compile now; if that fails a line in the log says why, and torch goes on folding."""
        log = logger("kernels")
        try:
            self.kernels = Kernels()
        except Exception as error:  # numba has many ways to fail, and none matters
            log.warning("folds are not compiled: %s", error)
        else:
            log.info("folds are compiled from now on")
