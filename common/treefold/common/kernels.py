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

    def fold(
        self, left: Tensor, left_scale: float, right: Tensor, right_scale: float, out: Tensor
    ) -> None:
        """Write ``left * left_scale + right * right_scale`` to ``out``.

        Parameters
        ----------
        left, right, out : Tensor, float32 [n]
            ``out`` may be ``left``, and overlaps with nothing else.
        left_scale, right_scale : float
            Rounded to float32.
        """
        at = left.data_ptr(), left_scale, right.data_ptr(), right_scale
        if out.data_ptr() == at[0]:
            self._fold_into(*at, out.numel())
        else:
            self._fold(*at, out.data_ptr(), out.numel())

    def fold_measured(
        self,
        left: tuple[Tensor, float],
        right: tuple[Tensor, float],
        out: Tensor,
        block: int,
    ) -> tuple[list[float], list[float]]:
        """Do as `fold`, and sum the squares of both operands, not scaled, block by block.

        Parameters
        ----------
        left, right : (Tensor, float)
            Values, float32 [n], and what they are multiplied with.
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
        sums = (ctypes.c_double * blocks)(), (ctypes.c_double * blocks)()
        at = left[0].data_ptr(), left[1], right[0].data_ptr(), right[1], out.data_ptr()
        self._fold_measured(*at, elements, block, *map(ctypes.addressof, sums))
        return list(sums[0]), list(sums[1])

    def _check(self) -> None:
        """Compare with torch."""
        left, right = torch.randn(2, _CHECKED, generator=torch.Generator().manual_seed(0)).unbind()
        odd = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 3e38, float("inf"), 1e-38])
        left[: len(odd)] = odd
        right[2 : 2 + len(odd)] = odd
        for one, other in ((0.3, 0.7), (1.0, 1 / 3), (0.5, 0.5)):
            wanted = (left * one).add_(right * other)
            apart, into, measured = torch.empty(_CHECKED), left.clone(), torch.empty(_CHECKED)
            self.fold(left, one, right, other, apart)
            self.fold(into, one, right, other, into)
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
