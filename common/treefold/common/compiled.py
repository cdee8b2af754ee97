"""Loops over memory that numba compiles, when this module is imported: that takes a second or two.

They take addresses of float32 values that do not overlap. A product is rounded before it is added,
since numba does not fuse the two unless it is told to.
"""

from ctypes import c_void_p

import numpy as np
from numba import carray, cfunc, njit  # type: ignore[attr-defined] # says nothing of carray
from numpy.typing import NDArray

PIECE = 2_048  # elements of each operand that stay in the first-level cache from pass to pass
_SCALED = "voidptr, float32, voidptr, float32"


@njit("float32(float32[::1])", fastmath={"reassoc"}, error_model="numpy")
def _squares(values: NDArray[np.float32]) -> np.float32:
    """The sum of squares, in whatever order is fast."""
    total = np.float32(0.0)
    for i in range(values.size):
        total += values[i] * values[i]
    return total


@cfunc(f"void({_SCALED}, voidptr, int64)", error_model="numpy")
def fold(
    left: c_void_p,
    left_scale: float,
    right: c_void_p,
    right_scale: float,
    out: c_void_p,
    count: int,
) -> None:
    """Write ``left * left_scale + right * right_scale`` to ``out``."""
    a, b = carray(left, count, np.float32), carray(right, count, np.float32)
    c = carray(out, count, np.float32)
    for i in range(count):
        c[i] = a[i] * left_scale + b[i] * right_scale


@cfunc(f"void({_SCALED}, int64)", error_model="numpy")
def fold_into(
    left: c_void_p, left_scale: float, right: c_void_p, right_scale: float, count: int
) -> None:
    """Do as `fold`, and write to ``left``."""
    a, b = carray(left, count, np.float32), carray(right, count, np.float32)
    for i in range(count):
        a[i] = a[i] * left_scale + b[i] * right_scale


@cfunc(f"void({_SCALED}, voidptr, int64, int64, voidptr, voidptr)", error_model="numpy")
def fold_measured(
    left: c_void_p,
    left_scale: float,
    right: c_void_p,
    right_scale: float,
    out: c_void_p,
    count: int,
    block: int,
    left_sums: c_void_p,
    right_sums: c_void_p,
) -> None:
    """Do as `fold`, and sum the squares of both operands block by block, in float64."""
    a, b = carray(left, count, np.float32), carray(right, count, np.float32)
    c = carray(out, count, np.float32)
    blocks = (count + block - 1) // block
    ones, twos = carray(left_sums, blocks, np.float64), carray(right_sums, blocks, np.float64)
    for number in range(blocks):
        ones[number] = twos[number] = 0.0
        end = min((number + 1) * block, count)
        for start in range(number * block, end, PIECE):
            stop = min(start + PIECE, end)
            x, y, z = a[start:stop], b[start:stop], c[start:stop]  # offsets would be slow
            for i in range(x.size):
                z[i] = x[i] * left_scale + y[i] * right_scale
            ones[number] += _squares(x)
            twos[number] += _squares(y)
