"""The tape: everything that servers stepped, in order, so that a run can be stepped again.

Each server writes a file of its own, a MessagePack stream of records, every one of them an array
that begins with its number. Records of a version may be in several files (of the copies of a
shard), and a version may have been made twice, of which the one of the higher view counts.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgpack
import msgspec

from treefold.common.errors import ConfigError, DataError
from treefold.common.layout import ShardSpan
from treefold.common.spec import Hyper, TableSpec

FORMAT = 1
SUFFIX = ".server-"
STEP_PARTS_MAX = 64
"""Of one record, so that whoever reads it needs no more than 64 MiB at a time."""
RECORD_BYTES_MAX = 1 << 30


class TapeBegun(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """The first record: which server of which job writes."""

    format: int
    job: int
    server: int


class TapeShard(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """The server holds a shard from now on."""

    table: int
    shard: int
    spec: TableSpec
    span: ShardSpan


class TapeUnit(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """A unit as a checkpoint has it, with which the shard begins in a view."""

    table: int
    shard: int
    view: int
    version: int
    unit: int
    header: bytes
    values: bytes


class TapePart(msgspec.Struct, frozen=True, array_like=True):
    """What a part was stepped with: float32 values, None if no tensor of it has a gradient.

    ``absent`` is the bitmap of tensors without a gradient.
    """

    part: int
    absent: bytes
    values: bytes | None


class TapeStep(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Parts of a version; those of one version may be in several records.

    ``groups`` are the hyper-parameters by param group, None for initial values; gradients were
    multiplied with ``coefficient`` first.
    """

    table: int
    shard: int
    view: int
    version: int
    groups: list[Hyper] | None
    coefficient: float
    parts: list[TapePart]


class TapeVersion(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Whose contributions a version has: ``(level, index, worker)``, or ``(round, slot, worker)``.

    The latter of asynchronous tables.
    """

    table: int
    shard: int
    view: int
    version: int
    contributors: list[tuple[int, int, int]]


class TapeEnd(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """What the server held when the job ended well."""

    table: int
    shard: int
    version: int
    digest: bytes


class TapeFull(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """The file has become as large as it may; nothing comes after this."""

    nbytes: int


Record = TapeBegun | TapeShard | TapeUnit | TapeStep | TapeVersion | TapeEnd | TapeFull


class TapeWriter:
    """Writes one server's file, each record through to the operating system at once.

    A server that is started by hand does not write over the file of another run.

    Parameters
    ----------
    path : str
        Of the tape; the file's name is this, ``.server-`` and the server's incarnation.
    job, server : int
        Who writes.
    bytes_max : int
        How large the file may become.

    Attributes
    ----------
    is_full : bool
        Whether that was reached: nothing more is written.

    Raises
    ------
    FileExistsError
        There is such a file already, of another run.
    """

    def __init__(self, path: str, job: int, server: int, bytes_max: int) -> None:
        self.is_full = False
        self._bytes = 0
        self._bytes_max = bytes_max
        self._encoder = msgspec.msgpack.Encoder()
        Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
        file = Path(f"{path}{SUFFIX}{server}")
        self._file: BinaryIO = file.open("xb", buffering=0)
        self.add(TapeBegun(FORMAT, job, server))

    def add(self, record: Record) -> None:
        """Write a record, if there is room."""
        if self.is_full:
            return
        body = self._encoder.encode(record)
        self.is_full = self._bytes + len(body) > self._bytes_max
        if self.is_full:
            body = self._encoder.encode(TapeFull(self._bytes))
        self._bytes += len(body)
        view = memoryview(body)
        while view:
            view = view[self._file.write(view) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def check_is_new(path: str) -> None:
    """Refuse to record where another run has recorded.

    Raises
    ------
    ConfigError
        There are files of a tape.
    """
    if path and (found := files(path)):
        msg = f"{found[0]} is of another run: move it, or choose another name for --tape"
        raise ConfigError(msg)


class Entry(NamedTuple):
    """A record, and where in its file it lies."""

    record: Record
    offset: int
    size: int


def files(path: str) -> list[Path]:
    """The files of a tape, by the names of their servers."""
    folder, name = Path(path).absolute().parent, Path(path).name
    found = [one for one in folder.glob(f"{name}{SUFFIX}*") if _number(one) is not None]
    return sorted(found, key=lambda one: _number(one) or 0)


def _number(path: Path) -> int | None:
    text = path.name.rpartition(SUFFIX)[2]
    return int(text) if text.isdecimal() else None


def read(path: Path) -> Iterator[Entry]:
    """All whole records of a file; one that was cut off by a crash is left out.

    Raises
    ------
    DataError
        It is no tape, or one of another format.
    """
    with path.open("rb") as file:
        unpacker = msgpack.Unpacker(file, max_buffer_size=RECORD_BYTES_MAX)
        at = 0
        while True:
            try:
                found = unpacker.unpack()
            except msgpack.OutOfData:
                break
            except (ValueError, msgpack.UnpackException) as error:
                raise DataError(f"{path} is damaged at byte {at}: {error}") from error
            end = unpacker.tell()
            yield Entry(_record(path, at, found), at, end - at)
            at = end
        if at == 0:
            raise DataError(f"{path} is no tape: there is no record in it")


def read_at(path: Path, offset: int, size: int) -> Record:
    """One record, from where `read` has found it."""
    with path.open("rb") as file:
        file.seek(offset)
        return _record(path, offset, msgpack.unpackb(file.read(size)))


def _record(path: Path, at: int, found: object) -> Record:
    try:
        record: Record = msgspec.convert(found, Record)
    except msgspec.ValidationError as error:
        raise DataError(f"{path} has no record of a tape at byte {at}: {error}") from error
    if at == 0 and not (isinstance(record, TapeBegun) and record.format == FORMAT):
        raise DataError(f"{path} is no tape of format {FORMAT}")
    return record
