"""The scheduler's journal: a file of records that survives crashes, whatever they say.

Layout of the file, all numbers big-endian::

    header   6 bytes "TFJRNL", 2 bytes format version (1)
    record   4 bytes length n of the payload, 1 <= n <= 64 MiB
             4 bytes CRC-32 (that of zlib) of the length's 4 bytes and the payload
             n bytes payload: one MessagePack object
    record   ...

The file is only ever appended to or replaced as a whole by a rename, so the header is never torn.
The job that it belongs to is for the first record to say.

A crash in the middle of an append leaves a bad record at the end, which is cut when the file is
opened. A bad record that is followed by a valid one, at whatever byte that begins, was damaged
after it was written: nothing is cut and the journal is refused. The lengths are not trusted in that
search, for the damaged bit may be in one of them. What cannot be told from a torn write is damage
to the very last record; it is cut like one, and reported.
"""

import errno
import fcntl
import os
import socket
import struct
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from treefold.common.errors import ConfigError, JournalError
from treefold.common.failpoints import failpoint

VERSION = 1
MAGIC = b"TFJRNL"
HEADER = MAGIC + struct.pack(">H", VERSION)
PAYLOAD_BYTES_MAX = 64 << 20
FILE_NAME, NEW_NAME, LOCK_NAME = "journal", "journal.new", "lock"

_LENGTH = struct.Struct(">I")
_PREFIX = struct.Struct(">II")


class Scan(NamedTuple):
    """What a journal file holds.

    Attributes
    ----------
    payloads : list of bytes
        The payloads of its records, in order.
    good_bytes : int
        Where the last good record ends; 0 if not even the header is whole.
    torn : str
        What has to be cut behind that, empty if nothing.
    """

    payloads: list[bytes]
    good_bytes: int
    torn: str


def frame(payload: bytes) -> bytes:
    """The record that holds ``payload``."""
    if not 1 <= len(payload) <= PAYLOAD_BYTES_MAX:
        raise ValueError(f"a payload has 1 to {PAYLOAD_BYTES_MAX} bytes, not {len(payload)}")
    length = _LENGTH.pack(len(payload))
    return length + _LENGTH.pack(zlib.crc32(payload, zlib.crc32(length))) + payload


def scan(data: bytes, name: str = "the journal") -> Scan:
    """Take a journal file apart.

    Parameters
    ----------
    data : bytes
        All of the file.
    name : str
        What to call it in errors.

    Raises
    ------
    JournalError
        It is no journal, of another format version, or damaged before its last record.
    """
    if data[: len(HEADER)] != HEADER:
        if HEADER.startswith(data):
            return Scan([], 0, f"{len(data)} bytes at offset 0, where the header is not whole")
        raise JournalError(_strange(data, name))
    payloads: list[bytes] = []
    offset = len(HEADER)
    view = memoryview(data)
    while offset < len(data):
        end = _end(view, offset)
        if not end:
            break
        payloads.append(data[offset + _PREFIX.size : end])
        offset = end
    if offset == len(data):
        return Scan(payloads, offset, "")
    for later in range(offset + 1, len(data) - _PREFIX.size):
        if _end(view, later):
            msg = (
                f"{name} is damaged: record {len(payloads)} at offset {offset} is bad, and a valid "
                f"one follows at offset {later}, so this is no torn write. Nothing was changed. "
                f"Restore the file from a copy; or cut it at byte {offset}, which loses record "
                f"{len(payloads)} and all later ones; or move it away to begin without it"
            )
            raise JournalError(msg)
    return Scan(payloads, offset, f"{len(data) - offset} bytes at offset {offset}")


