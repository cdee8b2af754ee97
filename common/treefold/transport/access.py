"""What a process has of its folder of keys: its own key, and who is allowed right now.

The allow-list is read again when its file changes, so that keys come and go while a job runs. May
be asked by any thread; `refresh` replaces the list at once.
"""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

from treefold.common.config import Settings
from treefold.common.errors import ConfigError
from treefold.common.log import logger
from treefold.transport.keys import ALLOWED, Entry, Key, own_key, read_allowed
from treefold.wire.permissions import KeyRole

LOOK_NS = 200_000_000  # between two looks at the file


class Access:
    """The keys of one process.

    Parameters
    ----------
    folder : str
        Of keys.
    roles : sequence of KeyRole
        What this process is; see `treefold.transport.keys.own_key`.

    Attributes
    ----------
    key : Key
        Its own.

    Raises
    ------
    ConfigError
        The folder is not as it has to be.
    """

    def __init__(self, folder: str, roles: Sequence[KeyRole]) -> None:
        self.key: Key = own_key(folder, roles)
        self._folder = Path(folder).absolute()  # scripts change the working directory
        self._lock = threading.Lock()
        self._stamp = self._look()
        self._looked_ns = time.monotonic_ns()
        self._entries = {entry.public: entry for entry in read_allowed(self._folder)}
        self._proven: dict[KeyRole, str] = {}
        self._log = logger("transport")

    @property
    def folder(self) -> Path:
        """Where the keys are."""
        return self._folder

    def entry(self, public: str) -> Entry | None:
        """Who has this key, None if it is not allowed (any more)."""
        return self._entries.get(public)

    def listeners(self, role: KeyRole) -> list[str]:
        """Public keys that a listener of this role may have, the likeliest first."""
        found = [entry.public for entry in self._entries.values() if entry.role is role]
        proven = self._proven.get(role)
        return sorted(found, key=lambda public: public != proven)

    def prove(self, role: KeyRole, public: str) -> None:
        """A listener of this role has shown that it has this key."""
        self._proven[role] = public

    def refresh(self, *, is_urgent: bool = False) -> None:
        """Take in the allow-list if its file has changed; looked at now and then."""
        now_ns = time.monotonic_ns()
        if now_ns - self._looked_ns < LOOK_NS and not is_urgent:
            return
        with self._lock:
            self._looked_ns = now_ns
            stamp = self._look()
            if stamp == self._stamp:
                return
            self._stamp = stamp
            try:
                entries = {entry.public: entry for entry in read_allowed(self._folder)}
            except ConfigError as error:
                self._log.error("the allow-list stays as it was: %s", error)
                return
            self._tell(entries)
            self._entries = entries

    def _tell(self, entries: dict[str, Entry]) -> None:
        for public, entry in entries.items():
            if public not in self._entries:
                self._log.info("%s may connect as %s from now on", entry.name, entry.role)
        for public, entry in self._entries.items():
            if public not in entries:
                self._log.warning("%s (%s) may not connect any more", entry.name, entry.role)

    def _look(self) -> tuple[int, int, int]:
        """What tells one state of the file from another."""
        try:
            found = (self._folder / ALLOWED).stat()
        except OSError:
            return 0, 0, 0
        return found.st_mtime_ns, found.st_size, found.st_ino


def access_of(settings: Settings, *roles: KeyRole) -> Access | None:
    """The keys that the settings name, for a process of one of these roles; None without keys."""
    return Access(settings.keys, roles) if settings.keys else None
