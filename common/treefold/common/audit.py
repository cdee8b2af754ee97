"""The audit log: who asked for what from where, and whether it was allowed. One JSON line each.

Several processes may write to one file. It never has a secret, a tensor or a setting in it. May be
used by any thread.
"""

import os
import threading
import time
from pathlib import Path

import msgspec

from treefold.common.errors import ConfigError
from treefold.common.log import logger

DENIED_PER_S_MAX = 50  # lines; a flood of refusals must not fill the disk
TEXT_MAX = 500


class Deed(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line.

    Attributes
    ----------
    at : str
        When, UTC.
    by : str
        The process that decided, as ``ROLE PID``.
    what : str
        ``connect``, the kind of a message, ``cluster`` for what happened to members, ``restore``.
    is_allowed : bool
        Whether it was allowed.
    who, role : str
        Name and role of the key, empty if it has none.
    where : str
        Address that it came from.
    text : str
        Why not, or what happened.
    left_out : int
        Deeds before this one that have no line: refusals beyond the limit, or a full disk.
    """

    at: str
    by: str
    what: str
    is_allowed: bool
    who: str = ""
    role: str = ""
    where: str = ""
    text: str = ""
    left_out: int = 0


class Audit:
    """Appends to a file.

    Parameters
    ----------
    path : str
        The file; made, for its owner alone, if it is not there.
    role : str
        Of this process.

    Raises
    ------
    ConfigError
        It cannot be written.
    """

    def __init__(self, path: str, role: str) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        try:
            self._descriptor = os.open(Path(path), flags, 0o600)
        except OSError as error:
            raise ConfigError(f"the audit log {path} cannot be written: {error}") from error
        self._by = f"{role} {os.getpid()}"
        self._lock = threading.Lock()
        self._second_ns = 0
        self._denied = self._left_out = 0
        self._is_failing = False

    def note(self, what: str, text: str = "", *, who: tuple[str, str, str] = ("", "", "")) -> None:
        """Write down what was allowed, or has happened; ``who`` is a name, a role, an address."""
        self._write(what, text, who, is_allowed=True)

    def deny(self, what: str, text: str, *, who: tuple[str, str, str]) -> None:
        """Write down what was refused; of a flood, only how many there were."""
        with self._lock:
            now_ns = time.monotonic_ns()
            if now_ns - self._second_ns >= 1_000_000_000:
                self._second_ns, self._denied = now_ns, 0
            self._denied += 1
            if self._denied > DENIED_PER_S_MAX:
                self._left_out += 1
                return
        self._write(what, text, who, is_allowed=False)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _write(self, what: str, text: str, who: tuple[str, str, str], *, is_allowed: bool) -> None:
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())  # nothing is decided by it
        with self._lock:
            left_out, self._left_out = self._left_out, 0
        deed = Deed(at, self._by, what, is_allowed, *who, text[:TEXT_MAX], left_out)
        try:
            os.write(self._descriptor, msgspec.json.encode(deed) + b"\n")  # at once: it stays whole
        except OSError as error:  # a full disk must not end the job
            with self._lock:
                self._left_out += left_out + 1
            if not self._is_failing:
                logger("audit").error("the audit log cannot be written: %s", error)
            self._is_failing = True
        else:
            self._is_failing = False