class Journal:
    """A journal file, open for appending by this process alone.

    Parameters
    ----------
    folder : Path
        Where it lies. Made if it is not there, readable by its owner only.

    Attributes
    ----------
    payloads : list of bytes
        What the file held when it was opened.
    torn : str
        What was cut off then, empty if nothing.

    Raises
    ------
    ConfigError
        Another process has it open; or the folder cannot be used.
    JournalError
        The file is damaged, or cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / FILE_NAME
        self.payloads: list[bytes] = []
        self.torn = ""
        self._broken = ""
        self._file = -1
        self._lock = -1
        try:
            _make_folder(folder)
            self._lock = _locked(folder)
            self._open()
        except OSError as error:
            self.close()
            raise JournalError(_failed("open", self.path, error)) from error
        except BaseException:
            self.close()
            raise

    def append(self, payload: bytes) -> None:
        """Write a record behind the others. It is safe when `sync` has returned."""
        data = frame(payload)
        self._check()
        try:
            failpoint("journal.before_write")
            _write(self._file, data)
            failpoint("journal.after_write_before_sync")
        except BaseException as error:
            self._break("written", error)
            raise

    def sync(self) -> None:
        """Return when everything that was appended survives a crash of this machine."""
        self._check()
        try:
            _sync_data(self._file)
            failpoint("journal.after_sync")
        except BaseException as error:
            self._break("synced", error)
            raise

    def rewrite(self, payloads: Iterable[bytes]) -> None:
        """Replace all records by these. A crash leaves the old ones or the new ones, all synced."""
        data = HEADER + b"".join(frame(payload) for payload in payloads)
        self._check()
        try:
            self._replace(data)
        except BaseException as error:
            self._break("rewritten", error)
            raise

    def close(self) -> None:
        """Close the file and let others have it. Nothing is synced."""
        file, lock = self._file, self._lock
        self._file = self._lock = -1
        self._broken = self._broken or f"{self.path} is closed"
        for descriptor in (file, lock):
            if descriptor >= 0:
                os.close(descriptor)

    def _open(self) -> None:
        with suppress(FileNotFoundError):  # left by a process that died while it rewrote
            (self.folder / NEW_NAME).unlink()
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        except FileNotFoundError:
            self._replace(HEADER)
            return
        found = scan(self.path.read_bytes(), str(self.path))
        if not found.good_bytes:
            msg = (
                f"{self.path} has lost its header at offset 0, which no crash does. Nothing was "
                "changed. Restore the file from a copy, or move it away to begin without it"
            )
            raise JournalError(msg)
        if found.torn:
            os.ftruncate(self._file, found.good_bytes)
        os.fsync(self._file)  # whoever wrote these records may not have lived to sync them
        _sync_folder(self.folder)
        self.payloads, self.torn = found.payloads, found.torn

    def _replace(self, data: bytes) -> None:
        new = self.folder / NEW_NAME
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        file = os.open(new, flags, 0o600)
        try:
            _write(file, data)
            os.fsync(file)
            failpoint("journal.rewrite.before_rename")
            new.rename(self.path)
        except BaseException:
            os.close(file)
            with suppress(OSError):  # it would fill a full disk further; opening removes it too
                new.unlink()
            raise
        old, self._file = self._file, file
        if old >= 0:
            os.close(old)
        failpoint("journal.rewrite.after_rename")
        _sync_folder(self.folder)

    def _check(self) -> None:
        if self._broken:
            raise JournalError(self._broken)

    def _break(self, what: str, error: BaseException) -> None:
        """Refuse everything from now on: what is on the disk after a failure is not known."""
        if not isinstance(error, OSError):
            self._broken = f"{self.path} could not be {what}: {error!r}"
            return
        self._broken = _failed(f"be {what}", self.path, error)
        raise JournalError(self._broken) from error


def _end(data: memoryview, offset: int) -> int:
    """Where the record at ``offset`` ends, or 0 if there is no valid one."""
    begin = offset + _PREFIX.size
    if begin >= len(data):
        return 0
    length, check = _PREFIX.unpack_from(data, offset)
    end: int = begin + length
    if not 1 <= length <= PAYLOAD_BYTES_MAX or end > len(data):
        return 0
    right = zlib.crc32(data[begin:end], zlib.crc32(data[offset : offset + _LENGTH.size]))
    return end if check == right else 0


def _strange(data: bytes, name: str) -> str:
    """Why a header is refused."""
    if data.startswith(MAGIC) and len(data) >= len(HEADER):
        version = int.from_bytes(data[len(MAGIC) : len(HEADER)], "big")
        why = f"has format version {version} at offset {len(MAGIC)}, and this is {VERSION}"
    else:
        why = "does not begin as a journal does, at offset 0"
    return (
        f"{name} {why}. Nothing was changed. Restore the file from a copy, use the treefold that "
        "wrote it, or move it away to begin without it"
    )


def _failed(what: str, path: Path, error: OSError) -> str:
    """What to say of a failed call."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = f"; the disk of {path.parent} is full: make room and start again" if full else ""
    return f"the journal {path} could not {what}: {error}{hint}"


def _make_folder(folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise ConfigError(
            f"journal is {str(folder)!r}, which cannot be a folder: {error}"
        ) from error
    for path in missing:
        _sync_folder(path.parent)


def _locked(folder: Path) -> int:
    """A descriptor that holds the folder's lock. The system frees it when the process ends."""
    path = folder / LOCK_NAME
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(lock, 300, 0).decode(errors="replace").strip()
            msg = (
                f"the journal in {folder} is in use by {holder or 'another process'}; one "
                "scheduler at a time can have it"
            )
            raise ConfigError(msg) from error
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"pid {os.getpid()} on host {socket.gethostname()}\n".encode(), 0)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _write(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def _sync_data(file: int) -> None:
    if hasattr(os, "fdatasync"):
        os.fdatasync(file)
    else:
        os.fsync(file)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
