"""What a checkpoint consists of, as the one file says that makes it count.

The file is JSON, ``{"sha256": ..., "manifest": {...}}``; the digest is that of the manifest's bytes
as they stand there, and there is no other byte in the file, not even a blank. Nothing of it is
believed before that and everything else was checked.
"""

import hashlib
import re
from collections.abc import Callable
from typing import Annotated, Any  # Any: JSON before it is checked

import msgspec
from msgspec import Meta

from treefold.checkpoint.plain import marked, unmarked
from treefold.common.errors import CheckpointError
from treefold.common.layout import Layout, ShardSpan
from treefold.common.plan import Count, LoopPlan
from treefold.common.spec import Placement, Rule, TableSpec

FORMAT = 1
PATH = r"\A[0-9]{8,}/[A-Za-z0-9][A-Za-z0-9._-]*\Z"  # names are data: none leads out of the folder


class FileEntry(msgspec.Struct, frozen=True):
    """One file: blocks ``[first_block, first_block + blocks)`` of its table."""

    path: Annotated[str, Meta(pattern=PATH, max_length=256)]
    first_block: Count
    blocks: Annotated[int, Meta(ge=1, le=1 << 62)]
    nbytes: Count
    sha256: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]

    @property
    def folder(self) -> int:
        """Version of the checkpoint in whose folder it lies."""
        return folder_of(self.path)


class TableEntry(msgspec.Struct, frozen=True):
    """One table at one version.

    Attributes
    ----------
    record : bytes
        A `treefold.common.round_state.ModelRecord`, or empty.
    version : int
        The checkpoint's, or 0 for a table without rounds. Asynchronous tables beside synchronous
        ones have versions of their own.
    state : bytes
        A `treefold.common.round_state.RoundState`, of an asynchronous table an ``Applied``, or
        empty.
    norm : float or None
        Gradient norm of the round that made the version, if it was limited.
    files : list of FileEntry
        In the order of their blocks, which are all of the table's.
    """

    number: Count
    spec: TableSpec
    record: bytes
    version: Count
    state: bytes
    norm: float | None
    files: list[FileEntry]


class Manifest(msgspec.Struct, frozen=True):
    """One checkpoint.

    Attributes
    ----------
    job : int
        Whose it is.
    version : int
        That of every table with rounds: so many rounds are in it.
    view : int
        In which it was made.
    slots, seed : int
        Settings without which the job would not go on with the same bits.
    package, created : str
        Who wrote it, and when (ISO 8601, UTC).
    plans : list of LoopPlan
        Passes over the data up to then.
    """

    job: Count
    version: Count
    view: Count
    slots: Annotated[int, Meta(ge=1)]
    seed: int
    package: str
    created: str
    plans: list[LoopPlan]
    tables: Annotated[list[TableEntry], Meta(min_length=1)]
    format: int = FORMAT

    @property
    def nbytes(self) -> int:
        """Bytes of all files, without the manifest's own."""
        return sum(file.nbytes for table in self.tables for file in table.files)


class _Sealed(msgspec.Struct, frozen=True):
    sha256: str
    manifest: msgspec.Raw


_encoder = msgspec.json.Encoder()
_sealed = msgspec.json.Decoder(_Sealed)
_OPTIMIZER = TableSpec.__struct_fields__.index("optimizer")


def encode(manifest: Manifest) -> bytes:
    """Bytes of a manifest's file."""
    found = msgspec.to_builtins(manifest)
    _change_floats(found, marked)
    return _seal(_encoder.encode(found))


def decode(data: bytes, path: str) -> Manifest:
    """A manifest from its file's bytes.

    Parameters
    ----------
    data : bytes
        The file.
    path : str
        Its name, for errors.

    Raises
    ------
    CheckpointError
        It is damaged, of another format, or contradicts itself.
    """
    try:
        body = bytes(_sealed.decode(data).manifest)
        if data != _seal(body):
            raise CheckpointError(path, "its checksum is wrong")
        found = msgspec.json.decode(body, type=dict)
        if found.get("format") != FORMAT:
            text = f"it has format {found.get('format')!r}, this package reads {FORMAT}"
            raise CheckpointError(path, text)
        _change_floats(found, unmarked)
        manifest = msgspec.convert(found, Manifest)
    except _MALFORMED as error:
        raise CheckpointError(path, f"it is no manifest: {error}") from error
    contradiction = _contradiction(manifest)
    if contradiction:
        raise CheckpointError(path, contradiction)
    return manifest


_MALFORMED = (msgspec.MsgspecError, ValueError, LookupError, TypeError, RecursionError)


def _seal(body: bytes) -> bytes:
    digest = hashlib.sha256(body).hexdigest()
    return _encoder.encode(_Sealed(digest, msgspec.Raw(body)))


def _change_floats(found: dict[str, Any], change: Callable[[object], object]) -> None:
    """Change the values of a manifest that may be numbers which JSON has no words for."""
    for table in found["tables"]:
        table["norm"] = change(table["norm"])
        optimizer = table["spec"][_OPTIMIZER] if len(table["spec"]) > _OPTIMIZER else None
        if optimizer:
            optimizer[1] = change(optimizer[1])


def _contradiction(manifest: Manifest) -> str:
    if [table.number for table in manifest.tables] != list(range(len(manifest.tables))):
        return "its tables are not numbered from 0 on"
    for table in manifest.tables:
        is_trained = table.spec.rule is Rule.OPTIMIZER
        is_free = table.spec.is_asynchronous  # has a version per contribution, beside other tables
        if not is_free and table.version != (manifest.version if is_trained else 0):
            return f"table {table.spec.name!r} is of version {table.version}"
        for file in table.files:  # what never changes may lie with an older checkpoint
            is_own = file.folder == manifest.version
            if not is_own and (is_trained or file.folder > manifest.version):
                return f"{file.path} is not of version {manifest.version}"
        wrong = _cuts(table)
        if wrong:
            return f"table {table.spec.name!r}: {wrong}"
    paths = [file.path for table in manifest.tables for file in table.files]
    return "a file stands in it twice" if len(set(paths)) != len(paths) else ""


def _cuts(table: TableEntry) -> str:
    """What is wrong with the blocks of a table's files."""
    layout, at = Layout(table.spec), 0
    begins = set(layout.starts)
    is_whole = table.spec.placement is Placement.TENSORWISE
    for file in table.files:
        if file.first_block != at:
            return f"{file.path} begins with block {file.first_block}, not {at}"
        first, _ = layout.shard_range(ShardSpan(file.first_block, file.blocks))
        if is_whole and at and first not in begins:
            return f"{file.path} cuts a tensor"
        at += file.blocks
    return "" if at == layout.blocks else f"it has {layout.blocks} blocks, its files {at}"


def folder_of(path: str) -> int:
    """Version of the checkpoint in whose folder a file lies."""
    return int(path.partition("/")[0])


def is_path(path: str) -> bool:
    """Whether a file may have this name."""
    return re.fullmatch(PATH, path) is not None
