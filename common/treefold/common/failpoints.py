"""Named points in the code at which a test lets a process die, stop or fail. Off unless armed.

``TREEFOLD_FAILPOINT`` says what happens where, several separated by commas::

    [member/]point:action[@hit]         server-1/journal.before_write:kill@3

`member` is one of the names that the process gives to `arm`; without one every process is meant.
`action` is ``kill`` (SIGKILL to itself), ``stop`` (SIGSTOP to itself), ``raise`` (an OSError, EIO)
or ``enospc`` (an OSError, ENOSPC). It happens at that hit alone, by default the first one.

A process that is started again would die again at the same hit. ``TREEFOLD_FAILPOINT_ONCE`` names
a folder in which a file is made before an action happens; while that is there it does not happen
again, in no process. ``TREEFOLD_FAILPOINT_FROM`` names a file; what is passed before that is there
is no hit, so that a test can say when the counting begins.
"""

import errno
import os
import re
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path

from treefold.common import config
from treefold.common.errors import ConfigError

POINTS = (
    "journal.before_write",
    "journal.after_write_before_sync",
    "journal.after_sync",
    "journal.rewrite.before_rename",
    "journal.rewrite.after_rename",
    "checkpoint.before_file",
    "checkpoint.mid_file",
    "checkpoint.after_file_before_sync",
    "checkpoint.after_file",
    "checkpoint.before_manifest",
    "checkpoint.manifest.before_sync",
    "checkpoint.manifest.before_rename",
    "checkpoint.manifest.after_rename",
    "checkpoint.mid_prune",
    "scheduler.journal_read",
    "scheduler.heartbeat_received",
    "scheduler.before_persist",
    "scheduler.after_persist_before_send",
    "scheduler.view_sent_to_the_first_of_several",
    "scheduler.synced_received",
    "scheduler.stop_sent_to_the_first_of_several",
    "server.push_received",
    "server.before_fold",
    "server.after_fold_before_step",
    "server.first_of_several_parts_made",
    "server.before_relay",
    "server.after_relay",
    "server.after_chain_round",
    "server.after_step_before_publish",
    "server.published_to_the_first_of_several",
    "server.applied_before_it_is_said",
    "server.view_received",
    "server.promoted_before_the_chain_is_asked",
    "server.before_shard_is_opened",
    "server.unit_copy_sent",
    "server.unit_loaded_before_taken_is_said",
    "server.before_synced_is_told",
    "server.before_shard_is_closed",
    "server.before_leave",
    "worker.before_register",
    "worker.before_declare",
    "worker.before_push",
    "worker.first_of_several_pushes_sent",
    "worker.before_meta",
    "worker.pulled_before_load",
    "worker.before_leave",
)
SPEC = re.compile(
    r"(?:(?P<member>[\w-]+)/)?(?P<point>[\w.]+):(?P<action>kill|stop|raise|enospc)"
    r"(?:@(?P<hit>[1-9][0-9]*))?"
)


class Armed:
    """What shall happen at a point.

    Parameters
    ----------
    text : str
        One element of ``TREEFOLD_FAILPOINT``.

    Raises
    ------
    ConfigError
        It is written in a wrong way, or there is no such point.
    """

    def __init__(self, text: str) -> None:
        match = SPEC.fullmatch(text)
        if not match:
            msg = (
                f"TREEFOLD_FAILPOINT has {text!r}; it is written [member/]point:action[@hit], with "
                "kill, stop, raise or enospc for an action"
            )
            raise ConfigError(msg)
        self.text = text
        self.member = match["member"] or ""
        self.point = match["point"]
        self.action = match["action"]
        self.at = int(match["hit"] or 1)
        self._hits = count(1)
        if self.point not in POINTS:
            msg = f"TREEFOLD_FAILPOINT has {self.point!r}; the points are {', '.join(POINTS)}"
            raise ConfigError(msg)

    def is_due(self, start: str) -> bool:
        """Count a hit, once there is a file ``start`` (empty: always); whether it is the one."""
        if start and not Path(start).exists():
            return False
        return next(self._hits) == self.at

    def act(self, once: str, let_out: Callable[[], None] | None) -> None:
        """Let it happen, unless the folder ``once`` (empty: none) says that it has already."""
        if once and not self._is_first(Path(once)):
            return
        if self.action == "kill":
            if let_out is not None:
                let_out()
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            code = errno.ENOSPC if self.action == "enospc" else errno.EIO
            raise OSError(code, f"{os.strerror(code)} (at the failpoint {self.point})")

    def _is_first(self, folder: Path) -> bool:
        marker = folder / re.sub(r"[^\w.@-]", "+", self.text)
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            return False
        return True


armed: dict[str, Armed] = {}
"""What is on in this process, by how it was written; empty elsewhere than in tests."""

_once = _start = ""


def failpoint(name: str, let_out: Callable[[], None] | None = None) -> None:
    """Do what a test wants to happen here: nothing, elsewhere than in tests.

    Parameters
    ----------
    name : str
        One of `POINTS`.
    let_out : callable, optional
        Called before a kill: lets what was sent before this point leave the process.
    """
    if armed:
        _act(name, let_out)


def arm(*members: str) -> None:
    """Switch on what the environment asks for. A process calls this when it starts.

    It may call it again when it has learnt its rank; what is on stays on and keeps its count.

    Parameters
    ----------
    *members : str
        Names of this process, such as ``server`` and ``server-1``.

    Raises
    ------
    ConfigError
        Something in ``TREEFOLD_FAILPOINT`` is not known, even if it is meant for another process;
        or ``TREEFOLD_FAILPOINT_ONCE`` is no folder.
    """
    global _once, _start
    spec, once, start = config.failpoints()
    if once and not Path(once).is_dir():
        raise ConfigError(f"TREEFOLD_FAILPOINT_ONCE is {once!r}, which is no folder")
    wanted = [Armed(text.strip()) for text in spec.split(",") if text.strip()]
    _once, _start = once, start
    for one in wanted:
        if not one.member or one.member in members:
            armed.setdefault(one.text, one)


def _act(name: str, let_out: Callable[[], None] | None) -> None:
    # All of them count before one raises.
    due = [one for one in tuple(armed.values()) if one.point == name and one.is_due(_start)]
    for one in due:
        one.act(_once, let_out)
