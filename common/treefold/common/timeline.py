"""Spans of time of one process, written as they happen in the format of Chrome's trace viewer.

A file is whole JSON after every write, so that a process that is killed leaves one that loads. It
has one event per line, which is what `merge` relies on. Times are those of the host's monotonic
clock, so that files of one host lie on one axis.
"""

import contextlib
import itertools
import os
import threading
from collections import deque
from collections.abc import Mapping
from glob import escape
from pathlib import Path

import msgspec

from treefold.common.errors import ConfigError
from treefold.common.log import logger

BYTES_MAX = 64 << 20  # of one process's file; what happens later is left out, which it says
PENDING_MAX = 100_000  # spans between two writes; more are left out
WRITE_NS = 500_000_000  # from one write to the next
OPEN, CLOSE, BETWEEN = b"[\n", b"\n]\n", b",\n"
WAITS = ("wait", "await")
Args = Mapping[str, int]


class Timeline:
    """The file of one process.

    Parameters
    ----------
    path : Path
        Where to write.
    number : int
        Tells the process from others in a file that has several.
    """

    def __init__(self, path: Path, number: int) -> None:
        self._number = number
        self._lanes: dict[int, str] = {}
        self._spans: deque[tuple[int, str, int, int, Args | None]] = deque()
        self._named: dict[int, None] = {}
        self._dropped = 0
        self._is_full = self._is_broken = False
        self._last_us = 0.0
        self._next_ns = 0
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._end = len(OPEN)
        self._is_first = True
        os.pwrite(self._file, OPEN + CLOSE, 0)

    def own(self, lane: str) -> None:
        """The calling thread is the one of this name."""
        self._lanes[threading.get_ident()] = lane

    def name(self, name: str) -> None:
        """What the process is called, such as ``worker-3``."""
        self._append([self._meta("process_name", 0, name)])

    def span(self, name: str, began_ns: int, ended_ns: int, args: Args | None = None) -> None:
        """Something took from then to then. May be called from any thread."""
        if len(self._spans) < PENDING_MAX:
            self._spans.append((threading.get_ident(), name, began_ns, ended_ns, args))
        else:
            self._dropped += 1

    def write_at(self, now_ns: int) -> None:
        """Write what there is, if it is time. For the thread that owns the file."""
        if now_ns >= self._next_ns:
            self._next_ns = now_ns + WRITE_NS
            self.write()

    def write(self) -> None:
        """Write what there is."""
        lines: list[bytes] = []
        for _ in range(len(self._spans)):
            thread, name, began_ns, ended_ns, args = self._spans.popleft()
            if thread not in self._named:
                self._named[thread] = None
                lane = self._lanes.get(thread, "training")
                lines.append(self._meta("thread_name", thread, lane))
            self._last_us = ended_ns / 1000
            event: dict[str, object] = {
                "name": "wait" if name in WAITS else name,
                "ph": "X",
                "ts": began_ns / 1000,
                "dur": (ended_ns - began_ns) / 1000,
                "pid": self._number,
                "tid": thread,
            }
            if args:
                event["args"] = args
            lines.append(msgspec.json.encode(event))
        if lines:
            self._append(lines)

    def close(self) -> None:
        """Write the last spans, and how many were left out."""
        self.write()
        if self._dropped and not self._is_broken:
            self._put([self._note(f"{self._dropped} spans are left out")])
        os.close(self._file)

    def _append(self, lines: list[bytes]) -> None:
        size = sum(map(len, lines)) + len(BETWEEN) * len(lines)
        if self._is_full or self._end + size > BYTES_MAX:
            self._dropped += len(lines)
            if not self._is_full:
                self._is_full = True
                self._put([self._note("the file is full: nothing of what follows is in it")])
            return
        self._put(lines)

    def _put(self, lines: list[bytes]) -> None:
        body = BETWEEN.join(lines)
        whole = body if self._is_first else BETWEEN + body
        try:
            self._write_all(whole + CLOSE)
        except OSError as error:  # the disk may be full; training goes on
            self._is_full = self._is_broken = True
            logger("timeline").warning("nothing more is written to the timeline: %s", error)
            with contextlib.suppress(OSError):
                os.pwrite(self._file, CLOSE, self._end)  # where it was before: that takes no room
                os.ftruncate(self._file, self._end + len(CLOSE))
            return
        self._is_first = False
        self._end += len(whole)

    def _write_all(self, data: bytes) -> None:
        written = 0
        while written < len(data):  # a disk that is nearly full takes a part
            written += os.pwrite(self._file, data[written:], self._end + written)

    def _meta(self, kind: str, thread: int, name: str) -> bytes:
        event = {
            "name": kind, "ph": "M", "pid": self._number, "tid": thread, "args": {"name": name}
        }  # fmt: skip
        return msgspec.json.encode(event)

    def _note(self, text: str) -> bytes:
        event: dict[str, object] = {"name": text, "ph": "i", "s": "p", "ts": self._last_us}
        event |= {"pid": self._number, "tid": 0}
        return msgspec.json.encode(event)


def part_of(base: str, role: str) -> Path:
    """A new file for this process, beside the one that they are merged into.

    It may have one already, if its script has begun anew in the same process.
    """
    stem = f"{base}.{role}-{os.getpid()}"
    names = (stem if number == 1 else f"{stem}-{number}" for number in itertools.count(1))
    return next(path for path in map(Path, (f"{name}.json" for name in names)) if not path.exists())


def parts_of(base: str) -> list[Path]:
    """Files of processes that are there, by name."""
    path, roles = Path(base), ("scheduler", "server", "worker")
    patterns = [f"{escape(path.name)}.{role}-*.json" for role in roles]
    return sorted(found for pattern in patterns for found in path.parent.glob(pattern))


def begin(base: str) -> None:
    """Make room for the files of a run's processes, if there are to be any.

    Raises
    ------
    ConfigError
        Nothing can be written there.
    """
    if not base:
        return
    try:
        Path(base).touch()
        for part in parts_of(base):
            part.unlink()
    except OSError as error:
        raise ConfigError(f"a timeline cannot be written: {error}") from error


def merge(base: str) -> int:
    """Put the files of a run's processes together, and remove them.

    Returns
    -------
    int
        How many there were.
    """
    parts = parts_of(base)
    with Path(base).open("wb") as out:
        out.write(b'{"displayTimeUnit":"ms","traceEvents":[\n')
        is_first = True
        for part in parts:
            with part.open("rb") as lines:
                for line in lines:
                    if line.startswith(b"{"):
                        out.write((b"" if is_first else b",\n") + line.rstrip(b",\n"))
                        is_first = False
        out.write(b"\n]}\n")
    for part in parts:
        part.unlink()
    return len(parts)
