"""The one addition of the fold, and received payloads as tensors without a copy.

A received frame belongs to the transport and may not be written; a fold that begins with one puts
its sum elsewhere. Nothing here knows which nodes meet: that is `treefold.common.tree`.
"""

import mmap
import sys
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from treefold.common.errors import DataError, UnsupportedError
from treefold.common.kernels import Compiler, Kernels
from treefold.common.spec import WIRES, Dtype

TORCH_DTYPES = {
    Dtype.FLOAT32: torch.float32,
    Dtype.FLOAT16: torch.float16,
    Dtype.BFLOAT16: torch.bfloat16,
    Dtype.FLOAT64: torch.float64,
    Dtype.INT64: torch.int64,
}

with warnings.catch_warnings():
    # torch warns about read-only buffers once per process; `read_only` guards them by other means.
    warnings.simplefilter("ignore")
    torch.frombuffer(bytes(Dtype.FLOAT32.itemsize), dtype=torch.float32)


def view_frame(frame: bytes | bytearray | memoryview, dtype: Dtype = Dtype.FLOAT32) -> Tensor:
    """A received payload frame as a tensor that shares its memory and may only be read.

    Parameters
    ----------
    frame : bytes-like
        Little-endian values, at any address. The tensor keeps it alive.
    dtype : Dtype
        Of the values.

    Returns
    -------
    Tensor, of that dtype [n]
        An inference tensor: it can be an operand anywhere, `Folder` refuses to write to it, and
        torch raises if something else has.

    Raises
    ------
    DataError
        If the frame is not a whole number of values.
    UnsupportedError
        If this machine is not little-endian.
    """
    if sys.byteorder != "little":
        raise UnsupportedError("tensors travel as little-endian bytes, and this machine is not")
    nbytes = memoryview(frame).nbytes
    if nbytes % dtype.itemsize:
        name = dtype.name.lower()
        text = f"a payload frame of {nbytes} bytes is not a whole number of {name} values"
        raise DataError(text)
    return read_only(frame, TORCH_DTYPES[dtype])


def read_only(buffer: bytes | bytearray | memoryview | mmap.mmap, dtype: torch.dtype) -> Tensor:
    """Memory that is not ours to write as a tensor that may only be read.

    Parameters
    ----------
    buffer : bytes-like or mmap
        The tensor keeps it alive.
    dtype : torch.dtype
        Of the values.

    Returns
    -------
    Tensor, of that dtype [n]
        An inference tensor, as from `view_frame`.
    """
    with torch.inference_mode():
        if memoryview(buffer).nbytes == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(buffer, dtype=dtype)


NODE_DTYPES = tuple(TORCH_DTYPES[dtype] for dtype in WIRES)


def _is_like(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape


class Payload(NamedTuple):
    """The values of one node for one part: each is an element times ``scale``, rounded once.

    The product is a rounding of its own. It is never part of a fused multiply-add, so that it does
    not matter where it is computed.
    """

    tensor: Tensor
    scale: float = 1.0


class Folder:
    """The addition of two sibling nodes. Belongs to one thread.

    Parameters
    ----------
    compiler : Compiler, optional
        Makes it faster after a while, with the same bits.

    Notes
    -----
    Has a buffer of one part, so that a fold allocates nothing.
    """

    def __init__(self, compiler: Compiler | None = None) -> None:
        self._buffer = torch.empty(0)
        self._compiler = compiler

    def fold(self, left: Payload, right: Payload, out: Tensor) -> None:
        """Write ``left + right`` to ``out``: the sum of two sibling nodes, always in this order.

        Parameters
        ----------
        left, right : Payload, of the table's wire type [n]
            The values of the two nodes. Neither is changed, unless it is ``out`` itself.
        out : Tensor, of the same type [n]
            Where the sum goes, rounded once if the type is a narrow one, whose sums torch computes
            in float32; may be the tensor of either, but no received frame.

        Raises
        ------
        DataError
            If shapes or dtypes differ, or ``out`` is a received frame; nothing is written then.
        """
        self._check(left, right, out)
        if left.scale == 1.0 and right.scale == 1.0:
            torch.add(left.tensor, right.tensor, out=out)
        elif (kernels := self._kernels_for(left, right, out)) is not None:
            kernels.fold(left, right, out)
        elif left.scale == 1.0:
            torch.add(left.tensor, self._product(right), out=out)
        elif right.scale == 1.0:
            torch.add(self._product(left), right.tensor, out=out)
        else:
            product = self._product(right)
            torch.mul(left.tensor, left.scale, out=out)
            out.add_(product)

    def fold_measured(
        self, left: Payload, right: Payload, out: Tensor, block: int
    ) -> tuple[list[float], list[float]] | None:
        """Do as `fold`, and sum the squares of both nodes, not scaled, block by block.

        Returns
        -------
        (list of float, list of float) or None
            As `treefold.common.kernels.Kernels.fold_measured` has them. None, and nothing is done,
            if there is no faster way than one after the other.
        """
        self._check(left, right, out)
        kernels = self._kernels_for(left, right, out)
        if kernels is None or out.data_ptr() == left.tensor.data_ptr():
            return None
        return kernels.fold_measured(left, right, out, block)

    def _kernels_for(self, left: Payload, right: Payload, out: Tensor) -> Kernels | None:
        """Compiled kernels, if they are there and can do it."""
        compiler = self._compiler
        if compiler is None:
            return None
        tensors = left.tensor, right.tensor, out
        if compiler.kernels is None:
            compiler.count(out.numel())
            return None
        is_plain = all(one.dtype == torch.float32 and one.is_contiguous() for one in tensors)
        is_apart = out.data_ptr() != right.tensor.data_ptr()
        return compiler.kernels if is_plain and is_apart else None

    def _check(self, left: Payload, right: Payload, out: Tensor) -> None:
        for tensor in (left.tensor, right.tensor):
            if out.dtype not in NODE_DTYPES or not _is_like(tensor, out):
                text = (
                    f"a fold of {tensor.dtype} {list(tensor.shape)} into {out.dtype} "
                    f"{list(out.shape)}: all must be of one wire type and of one shape"
                )
                raise DataError(text)
        if out.is_inference():
            raise DataError("a fold would write to a received frame: give it a buffer as `out`")

    def _product(self, payload: Payload) -> Tensor:
        elements = payload.tensor.numel()
        if self._buffer.numel() < elements or self._buffer.dtype != payload.tensor.dtype:
            self._buffer = torch.empty(elements, dtype=payload.tensor.dtype)
        return torch.mul(payload.tensor, payload.scale, out=self._buffer[:elements])
