"""A simulated disk: what was synced survives a crash, of the rest a prefix does, sometimes garbled.

Rewriting is atomic, at a moment that nobody knows until a crash: a file that was rewritten and not
synced since is the old one or the new one after it.
"""

import random
from dataclasses import dataclass, field

BLOCK_BYTES = 512
GARBLED = 0.25  # of the crashes that tear a file's tail, how many leave garbage in its last block


@dataclass(eq=False, slots=True)
class File:
    """One file. ``before`` is what it was before a rewrite that may not have happened yet."""

    data: bytes = b""
    synced: int = 0
    before: "File | None" = None


@dataclass(eq=False, slots=True)
class Disk:
    """Named files of one machine."""

    files: dict[str, File] = field(default_factory=dict)

    def append(self, name: str, data: bytes) -> None:
        """Write behind a file's end; makes the file. Not safe before `sync`."""
        self.files.setdefault(name, File()).data += data

    def sync(self, name: str) -> None:
        """Make all of a file safe."""
        file = self.files[name]
        file.synced, file.before = len(file.data), None

    def rewrite(self, name: str, data: bytes) -> None:
        """Replace a file, atomically. Its new content is synced; that it has happened is not."""
        self.files[name] = File(data, len(data), self.files.get(name, File()))

    def read(self, name: str) -> bytes:
        """What a process sees, synced or not; nothing of a file that is not there."""
        file = self.files.get(name)
        return file.data if file else b""

    def crash(self, rng: random.Random) -> None:
        """Lose what a loss of power loses."""
        for name, file in self.files.items():
            while file.before is not None and rng.random() < 0.5:
                file = file.before  # noqa: PLW2901 - the file as it was before
            self.files[name] = _survivor(file, rng)


def _survivor(file: File, rng: random.Random) -> File:
    kept = rng.randint(file.synced, len(file.data))
    data = file.data[:kept]
    torn = max(file.synced, (kept - 1) // BLOCK_BYTES * BLOCK_BYTES) if kept else 0
    if kept > torn and rng.random() < GARBLED:
        data = data[:torn] + rng.randbytes(kept - torn)
    return File(data, kept)
