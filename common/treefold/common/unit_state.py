"""The state of one unit as it travels and is kept: a header that describes it, and one flat tensor.

The flat tensor has the unit's values, then the state tensors of each run in the order in which the
header names them. All of them are float32. A header comes from a peer or from a file, so that
nothing in it is believed before it is checked.
"""

import math
from typing import Annotated, NamedTuple

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from treefold.common.errors import DataError, UnsupportedError
from treefold.common.spec import ELEMENTS_MAX

Position = Annotated[int, Meta(ge=0, le=ELEMENTS_MAX)]
Key = Annotated[str, Meta(max_length=64)]

SCALARS = {"float32": torch.float32, "float64": torch.float64, "int64": torch.int64}
"""Tensors without dimensions, by the name of their type."""


class Scalar(msgspec.Struct, frozen=True, array_like=True):
    """A counter: a number of Python if ``kind`` is empty, else a tensor of that type."""

    kind: Annotated[str, Meta(max_length=8)]
    value: int | float


class RunState(msgspec.Struct, frozen=True, array_like=True):
    """What the optimizer keeps of elements ``[start, stop)`` of a table's flat space.

    Tensors are given by their shapes; those of an elementwise optimizer have one element each.
    """

    start: Position
    stop: Position
    scalars: dict[Key, Scalar]
    tensors: dict[Key, Annotated[list[Position], Meta(max_length=16)]]


class UnitHeader(msgspec.Struct, frozen=True, array_like=True):
    """What a unit's flat tensor has in it: values of ``[start, stop)``, then the runs' tensors."""

    start: Position
    stop: Position
    runs: list[RunState]


class UnitState(NamedTuple):
    """The state of one unit: float32 ``flat`` [elements of everything], described by ``header``."""

    header: UnitHeader
    flat: Tensor


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(UnitHeader)


def encode_header(header: UnitHeader) -> bytes:
    """Bytes of a header."""
    return _encoder.encode(header)


def decode_header(header: bytes) -> UnitHeader:
    """A header from its bytes.

    Raises
    ------
    DataError
        They are no header, or one whose runs do not lie one after the other inside the unit.
    """
    try:
        found = _decoder.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise DataError(f"not the header of a unit's state: {error}") from error
    at = found.start
    for run in found.runs:
        if not at <= run.start <= run.stop <= found.stop:
            text = f"a run [{run.start}, {run.stop}) of a unit [{found.start}, {found.stop})"
            raise DataError(f"{text} that comes after {at}")
        at = run.stop
    return found


def flat_elements(header: UnitHeader) -> int:
    """Elements of the flat tensor that a header describes."""
    tensors = [math.prod(shape) for run in header.runs for shape in run.tensors.values()]
    return header.stop - header.start + sum(tensors)


def pack(start: int, values: Tensor, states: list[tuple[int, int, dict[str, object]]]) -> UnitState:
    """Put a unit's values and what its optimizer keeps into one tensor.

    Parameters
    ----------
    start : int
        Its first element in the table's flat space.
    values : Tensor, float32 [unit]
        Its values.
    states : list of (start, stop, state)
        What the optimizer keeps of each run, empty before the first step.

    Raises
    ------
    UnsupportedError
        The optimizer keeps something that is neither a number nor a float32 tensor.
    """
    runs: list[RunState] = []
    tensors = [values.reshape(-1)]
    for first, stop, state in states:
        scalars: dict[str, Scalar] = {}
        shapes: dict[str, list[int]] = {}
        for key in sorted(state):
            value = state[key]
            if isinstance(value, Tensor) and value.dim() > 0:
                _check_float32(key, value)
                shapes[key] = list(value.shape)
                tensors.append(value.reshape(-1))
            elif value is not None:
                scalars[key] = _scalar(key, value)
        runs.append(RunState(first, stop, scalars, shapes))
    header = UnitHeader(start, start + values.numel(), runs)
    return UnitState(header, torch.cat(tensors))


def unpack(state: UnitState) -> tuple[Tensor, list[tuple[int, int, dict[str, object]]]]:
    """The values and the runs' states that `pack` put together; copies of the state tensors.

    Raises
    ------
    DataError
        The tensor does not have as many elements as the header says, or a type is unknown.
    """
    header, flat = state
    if flat.numel() != flat_elements(header) or flat.dtype is not torch.float32:
        text = f"a unit's state of {flat.numel()} elements of {flat.dtype}"
        raise DataError(f"{text}, expected {flat_elements(header)} of float32")
    at = header.stop - header.start
    values, states = flat[:at], []
    for run in header.runs:
        found: dict[str, object] = {key: _value(one) for key, one in run.scalars.items()}
        for key, shape in run.tensors.items():
            count = math.prod(shape)
            found[key] = flat[at : at + count].clone().reshape(shape)
            at += count
        states.append((run.start, run.stop, found))
    return values, states


def _scalar(key: str, value: object) -> Scalar:
    if isinstance(value, Tensor):
        kinds = [kind for kind, dtype in SCALARS.items() if dtype is value.dtype]
        if kinds:
            return Scalar(kinds[0], value.item())
    elif type(value) in (int, float):
        return Scalar("", value)  # type: ignore[arg-type]  # the types are just those
    raise UnsupportedError(f"the optimizer keeps {key!r}, which is {value!r}")


def _value(scalar: Scalar) -> object:
    if not scalar.kind:
        return scalar.value
    dtype = SCALARS.get(scalar.kind)
    if dtype is None:
        raise DataError(f"a counter of type {scalar.kind!r}, there are {', '.join(SCALARS)}")
    return torch.tensor(scalar.value, dtype=dtype)


def _check_float32(key: str, value: Tensor) -> None:
    if value.dtype is not torch.float32:
        raise UnsupportedError(f"the optimizer keeps {key!r} as {value.dtype}, not as float32")
