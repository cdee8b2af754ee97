"""What a job keeps beside its tensors, as workers hand it over and checkpoints keep it.

Servers and the scheduler do not look into it. Plain values, without any tensor.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from treefold.common.spec import ELEMENTS_MAX, RANK_MAX, TENSORS_MAX, Name, TableSpec


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
    before : Schedule or None
        With a quorum: what the last round of the plan began with, which rounds of late batches
        begin with too. They leave the schedule as it is.
    """

    schedule: Schedule
    moving: list[int]
    opaque: dict[int, bytes]
    before: Schedule | None = None


class Applied(msgspec.Struct, frozen=True, array_like=True):
    """What goes with a version of a shard of an asynchronous table: what has been applied to it.

    A contribution ``(round, slot)`` is applied once, and those of a slot in the order of rounds, so
    that one number per slot says which ones are in.

    Attributes
    ----------
    clocks : list of int
        For every slot that has contributed, the round after its last one.
    last : (int, int, int)
        Round, slot and sender of the contribution that made this version.
    front : int
        The furthest round of all.
    record : bytes
        The `RoundState` that a contribution of that round left.
    """

    clocks: list[int]
    last: tuple[int, int, int]
    front: int
    record: bytes


NOTHING_APPLIED = Applied([], (0, 0, 0), -1, b"")
_applied = msgspec.msgpack.Decoder(Applied)


def decode_applied(state: bytes) -> Applied:
    """What the state of a version of an asynchronous table says; version 0 has none."""
    return _applied.decode(state) if state else NOTHING_APPLIED


class Progress(msgspec.Struct, frozen=True, array_like=True):
    """What goes with a version of a table whose rounds go on without the last slots.

    A batch is what one slot computes in one round of the plan, and has the name ``(round, slot)``.

    Attributes
    ----------
    next : int
        The first round of the plan that has not been tried yet.
    again : list of (int, int)
        Batches that came too late for their round, and are still to be computed again.
    missed : int
        How many came too late since the job began.
    record : bytes
        The `RoundState` that the first slot in the last round left.
    """

    next: int
    again: list[tuple[int, int]]
    missed: int
    record: bytes


NO_PROGRESS = Progress(0, [], 0, b"")
_progress = msgspec.msgpack.Decoder(Progress)


def decode_progress(state: bytes) -> Progress:
    """What the state of a version of such a table says; version 0 has none."""
    return _progress.decode(state) if state else NO_PROGRESS


class Watched(msgspec.Struct, frozen=True, array_like=True):
    """What goes with a version of a table whose contributions are looked at.

    Attributes
    ----------
    norms : list of float
        Logarithms of the norms of the newest contributions, the oldest first.
    record : bytes
        The `RoundState` that slot 0 left.
    """

    norms: list[float]
    record: bytes


NOTHING_WATCHED = Watched([], b"")
_watched = msgspec.msgpack.Decoder(Watched)


def decode_watched(state: bytes) -> Watched:
    """What the state of a version of such a table says; version 0 has none."""
    return _watched.decode(state) if state else NOTHING_WATCHED


def record_of(spec: TableSpec, state: bytes) -> bytes:
    """The encoded `RoundState` in the state of a version; empty if there is none."""
    if spec.is_asynchronous:
        return decode_applied(state).record
    if spec.is_quorum:
        return decode_progress(state).record
    return decode_watched(state).record if spec.is_gathered else state


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
