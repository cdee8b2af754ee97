"""What a job keeps beside its tensors, as workers hand it over and checkpoints keep it.

Servers and the scheduler do not look into it. Plain values, without any tensor.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from treefold.common.spec import ELEMENTS_MAX, RANK_MAX, TENSORS_MAX, Name


class Schedule(msgspec.Struct, frozen=True, array_like=True):
    """Hyper-parameters and schedulers of one optimizer at one moment, as plain values.

    Attributes
    ----------
    groups : list of dict
        Every entry of each param group but its parameters.
    schedulers : list of (str, dict)
        Class and state of each scheduler.
    """

    groups: list[dict[str, object]]
    schedulers: list[tuple[str, dict[str, object]]]


class RoundState(msgspec.Struct, frozen=True, array_like=True):
    """What a round starts from beside the tensors; made by slot 0 of the round before.

    Attributes
    ----------
    schedule : Schedule
        Hyper-parameters and learning-rate schedulers.
    moving : list of int
        The float buffers that fold to the mean.
    opaque : dict of int to bytes
        Other buffers, where they differ from what the script began with.
    """

    schedule: Schedule
    moving: list[int]
    opaque: dict[int, bytes]


class OpaqueTensor(msgspec.Struct, frozen=True, array_like=True):
    """A buffer that is no tensor of the table: its name, torch's name of its dtype, its bytes.

    ``dtype`` is ``int64``, ``bool``, ``float64`` ...; ``data`` is what the script began with, in
    C order and little-endian, or empty if that is too much.
    """

    name: Name
    dtype: Annotated[str, Meta(max_length=32)]
    shape: Annotated[list[Annotated[int, Meta(ge=0, le=ELEMENTS_MAX)]], Meta(max_length=RANK_MAX)]
    data: bytes


class ModelRecord(msgspec.Struct, frozen=True, array_like=True):
    """What a model has beside a table's tensors, so that its state dict can be made without it.

    Attributes
    ----------
    model : str
        Name of the first table of the same model.
    opaque : list of OpaqueTensor
        Buffers of kinds that do not fold, in the order of `RoundState.opaque`.
    aliases : dict of str to str
        Further names of a tensor, and the one it stands under in the table.
    hidden : list of str
        Buffers of the table that are not part of the model's state dict.
    """

    model: Name
    opaque: Annotated[list[OpaqueTensor], Meta(max_length=TENSORS_MAX)]
    aliases: dict[Name, Name]
    hidden: Annotated[list[Name], Meta(max_length=TENSORS_MAX)]


RECORD_BYTES_MAX = 4 << 20  # of a `ModelRecord`; larger buffers belong into the table
