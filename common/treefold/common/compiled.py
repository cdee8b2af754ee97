"""Loops over memory that numba compiles, when this module is imported: that takes a second or two.

They take addresses of float32 values that do not overlap, and of four float64 ``numbers``: what
the left and what the right operand is multiplied with, how many elements there are, and how many a
block has. A product is rounded before it is added, since numba does not fuse the two unless it is
told to.
"""

from ctypes import c_void_p

import numpy as np
from numba import carray, cfunc, njit  # type: ignore[attr-defined] # says nothing of carray
from numpy.typing import NDArray

PIECE = 2_048  # elements of each operand that stay in the first-level cache from pass to pass


@njit("float32(float32[::1])", fastmath={"reassoc"}, error_model="numpy")
def _squares(values: NDArray[np.float32]) -> np.float32:
    """The sum of squares, in whatever order is fast."""
    total = np.float32(0.0)
    for i in range(values.size):
        total += values[i] * values[i]
    return total


@cfunc("void(voidptr, voidptr, voidptr, voidptr)", error_model="numpy")
def fold(left: c_void_p, right: c_void_p, out: c_void_p, numbers: c_void_p) -> None:
    """Write the sum of both operands, each multiplied with its number, to ``out``."""
    known = carray(numbers, 4, np.float64)
    one, other, count = np.float32(known[0]), np.float32(known[1]), int(known[2])
    a, b = carray(left, count, np.float32), carray(right, count, np.float32)
    c = carray(out, count, np.float32)
    for i in range(count):
        c[i] = a[i] * one + b[i] * other


@cfunc("void(voidptr, voidptr, voidptr)", error_model="numpy")
def fold_into(left: c_void_p, right: c_void_p, numbers: c_void_p) -> None:
    """Do as `fold`, and write to ``left``."""
    known = carray(numbers, 4, np.float64)
    one, other, count = np.float32(known[0]), np.float32(known[1]), int(known[2])
    a, b = carray(left, count, np.float32), carray(right, count, np.float32)
    for i in range(count):
        a[i] = a[i] * one + b[i] * other


@cfunc("void(voidptr, voidptr, voidptr, voidptr, voidptr)", error_model="numpy")
def fold_measured(
    left: c_void_p, right: c_void_p, out: c_void_p, numbers: c_void_p, sums: c_void_p
) -> None:
    """Do as `fold`, and sum squares block by block: float64, of ``left`` and then of ``right``."""
    known = carray(numbers, 4, np.float64)
    one, other = np.float32(known[0]), np.float32(known[1])
    count, block = int(known[2]), int(known[3])
    a, b = carray(left, count, np.float32), carray(right, count, np.float32)
    c = carray(out, count, np.float32)
    blocks = (count + block - 1) // block
    totals = carray(sums, 2 * blocks, np.float64)
    for number in range(blocks):
        mine, others = np.float64(0.0), np.float64(0.0)
        end = min((number + 1) * block, count)
        for start in range(number * block, end, PIECE):
            stop = min(start + PIECE, end)
            x, y, z = a[start:stop], b[start:stop], c[start:stop]  # offsets would be slow
            for i in range(x.size):
                z[i] = x[i] * one + y[i] * other
            mine += np.float64(_squares(x))
            others += np.float64(_squares(y))
        totals[number], totals[blocks + number] = mine, others
