"""The one addition of the fold, and received payloads as tensors without a copy.

A received frame belongs to the transport and may not be written; a fold that begins with one puts
its sum elsewhere. Nothing here knows which nodes meet: that is `treefold.common.tree`.
"""

import sys
import warnings

import torch
from torch import Tensor

from treefold.common.errors import DataError, UnsupportedError
from treefold.common.spec import Dtype

with warnings.catch_warnings():
    # torch warns about read-only buffers once per process; `view_frame` guards them by other means.
    warnings.simplefilter("ignore")
    torch.frombuffer(bytes(Dtype.FLOAT32.itemsize), dtype=torch.float32)


def view_frame(frame: bytes | bytearray | memoryview) -> Tensor:
    """A received payload frame as a tensor that shares its memory and may only be read.

    Parameters
    ----------
    frame : bytes-like
        Little-endian float32 values, at any address. The tensor keeps it alive.

    Returns
    -------
    Tensor, float32 [n]
        An inference tensor: it can be an operand anywhere, `fold` refuses to write to it, and torch
        raises if something else has.

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
    if nbytes % Dtype.FLOAT32.itemsize:
        text = f"a payload frame of {nbytes} bytes is not a whole number of float32 values"
        raise DataError(text)
    with torch.inference_mode():
        if nbytes == 0:
            return torch.empty(0)
        return torch.frombuffer(frame, dtype=torch.float32)


def fold(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write ``left + right`` to ``out``: the sum of two sibling nodes, always in this order.

    Parameters
    ----------
    left, right : Tensor, float32 [n]
        The values of the two nodes. Neither is changed, unless it is ``out`` itself.
    out : Tensor, float32 [n]
        Where the sum goes; may be ``left`` or ``right``, but no received frame.

    Raises
    ------
    DataError
        If shapes or dtypes differ, or ``out`` is a received frame; nothing is written then.
    """
    for tensor in (left, right, out):
        if tensor.dtype != torch.float32 or tensor.shape != out.shape:
            text = (
                f"a fold of {tensor.dtype} {list(tensor.shape)} into {out.dtype} "
                f"{list(out.shape)}: all must be float32 and of one shape"
            )
            raise DataError(text)
    if out.is_inference():
        raise DataError("a fold would write to a received frame: give it a buffer as `out`")
    torch.add(left, right, out=out)
