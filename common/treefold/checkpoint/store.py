"""A folder of checkpoints, on any filesystem that fsspec knows.

``<folder>/<version>/manifest.json`` makes a checkpoint count. It is written last, and nothing is
ever written over. On a local disk what a manifest names is safe (fsync, of folders too) before it
gets its name; elsewhere a file counts as safe when the filesystem says that it is closed.
"""

import errno
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from treefold.checkpoint import disk
from treefold.checkpoint import manifest as manifests
from treefold.checkpoint.disk import Writer
from treefold.checkpoint.manifest import FileEntry, Manifest
from treefold.common.errors import CheckpointError, ConfigError
from treefold.common.failpoints import failpoint

MANIFEST = "manifest.json"
UNFINISHED = "manifest.json.unfinished"
SUFFIX = ".safetensors"
ASIDE = ".aside"
SHARED = 0
"""The folder of tables without rounds, which are of version 0: several checkpoints name its files,
and a file may lie there before the first one does."""
READ_BYTES = 1 << 22
MANIFEST_BYTES_MAX = 1 << 30
DIGITS = 8


class Store:
    """A folder of checkpoints.

    Parameters
    ----------
    url : str
        A path, or an address as fsspec writes it.

    Raises
    ------
    ConfigError
        There is no such filesystem, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._fs, root = fsspec.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"the folder of checkpoints is {url!r}: {error}") from error
        self._root = root.rstrip("/")
        self._is_local = isinstance(self._fs, LocalFileSystem)

    # ---- reading ------------------------------------------------------------------------------

    def versions(self) -> list[int]:
        """Versions of the checkpoints that have a manifest, newest first."""
        return [number for number in self._folders() if self._has_manifest(number)]

    def manifest(self, version: int) -> Manifest:
        """The manifest of a checkpoint.

        Raises
        ------
        CheckpointError
            There is none, or it is damaged or another one's.
        """
        path = _manifest_path(version)
        self._fs.invalidate_cache()
        try:
            if self._fs.size(self._at(path)) > MANIFEST_BYTES_MAX:
                raise CheckpointError(path, f"it has more than {MANIFEST_BYTES_MAX} bytes")
            data: bytes = self._fs.cat_file(self._at(path))
        except FileNotFoundError as error:
            raise CheckpointError(path, "it is not there") from error
        except OSError as error:
            raise CheckpointError(path, f"it cannot be read: {error}") from error
        found = manifests.decode(data, path)
        if found.version != version:
            raise CheckpointError(path, f"it is that of version {found.version}")
        return found

    def verify(self, version: int) -> Manifest:
        """The manifest of a checkpoint, after every file was read and compared with it.

        Raises
        ------
        CheckpointError
            A file is missing or is not what it was; the error names it.
        """
        found = self.manifest(version)
        for file in _files(found):
            self.check(file)
        return found

    def check(self, file: FileEntry) -> None:
        """Compare a file with what its manifest says.

        Raises
        ------
        CheckpointError
            It differs.
        """
        digest = hashlib.sha256()
        with self.open(file) as stream:
            while chunk := stream.read(READ_BYTES):
                digest.update(chunk)
        _compare(file, digest.hexdigest())

    def read(self, file: FileEntry) -> bytearray:
        """All of a file, which is what its manifest says.

        Raises
        ------
        CheckpointError
            It differs.
        """
        digest, at = hashlib.sha256(), 0
        with self.open(file) as stream:
            data = bytearray(file.nbytes)
            view = memoryview(data)
            while count := stream.readinto(view[at : at + READ_BYTES]):
                digest.update(view[at : at + count])
                at += count
        _compare(file, digest.hexdigest())
        return data

    @contextmanager
    def open(self, file: FileEntry) -> Iterator[BufferedReader]:
        """Open a file for reading; what is in it is not checked.

        Raises
        ------
        CheckpointError
            It is not there, or has another size.
        """
        with self._reading(file), self._fs.open(self._at(file.path), "rb") as stream:
            yield stream

    def newest_whole(self, told: Callable[[str], None]) -> Manifest | None:
        """The newest checkpoint of which every file is what it was; None if there is none.

        Parameters
        ----------
        told : callable
            Told of each that is not, and why.
        """
        for version in self.versions():
            try:
                return self.verify(version)
            except CheckpointError as error:
                told(f"the checkpoint of version {version} is damaged and passed over: {error}")
        return None

    # ---- writing ------------------------------------------------------------------------------

    @contextmanager
    def create(self, path: str) -> Iterator[Writer]:
        """Make a file, to be written in the block; it is safe when that ends without an error.

        What was written is removed otherwise.

        Raises
        ------
        CheckpointError
            There is such a file, the name is none, or it cannot be written.
        """
        if not manifests.is_path(path):
            raise CheckpointError(path, "no file of a checkpoint has such a name")
        with _saving(path):
            failpoint("checkpoint.before_file")
            if self._is_local:
                target = Path(self._at(path))
                disk.make_folders(target.parent, Path(self._root))
                with disk.new_file(target) as stream:
                    yield _Watched(stream)
                    failpoint("checkpoint.after_file_before_sync")
            else:
                with self._remote(path) as stream:
                    yield _Watched(stream)
            failpoint("checkpoint.after_file")

    def commit(self, manifest: Manifest) -> None:
        """Make a checkpoint count, all files of which are there.

        Raises
        ------
        CheckpointError
            There is a manifest of this version already, a file is not there, or it cannot be
            written. The checkpoint does not count then.
        """
        path, data = _manifest_path(manifest.version), manifests.encode(manifest)
        manifests.decode(data, path)  # what could not be read is not written
        self._fs.invalidate_cache()
        for file in _files(manifest):
            with self._reading(file):
                pass
        with _saving(path):
            failpoint("checkpoint.before_manifest")
            if self._has_manifest(manifest.version):
                raise FileExistsError(path)
            if self._is_local:
                target = Path(self._at(path))
                disk.make_folders(target.parent, Path(self._root))
                disk.name_file(data, target, target.with_name(UNFINISHED))
            else:
                self._fs.pipe_file(self._at(path), data)

    @contextmanager
    def _remote(self, path: str) -> Iterator[Writer]:
        target = self._at(path)
        if self._fs.exists(target):
            raise FileExistsError(path)
        stream = self._fs.open(target, "wb")
        try:
            yield stream
            stream.close()
        except BaseException:
            if isinstance(stream, AbstractBufferedFile):
                with suppress(OSError):
                    stream.discard()
                stream.closed = True  # or it would be finished when nobody refers to it any more
            with suppress(OSError):
                self._fs.rm_file(target)
            raise

    # ---- removing -----------------------------------------------------------------------------

    def prune(self, kept: int) -> None:
        """Remove checkpoints beyond the newest ``kept``, and what has become of no use with them.

        What is damaged is not counted, and left for whoever wants to look into it while it is newer
        than a checkpoint that is kept. Nothing is touched that belongs to a version after the
        newest checkpoint: it is being made. Not every file is read for this, only every manifest.

        Raises
        ------
        OSError
            Something cannot be removed.
        """
        if kept < 1:
            raise ValueError(f"at least 1 checkpoint is to be kept, not {kept}")
        folders = self._folders()
        versions = [version for version in folders if self._has_manifest(version)]
        whole: list[Manifest] = []
        damaged: set[int] = set()
        doomed: list[int] = []
        for version in versions:
            manifest = self._complete(version) if len(whole) < kept else None
            if manifest is not None:
                whole.append(manifest)
            elif len(whole) < kept:
                damaged.add(version)
            else:
                doomed.append(version)
        needed = {file.path for manifest in whole for file in _files(manifest)}
        useless = set[str]()
        for version in doomed:
            useless |= self._named(version)
            self._remove(_manifest_path(version))
            self._sync(version)
        for number in folders:
            if number in damaged or not versions or number > versions[0]:
                continue
            shared = set[str]() if damaged else useless - needed
            self._clear(number, needed, shared if number == SHARED else None)

    def set_aside(self, version: int) -> list[str]:
        """Take checkpoints after a version out of the way; returns the names of their folders.

        They keep their files, under another name, for whoever wants to look into them. Files that
        no manifest names are removed: when this is called nobody is writing any.

        Raises
        ------
        OSError
            Something cannot be moved or removed.
        """
        found: list[str] = []
        folders = self._folders()
        for number in [number for number in folders if number > version]:
            name = _folder(number)
            tries = 0
            while self._fs.exists(self._at(f"{name}{ASIDE}-{tries}")):
                tries += 1
            self._fs.mv(self._at(name), self._at(f"{name}{ASIDE}-{tries}"), recursive=True)
            found.append(name)
        if found and self._is_local:
            disk.sync_folder(Path(self._root))
        left = [number for number in folders if number <= version]
        needed = {path for number in left for path in self._named(number)}
        if all(self._named(number) for number in left if self._has_manifest(number)):
            for number in left:
                self._clear(number, needed, None)
        return found

    def _clear(self, version: int, needed: set[str], useless: set[str] | None) -> None:
        """Remove files of a folder: those not needed, or only those that are of no use."""
        for path in self._ours(version):
            is_manifest = path == _manifest_path(version)
            is_useless = path not in needed if useless is None else path in useless
            if is_useless and not is_manifest:
                self._remove(path)
        if self._is_local:
            disk.remove_folder(Path(self._at(_folder(version))))

    def _ours(self, version: int) -> list[str]:
        """Files of a folder whose names are such as files of checkpoints have."""
        folder = _folder(version)
        try:
            found = [str(name) for name in self._fs.ls(self._at(folder), detail=False)]
        except FileNotFoundError:
            return []
        names = sorted(name.rstrip("/").rpartition("/")[2] for name in found)
        ours = [name for name in names if name.endswith(SUFFIX) or name in (MANIFEST, UNFINISHED)]
        return [f"{folder}/{name}" for name in ours]

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(self._at(path))
        failpoint("checkpoint.mid_prune")

    def _sync(self, version: int) -> None:
        if self._is_local:
            disk.sync_folder(Path(self._at(_folder(version))))

    # ---- insides ------------------------------------------------------------------------------

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _has_manifest(self, version: int) -> bool:
        return bool(self._fs.exists(self._at(_manifest_path(version))))

    def _complete(self, version: int) -> Manifest | None:
        """A manifest all files of which are there, as far as one sees without reading them."""
        try:
            manifest = self.manifest(version)
            for file in _files(manifest):
                with self._reading(file):
                    pass
        except CheckpointError:
            return None
        return manifest

    def _named(self, version: int) -> set[str]:
        """Files that a manifest names; none if it cannot be read."""
        try:
            return {file.path for file in _files(self.manifest(version))}
        except CheckpointError:
            return set()

    @contextmanager
    def _reading(self, file: FileEntry) -> Iterator[None]:
        """Whatever goes wrong in the block is that file's fault, its size first of all."""
        try:
            size = self._fs.size(self._at(file.path))
            if size != file.nbytes:
                text = f"it has {size} bytes, the manifest says {file.nbytes}"
                raise CheckpointError(file.path, text)
            yield
        except FileNotFoundError as error:
            raise CheckpointError(file.path, "it is not there") from error
        except OSError as error:
            raise CheckpointError(file.path, f"it cannot be read: {error}") from error

    def _folders(self) -> list[int]:
        """Versions that have a folder, newest first."""
        self._fs.invalidate_cache()
        try:
            names = [str(name) for name in self._fs.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []
        last = [name.rstrip("/").rpartition("/")[2] for name in names]
        numbers = [int(name) for name in last if name.isdecimal() and name.isascii()]
        return sorted((number for number in numbers if _folder(number) in last), reverse=True)


class _Watched:
    """A file in the midst of which a test may want something to happen."""

    def __init__(self, inner: Writer) -> None:
        self._inner = inner

    def write(self, data: bytes | memoryview, /) -> None:
        self._inner.write(data)
        failpoint("checkpoint.mid_file")


def _folder(version: int) -> str:
    return f"{version:0{DIGITS}d}"


def _manifest_path(version: int) -> str:
    return f"{_folder(version)}/{MANIFEST}"


def _files(manifest: Manifest) -> list[FileEntry]:
    return [file for table in manifest.tables for file in table.files]


def _compare(file: FileEntry, digest: str) -> None:
    if digest != file.sha256:
        raise CheckpointError(file.path, "its checksum is wrong: it is not what was saved")


@contextmanager
def _saving(path: str) -> Iterator[None]:
    """Whatever the system says in the block is told with the file's name."""
    try:
        yield
    except FileExistsError as error:
        raise CheckpointError(path, "it is there already, and is not written over") from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; the disk is full: make room, or keep fewer checkpoints" if full else ""
        raise CheckpointError(path, f"it could not be written: {error}{hint}") from error
