"""A filesystem like those of clouds: objects by name, no folders, and a file is there on closing.

It remembers what it listed, as they do, until it is told to forget.
"""

from typing import Any  # fsspec has no types

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

OBJECTS: dict[str, bytes] = {}


class BucketFile(AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
    """A file that is uploaded as a whole when it is closed."""

    def _upload_chunk(self, final: bool = False) -> bool:
        if final:
            OBJECTS[self.path] = self.buffer.getvalue()
        return final

    def _fetch_range(self, start: int, end: int) -> bytes:
        return OBJECTS[self.path][start:end]


class Bucket(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """The filesystem ``bucket://``."""

    protocol = "bucket"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.listed: dict[str, list[dict[str, Any]]] = {}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """What is under a prefix."""
        path = self._strip_protocol(path).rstrip("/")
        if path not in self.listed:
            found: dict[str, dict[str, Any]] = {}
            for name, data in OBJECTS.items():
                if name == path:
                    found[name] = {"name": name, "size": len(data), "type": "file"}
                elif name.startswith(f"{path}/"):
                    child, _slash, below = name.removeprefix(f"{path}/").partition("/")
                    is_file = not below
                    size = len(data) if is_file else 0
                    kind = "file" if is_file else "directory"
                    inner = f"{path}/{child}"
                    found[inner] = {"name": inner, "size": size, "type": kind}
            if not found:
                raise FileNotFoundError(path)
            self.listed[path] = list(found.values())
        entries = self.listed[path]
        return entries if detail else [entry["name"] for entry in entries]

    def invalidate_cache(self, path: str | None = None) -> None:
        """Forget what was listed."""
        self.listed.clear()
        super().invalidate_cache(path)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """What is known of an object or of a prefix; from the last listing if there is one."""
        path = self._strip_protocol(path).rstrip("/")
        parent = path.rpartition("/")[0]
        for entry in self.listed.get(parent, []):
            if entry["name"] == path:
                return entry
        if parent in self.listed:
            raise FileNotFoundError(path)
        if path in OBJECTS:
            return {"name": path, "size": len(OBJECTS[path]), "type": "file"}
        if any(name.startswith(f"{path}/") for name in OBJECTS):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> BucketFile:
        return BucketFile(self, path, mode, **options)

    def rm_file(self, path: str) -> None:
        """Remove an object."""
        path = self._strip_protocol(path)
        if path not in OBJECTS:
            raise FileNotFoundError(path)
        del OBJECTS[path]
        self.listed.clear()

    def _rm(self, path: str) -> None:
        if self._strip_protocol(path) in OBJECTS:  # a prefix goes with its last object
            self.rm_file(path)

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        """Copy an object."""
        if self._strip_protocol(path1) in OBJECTS:
            OBJECTS[self._strip_protocol(path2)] = OBJECTS[self._strip_protocol(path1)]
            self.listed.clear()

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Remove an object, or all under a prefix."""
        for name in self.expand_path(path, recursive=recursive, maxdepth=maxdepth):
            self._rm(name)


fsspec.register_implementation("bucket", Bucket)
