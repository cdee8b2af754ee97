"""Child processes with their output, and the guard that ends them if the launcher cannot."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from treefold.launch.commands import BARE_PYTHON, CHILD, GUARD
from treefold.launch.guard import kill_session

READ_BYTES = 1 << 16
LINE_BYTES_MAX = 1 << 16  # longer lines are cut, so that no output can fill our memory
PIPE_READS_MAX = 64  # more than a pipe holds: what still writes is not ours
GUARD_PATIENCE_S = 5


@dataclass(frozen=True, slots=True)
class Line:
    """One line that a process printed, without its end."""

    process: str
    text: str
    is_error: bool


@dataclass(slots=True)
class Stream:
    """One output of a child: bytes in, whole lines out."""

    process: str
    pipe: BinaryIO
    is_error: bool
    is_open: bool = True
    is_dry: bool = False
    _rest: bytearray = field(default_factory=bytearray)

    def read(self) -> Iterator[Line]:
        """Lines that are complete by now; never waits."""
        self.is_dry = False
        try:
            data = os.read(self.pipe.fileno(), READ_BYTES)
        except BlockingIOError:
            self.is_dry = True
            return
        self.is_open = bool(data)
        self._rest += data
        *lines, rest = self._rest.split(b"\n")
        self._rest = rest
        yield from (self._line(line) for line in lines)
        if len(rest) > LINE_BYTES_MAX or not data:
            yield from self.flush()

    def drain(self) -> Iterator[Line]:
        """Everything that is in the pipe, the last line even if it has no end; then close."""
        for _ in range(PIPE_READS_MAX):
            if not self.is_open or self.is_dry:
                break
            yield from self.read()
        yield from self.flush()
        self.pipe.close()

    def flush(self) -> Iterator[Line]:
        """What there is of a line that has no end."""
        rest, self._rest = self._rest, bytearray()
        if rest:
            yield self._line(rest)

    def _line(self, data: bytearray) -> Line:
        """A line as a terminal would show it: what follows the last return to its beginning."""
        text = data.decode("utf-8", errors="replace").rstrip("\r")
        return Line(self.process, text.rpartition("\r")[2], self.is_error)


class Child:
    """One process of the launch, leader of a session of its own.

    Parameters
    ----------
    name : str
        Such as ``worker-0``.
    command : list of str
        What it runs.
    environment : dict of str to str
        All of it.
    guard : Guard
        Learns of the process before the command begins.
    """

    def __init__(
        self, name: str, command: list[str], environment: dict[str, str], guard: "Guard"
    ) -> None:
        self.name = name
        self._guard = guard
        self._process = subprocess.Popen(
            [*BARE_PYTHON, CHILD, str(guard.descriptor), *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(guard.descriptor,),
            start_new_session=True,
        )
        self.streams = list(self._open_streams())

    @property
    def session(self) -> int:
        """Number of its session, which is its process id."""
        return self._process.pid

    def poll(self) -> int | None:
        """How it ended: exit code, or minus the number of the signal; None while it runs."""
        return self._process.poll()

    def end(self) -> None:
        """Ask it to end."""
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it, and all that it started."""
        kill_session(self.session)

    def bury(self) -> list[Line]:
        """Kill what it left behind and return the last lines; called once, after it has ended."""
        kill_session(self.session)
        self._guard.forget(self.session)
        return [line for stream in self.streams for line in stream.drain()]

    def _open_streams(self) -> Iterator[Stream]:
        for pipe, is_error in ((self._process.stdout, False), (self._process.stderr, True)):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)
                yield Stream(self.name, pipe, is_error)  # type: ignore[arg-type] # bytes, as asked


class Guard:
    """The launcher's end of the guard's pipe. Losing it, however, makes the guard clean up."""

    def __init__(self) -> None:
        reading, self.descriptor = os.pipe()
        self._process = subprocess.Popen(
            [*BARE_PYTHON, GUARD],
            stdin=reading,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(reading)

    def add_folder(self, path: str) -> None:
        """A folder to be removed at the end."""
        self._tell(f"@{path}\n")

    def forget(self, session: int) -> None:
        """A session that has ended."""
        self._tell(f"-{session}\n")

    def close(self) -> None:
        """Let the guard clean up and end."""
        os.close(self.descriptor)
        self._process.wait(GUARD_PATIENCE_S)

    def _tell(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # somebody killed the guard: we do its work
            os.write(self.descriptor, line.encode())
