"""Where a scheduler of this machine leaves its address, so that `treefold status` finds it.

One small file per scheduler process, in a folder that only this user can enter. A file counts as
long as the process that wrote it lives; what is left by a killed one is removed by the next reader.
"""

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil

from treefold.common.errors import ConfigError

STARTED_TOLERANCE_S = 1.0  # the system rounds when a process began; a reused number is far off


class Running(msgspec.Struct, frozen=True):
    """A scheduler that runs: its address, its process id, and when that process began (Unix s).

    ``link`` opens its live page; it has a secret in it, which this user may know.
    """

    address: str
    pid: int
    started: float
    link: str = ""


def folder() -> Path:
    """This user's folder, made if it is not there.

    Raises
    ------
    ConfigError
        Somebody else owns a folder of that name, or others may enter it.
    """
    path = Path(tempfile.gettempdir()) / f"treefold-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        msg = f"{path} must be a folder of this user that nobody else can enter; remove it"
        raise ConfigError(msg)
    return path


@contextmanager
def noted(address: str, link: str = "") -> Iterator[None]:
    """Leave the address of this process's scheduler, for as long as the context lasts."""
    process = psutil.Process()
    file = folder() / f"{process.pid}.json"
    note = Running(address, process.pid, process.create_time(), link)
    draft = file.with_suffix(".draft")
    draft.write_bytes(msgspec.json.encode(note))
    draft.rename(file)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def running() -> list[Running]:
    """Schedulers of this user that run on this machine, the newest first."""
    found = []
    for file in folder().glob("*.json"):
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            note = _read(file)
            if note is not None and _is_alive(note):
                found.append(note)
            else:
                file.unlink()
    return sorted(found, key=lambda note: note.started, reverse=True)


def _read(file: Path) -> Running | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Running)
    except msgspec.MsgspecError:
        return None


def _is_alive(note: Running) -> bool:
    try:
        process = psutil.Process(note.pid)
        is_same = abs(process.create_time() - note.started) < STARTED_TOLERANCE_S
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
