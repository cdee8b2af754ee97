"""Files of a local disk that are there after a power failure, or not at all.

What has been synced without an error is safe: the file, and the folders that name it. A sync that
fails is the end of the file, for nobody knows what of it the disk has.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from treefold.common.failpoints import failpoint

FILE_MODE, FOLDER_MODE = 0o600, 0o700  # a model is its owner's business
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


class Writer(Protocol):
    """What takes the bytes of a new file, one after the other."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Append all of these."""


class _Descriptor:
    def __init__(self, number: int) -> None:
        self._number = number

    def write(self, data: bytes | memoryview, /) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._number, rest) :]


@contextmanager
def new_file(path: Path) -> Iterator[Writer]:
    """Make a file, to be written in the block. It is removed if anything goes wrong.

    The file is safe when the block ends, as is its name.

    Parameters
    ----------
    path : Path
        Its name; there must be no such file.

    Raises
    ------
    OSError
        It could not be made.
    """
    descriptor = os.open(path, _FLAGS | os.O_EXCL, FILE_MODE)
    try:
        try:
            yield _Descriptor(descriptor)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise


def name_file(data: bytes, path: Path, unfinished: Path) -> None:
    """Make a file of some bytes under another name, and give it its own when it is safe.

    Raises
    ------
    OSError
        It could not be made; there is none then.
    """
    with suppress(FileNotFoundError):  # left by a process that was killed
        unfinished.unlink()
    with new_file(unfinished) as stream:
        stream.write(data)
        failpoint("checkpoint.manifest.before_sync")
    try:
        failpoint("checkpoint.manifest.before_rename")
        unfinished.rename(path)
        failpoint("checkpoint.manifest.after_rename")
        sync_folder(path.parent)
    except BaseException:
        for name in (path, unfinished):
            with suppress(OSError):
                name.unlink()
        raise


def make_folders(folder: Path, root: Path) -> None:
    """Make a folder in a root, and the root, and sync what names them.

    Another process may have made them and not have synced them yet, so that is done in any case.

    Raises
    ------
    OSError
        They could not be made.
    """
    missing = [parent for parent in root.parents if not parent.is_dir()]
    for path in (*reversed(missing), root, folder):
        with suppress(FileExistsError):
            path.mkdir(mode=FOLDER_MODE)
        sync_folder(path.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder, unless something is in it.

    Raises
    ------
    OSError
        It could not be removed.
    """
    try:
        folder.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def sync_folder(folder: Path) -> None:
    """Return when the names of a folder's files survive a power failure.

    Raises
    ------
    OSError
        They may not.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
