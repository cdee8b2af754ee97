"""A checkpoint as a state dict, which needs no cluster and no script to be made.

What no table has, such as counters of BatchNorm, is in the model's record and the round's state.
"""

import math
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor

from treefold.checkpoint import disk
from treefold.checkpoint.manifest import Manifest, TableEntry
from treefold.checkpoint.shards import ShardReader
from treefold.checkpoint.store import Store
from treefold.common.errors import CheckpointError, ConfigError
from treefold.common.layout import Layout
from treefold.common.round_state import ModelRecord, OpaqueTensor, RoundState, record_of
from treefold.common.spec import Dtype

FORMATS = ("torch", "safetensors")
FROZEN = ".frozen"  # ends the name of the table with a model's frozen parameters
_DTYPES = {
    Dtype.FLOAT32: torch.float32,
    Dtype.FLOAT16: torch.float16,
    Dtype.BFLOAT16: torch.bfloat16,
    Dtype.FLOAT64: torch.float64,
    Dtype.INT64: torch.int64,
}


def state_dict(store: Store, manifest: Manifest) -> dict[str, Tensor]:
    """What ``model.load_state_dict`` takes.

    Parameters
    ----------
    store : Store
        The folder of checkpoints.
    manifest : Manifest
        One of them.

    Returns
    -------
    dict of str to Tensor
        Parameters and buffers as workers have them at this version: in the dtypes of the model,
        after they were rounded to the table's wire type. Tied ones are one tensor under several
        names. With several models the names begin with that of the model's first table, as in
        `treefold.torch.state_dict`. Buffers of `left_out` are not in it.

    Raises
    ------
    CheckpointError
        A file is not what it was.
    """
    models: dict[str, dict[str, Tensor]] = {}
    hidden: dict[str, set[str]] = {}
    for table in manifest.tables:
        record = _record(manifest, table)
        values = models.setdefault(record.model, {})
        own = dict(_tensors(store, table)) | dict(_opaque(manifest, table, record))
        values |= own
        values |= {alias: own[name] for alias, name in record.aliases.items() if name in own}
        hidden.setdefault(record.model, set()).update(record.hidden)
    for name, values in models.items():
        models[name] = {key: value for key, value in values.items() if key not in hidden[name]}
    if len(models) == 1:
        return next(iter(models.values()))
    return {f"{name}.{key}": one for name, values in models.items() for key, one in values.items()}


def left_out(manifest: Manifest) -> list[str]:
    """Buffers whose values are too large for a record and have never changed in training."""
    found: list[str] = []
    for table in manifest.tables:
        record, changed = _record(manifest, table), _state(manifest, table)
        found += [
            tensor.name
            for number, tensor in enumerate(record.opaque)
            if _is_unknown(tensor) and number not in changed and tensor.name not in record.hidden
        ]
    return found


def export(store: Store, manifest: Manifest, target: Path, file_format: str = "torch") -> int:
    """Write `state_dict` to a file, which appears whole or not at all.

    Parameters
    ----------
    store : Store
        The folder of checkpoints.
    manifest : Manifest
        One of them.
    target : Path
        The file; its folder must exist. A file that is there is replaced.
    file_format : str
        ``torch``, which ``torch.load`` reads with ``weights_only=True``, or ``safetensors``.

    Returns
    -------
    int
        How many tensors there are.

    Raises
    ------
    CheckpointError
        A file of the checkpoint is not what it was, or the target cannot be written.
    ConfigError
        There is no such format or folder.
    """
    if file_format not in FORMATS:
        raise ConfigError(f"format is {file_format!r}; it is one of {', '.join(FORMATS)}")
    if target.is_dir() or not target.parent.is_dir():
        what = "it is a folder" if target.is_dir() else f"there is no folder {target.parent}"
        raise ConfigError(f"cannot export to {target}: {what}")
    values = state_dict(store, manifest)
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        try:
            _write(values, manifest, unfinished, file_format)
            unfinished.replace(target)
            disk.sync_folder(target.parent)
        finally:
            unfinished.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: what torch makes of a full disk
        raise CheckpointError(str(target), f"it could not be written: {error}") from error
    return len(values)


def _write(values: dict[str, Tensor], manifest: Manifest, path: Path, file_format: str) -> None:
    path.touch()
    mode = path.stat().st_mode
    if file_format == "torch":
        torch.save(values, path)
    else:
        seen: set[int] = set()
        apart: dict[str, Tensor] = {}
        for name, value in values.items():
            apart[name] = value.clone() if id(value) in seen else value
            seen.add(id(value))
        save_file(apart, path, {"format": "pt", "round": str(manifest.version)})
    path.chmod(mode)  # what the user's umask gives; safetensors writes for the owner only
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- one table -----------------------------------------------------------------------------------


def _tensors(store: Store, table: TableEntry) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a table, by name."""
    layout = Layout(table.spec)
    ends = [start + size for start, size in zip(layout.starts, layout.sizes, strict=True)]
    bounds = list(zip(layout.starts, ends, strict=True))
    found = ShardReader(store, table).values([one for one in bounds if one[0] < one[1]])
    for tensor, (start, stop) in zip(table.spec.tensors, bounds, strict=True):
        value = next(found) if start < stop else torch.empty(0)
        rounded = value.to(_DTYPES[layout.wire((start, stop))])
        yield tensor.name, rounded.to(_DTYPES[tensor.dtype]).reshape(tensor.shape)


def _opaque(
    manifest: Manifest, table: TableEntry, record: ModelRecord
) -> Iterator[tuple[str, Tensor]]:
    """Buffers that are no tensors of the table, by name, as far as they are known."""
    changed = _state(manifest, table)
    for number, tensor in enumerate(record.opaque):
        data = changed.get(number, tensor.data)
        dtype = getattr(torch, tensor.dtype, None)
        if number not in changed and _is_unknown(tensor):
            continue
        if not isinstance(dtype, torch.dtype):
            raise _damaged(manifest, f"{tensor.name!r} is of dtype {tensor.dtype!r}")
        wanted = math.prod(tensor.shape) * dtype.itemsize
        if len(data) != wanted:
            raise _damaged(manifest, f"{tensor.name!r} has {len(data)} bytes, not {wanted}")
        flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0).to(dtype)
        yield tensor.name, flat.reshape(tensor.shape)


def _is_unknown(tensor: OpaqueTensor) -> bool:
    return not tensor.data and math.prod(tensor.shape) > 0


def _record(manifest: Manifest, table: TableEntry) -> ModelRecord:
    if not table.record:
        names = [other.spec.name for other in manifest.tables]
        first = table.spec.name.removesuffix(FROZEN)
        return ModelRecord(first if first in names else table.spec.name, [], {}, [])
    try:
        return msgspec.msgpack.decode(table.record, type=ModelRecord)
    except (msgspec.MsgspecError, ValueError) as error:
        raise _damaged(manifest, f"the record of {table.spec.name!r}: {error}") from error


def _state(manifest: Manifest, table: TableEntry) -> dict[int, bytes]:
    """Buffers that are no tensors and have changed, by their number in the record."""
    if not table.state:
        return {}
    try:
        state = record_of(table.spec, table.state)
        return msgspec.msgpack.decode(state, type=RoundState).opaque if state else {}
    except (msgspec.MsgspecError, ValueError) as error:
        raise _damaged(manifest, f"the round of {table.spec.name!r}: {error}") from error


def _damaged(manifest: Manifest, what: str) -> CheckpointError:
    return CheckpointError(f"{manifest.version:08d}/manifest.json", what)
