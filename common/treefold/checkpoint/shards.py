"""One shard in one safetensors file, and any stretch of a table out of such files again.

A file has ``values/<start>-<stop>`` for every unit and ``<state>/<start>-<stop>`` for every run of
what the optimizer keeps, all float32, named by elements of the table's flat space. Counters stand
in the metadata. Other clusters cut a table elsewhere, so what is read is put together from pieces.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any  # of JSON before it is checked

import msgspec
import torch
from torch import Tensor

from treefold.checkpoint.manifest import FileEntry, TableEntry
from treefold.checkpoint.plain import marked, unmarked
from treefold.checkpoint.store import Store
from treefold.common.errors import CheckpointError, DataError
from treefold.common.layout import Layout, ShardSpan
from treefold.common.spec import Placement, TableSpec
from treefold.common.unit_state import (
    RunState,
    Scalar,
    UnitHeader,
    UnitState,
    decode_header,
    encode_header,
    flat_elements,
)

HEADER_BYTES_MAX = 100_000_000  # what the safetensors library takes
ITEM_BYTES = 4
VALUES = "values"
ALIGNMENT = 8
LENGTH_BYTES = 8


def write_shard(
    store: Store, path: str, spec: TableSpec, units: Sequence[UnitState]
) -> tuple[int, str]:
    """Write a shard to a file of its own.

    Parameters
    ----------
    store : Store
        The folder of checkpoints.
    path : str
        The file's name in it.
    spec : TableSpec
        The table.
    units : sequence of UnitState
        All of the shard, in order.

    Returns
    -------
    (int, str)
        Bytes of the file, and its SHA-256 in hexadecimal.

    Raises
    ------
    CheckpointError
        It cannot be written; nothing is left of it then.
    DataError
        Two tensors would have one name, or their names and shapes do not fit a header.
    """
    header = _header(spec, [unit.header for unit in units])
    digest = hashlib.sha256()
    nbytes = 0
    with store.create(path) as stream:
        for chunk in _chunks(header, units):
            stream.write(chunk)
            digest.update(chunk)
            nbytes += len(chunk)
    return nbytes, digest.hexdigest()


def _chunks(header: bytes, units: Sequence[UnitState]) -> Iterator[memoryview]:
    yield memoryview(len(header).to_bytes(LENGTH_BYTES, "little") + header)
    for unit in units:
        flat = unit.flat.contiguous()
        if flat.numel():
            yield flat.numpy().data.cast("B")


def _header(spec: TableSpec, units: Sequence[UnitHeader]) -> bytes:
    described: dict[str, object] = {}
    at = 0

    def describe(name: str, shape: list[int]) -> None:
        nonlocal at
        if name in described:
            raise DataError(f"table {spec.name!r}: two tensors of a checkpoint would be {name!r}")
        stop = at + math.prod(shape) * ITEM_BYTES
        described[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, stop]}
        at = stop

    for unit in units:
        describe(f"{VALUES}/{unit.start}-{unit.stop}", [unit.stop - unit.start])
        for run in unit.runs:
            for key, shape in run.tensors.items():
                describe(f"{key}/{run.start}-{run.stop}", list(shape))
    plain = json.dumps(marked(msgspec.to_builtins(list(units))), separators=(",", ":"))
    metadata = {"format": "pt", "table": spec.name, "units": plain}
    text = json.dumps({"__metadata__": metadata, **described}, separators=(",", ":")).encode()
    if len(text) > HEADER_BYTES_MAX - ALIGNMENT:
        raise DataError(f"table {spec.name!r}: a header of {len(text)} bytes is too long")
    return text + b" " * (-len(text) % ALIGNMENT)


@dataclass(frozen=True, slots=True)
class _Unit:
    """A unit in a file: what it is, and its flat tensor."""

    header: UnitHeader
    flat: Tensor


class _File:
    """A file that was read and found to be what its manifest says."""

    def __init__(self, store: Store, spec: TableSpec, entry: FileEntry) -> None:
        self.path = entry.path
        self.units: list[_Unit] = []
        data = store.read(entry)
        headers, at = self._headers(data, spec)
        for header in headers:
            count = flat_elements(header)
            flat = torch.empty(0)
            if count:
                flat = torch.frombuffer(data, dtype=torch.float32, count=count, offset=at)
            self.units.append(_Unit(header, flat))
            at += count * ITEM_BYTES

    def check_bounds(self, start: int, stop: int) -> None:
        """Whether its units are those of a shard."""
        at = start
        for unit in self.units:
            if unit.header.start != at:
                raise CheckpointError(self.path, f"a unit begins at {unit.header.start}, not {at}")
            at = unit.header.stop
        if at != stop or not self.units:
            raise CheckpointError(self.path, f"its units end at {at}, not {stop}")

    def _headers(self, data: bytearray, spec: TableSpec) -> tuple[list[UnitHeader], int]:
        """What units there are, and where the first one's tensor begins."""
        begin = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
        if begin > min(HEADER_BYTES_MAX, len(data)):
            raise CheckpointError(self.path, f"it has a header of {begin} bytes")
        text = bytes(data[LENGTH_BYTES:begin])
        try:
            metadata: dict[str, Any] = json.loads(text)["__metadata__"]
            plain = unmarked(json.loads(metadata["units"]))
            units = msgspec.convert(plain, list[UnitHeader])
            headers = [decode_header(encode_header(unit)) for unit in units]
        except (ValueError, LookupError, TypeError, msgspec.MsgspecError) as error:
            raise CheckpointError(self.path, f"its header is damaged: {error}") from error
        if text != _header(spec, headers):
            raise CheckpointError(self.path, f"it is not one of table {spec.name!r}")
        nbytes = begin + sum(map(flat_elements, headers)) * ITEM_BYTES
        if nbytes != len(data):
            text_of = f"its header describes {nbytes} bytes, it has {len(data)}"
            raise CheckpointError(self.path, text_of)
        return headers, begin


