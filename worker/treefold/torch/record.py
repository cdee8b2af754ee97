"""What a checkpoint has to know of a model beside its tensors, to be read without its script."""

from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor, nn

from treefold.common.round_state import RECORD_BYTES_MAX, ModelRecord, OpaqueTensor
from treefold.torch.binding import BoundTensor

OPAQUE_BYTES_MAX = RECORD_BYTES_MAX // 2  # of all values together; names and shapes need the rest


def record_of(
    name: str, model: nn.Module, tensors: Sequence[BoundTensor], opaque: Sequence[BoundTensor]
) -> bytes:
    """Describe a table's model.

    Parameters
    ----------
    name : str
        The first table of the model.
    model : nn.Module
        The model.
    tensors : sequence of BoundTensor
        The table's.
    opaque : sequence of BoundTensor
        Buffers that are not; their present values are what the script begins with.

    Returns
    -------
    bytes
        A `ModelRecord`. Values beyond `OPAQUE_BYTES_MAX` are left out.
    """
    shown = model.state_dict(keep_vars=True)
    own = {id(bound.current): bound.name for bound in [*tensors, *opaque]}
    aliases = {
        alias: own[id(tensor)]
        for alias, tensor in shown.items()
        if isinstance(tensor, Tensor) and id(tensor) in own and alias != own[id(tensor)]
    }
    hidden = [bound.name for bound in [*tensors, *opaque] if bound.name not in shown]
    left = OPAQUE_BYTES_MAX
    described: list[OpaqueTensor] = []
    for bound in opaque:
        value = bound.current.detach()
        nbytes = value.numel() * value.element_size()
        data = _bytes(value) if nbytes <= left else b""
        left -= len(data)
        dtype = str(bound.dtype).removeprefix("torch.")
        described.append(OpaqueTensor(bound.name, dtype, list(bound.shape), data))
    return msgspec.msgpack.encode(ModelRecord(name, described, aliases, hidden))


def _bytes(value: Tensor) -> bytes:
    return value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