@dataclass(frozen=True, slots=True)
class _Run:
    """Elements ``[start, stop)`` of a run, with what is kept of them."""

    start: int
    stop: int
    scalars: dict[str, Scalar]
    tensors: dict[str, Tensor]


class ShardReader:
    """Reads any stretch of a table.

    Parameters
    ----------
    store : Store
        The folder of checkpoints.
    table : TableEntry
        The table, as a manifest has it.
    """

    def __init__(self, store: Store, table: TableEntry) -> None:
        self._store = store
        self._spec = table.spec
        self._layout = Layout(table.spec)
        self._is_whole = table.spec.placement is Placement.TENSORWISE
        self._groups = [tensor.group for tensor in table.spec.tensors]
        self._files = [
            (self._layout.shard_range(ShardSpan(file.first_block, file.blocks)), file)
            for file in table.files
        ]

    def units(self, bounds: Sequence[tuple[int, int]]) -> Iterator[UnitState]:
        """The state of stretches of the table.

        A file is read once, and compared with its manifest before anything of it is used. One file
        is in memory at a time, beside the unit that is put together.

        Parameters
        ----------
        bounds : sequence of (start, stop)
            Elements of each stretch, in order and without overlap.

        Raises
        ------
        CheckpointError
            A file is not what it should be, or has no state of some elements.
        DataError
            The stretches are not in order, not in the table, or cut a tensor that stays whole.
        """
        for (start, _), (values, runs) in zip(bounds, self._read(bounds), strict=True):
            unit = self._unit(start, values, runs)
            values.clear()  # they refer to a file, which may have been the last use of it
            runs.clear()
            yield unit

    def values(self, bounds: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
        """The values of stretches of the table, float32 [stop - start] each; as `units`."""
        for values, runs in self._read(bounds):
            runs.clear()
            whole = torch.cat([torch.empty(0), *values])
            values.clear()
            yield whole

    def _read(self, bounds: Sequence[tuple[int, int]]) -> Iterator[tuple[list[Tensor], list[_Run]]]:
        """What the files have of each stretch.

        It is to be copied, and the lists cleared, before the next one is asked for: nothing of a
        file is to be left in memory when another one is read.
        """
        self._check(bounds)
        file: _File | None = None
        for start, stop in bounds:
            values: list[Tensor] = []
            runs: list[_Run] = []
            for (first, end), entry in self._files:
                if first < stop and start < end:
                    if file is None or file.path != entry.path:
                        file = None
                        file = _File(self._store, self._spec, entry)
                        file.check_bounds(first, end)
                    self._take(file, (start, stop), (values, runs), is_last=end >= stop)
            yield values, runs

    def _check(self, bounds: Sequence[tuple[int, int]]) -> None:
        at, last = 0, self._layout.elements
        for start, stop in bounds:
            if not at <= start <= stop <= last:
                text = f"[{start}, {stop}) after {at} of {last} elements"
                raise DataError(f"table {self._spec.name!r} is asked for {text}")
            at = stop

    def _take(
        self,
        file: _File,
        bounds: tuple[int, int],
        out: tuple[list[Tensor], list[_Run]],
        *,
        is_last: bool,
    ) -> None:
        """What a file has of a stretch; copies, unless the next step is to make them."""
        values, runs = out
        for unit in file.units:
            header = unit.header
            low, high = max(bounds[0], header.start), min(bounds[1], header.stop)
            if low < high:
                found = unit.flat[low - header.start : high - header.start]
                values.append(found if is_last else found.clone())
                at = header.stop - header.start
                for run in header.runs:
                    count = sum(map(math.prod, run.tensors.values()))
                    if run.start < high and low < run.stop:
                        inside = self._cut(run, unit.flat[at : at + count], (low, high))
                        runs.append(inside if is_last else _copied(inside))
                    at += count

    def _cut(self, run: RunState, flat: Tensor, bounds: tuple[int, int]) -> _Run:
        """The part of a run that lies in a stretch."""
        low, high = max(bounds[0], run.start), min(bounds[1], run.stop)
        is_cut = (low, high) != (run.start, run.stop)
        length, at = run.stop - run.start, 0
        tensors: dict[str, Tensor] = {}
        for key, shape in run.tensors.items():
            tensor = flat[at : at + math.prod(shape)].view(shape)
            at += tensor.numel()
            if is_cut and (self._is_whole or list(shape) != [length]):
                text = f"{key!r} of [{run.start}, {run.stop}) cannot be cut at {low} and {high}"
                raise DataError(f"table {self._spec.name!r}: {text}")
            tensors[key] = tensor[low - run.start : high - run.start] if is_cut else tensor
        return _Run(low, high, run.scalars, tensors)

    def _unit(self, start: int, values: list[Tensor], runs: list[_Run]) -> UnitState:
        groups: list[list[_Run]] = []
        for run in runs:
            if groups and not self._is_whole and self._are_alike(groups[-1][-1], run):
                groups[-1].append(run)
            else:
                groups.append([run])
        states: list[RunState] = []
        tensors = list(values)
        for alike in groups:
            shapes: dict[str, list[int]] = {}
            for key, first in alike[0].tensors.items():
                parts = [run.tensors[key] for run in alike]
                tensors += [part.reshape(-1) for part in parts]
                count = sum(part.numel() for part in parts)
                shapes[key] = list(first.shape) if len(parts) == 1 else [count]
            states.append(RunState(alike[0].start, alike[-1].stop, alike[0].scalars, shapes))
        stop = start + sum(value.numel() for value in values)
        return UnitState(UnitHeader(start, stop, states), torch.cat([torch.empty(0), *tensors]))

    def _are_alike(self, left: _Run, right: _Run) -> bool:
        """Whether the optimizer of adjacent runs cannot tell them apart."""
        is_flat = all(
            list(tensor.shape) == [run.stop - run.start]
            for run in (left, right)
            for tensor in run.tensors.values()
        )
        return (
            left.stop == right.start
            and is_flat
            and list(left.tensors) == list(right.tensors)
            and repr(left.scalars) == repr(right.scalars)  # tells 1 from 1.0, and 0.0 from -0.0
            and self._group(left) == self._group(right)
        )

    def _group(self, run: _Run) -> int:
        return self._groups[self._layout.pieces(run.start, run.start + 1)[0].tensor]


def _copied(run: _Run) -> _Run:
    tensors = {key: tensor.clone() for key, tensor in run.tensors.items()}
    return _Run(run.start, run.stop, run.scalars, tensors)
