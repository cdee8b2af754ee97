"""The guard: outlives the launcher by a moment and ends what the launcher could not end itself.

It reads a pipe whose other end only the launcher holds (and each child until its command begins).
Lines ``+N`` and ``-N`` say that session N runs or is gone, ``@PATH`` names the launcher's folder.
The end of the pipe means that the launcher is gone, however it went: then every session that is
left is killed and the folder removed. It needs nothing of the kernel that only Linux has.

Run by its path in an interpreter without site packages, so it imports the standard library only.
"""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PROCESSES = Path("/proc")


def main(lines: Iterable[str]) -> None:
    """Follow the launcher's lines to their end, then clean up.

    Parameters
    ----------
    lines : iterable of str
        From the pipe.
    """
    sessions: dict[int, None] = {}
    folders: dict[str, None] = {}
    for line in lines:
        kind, text = line[0], line[1:].rstrip("\n")
        if kind == "+":
            sessions[int(text)] = None
        elif kind == "-":
            sessions.pop(int(text), None)
        else:
            folders[text] = None
    for session in sessions:
        kill_session(session)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def kill_session(session: int) -> None:
    """Kill every process of a session.

    Parameters
    ----------
    session : int
        Process id of its leader, which may be gone already.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(session, signal.SIGKILL)  # at once, so that none of them can fork away
    for process in members_of(session):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def members_of(session: int) -> list[int]:
    """Processes of a session that are in other process groups too, where ``/proc`` tells."""
    names = [entry.name for entry in PROCESSES.iterdir()] if PROCESSES.is_dir() else []
    return [int(name) for name in names if name.isdigit() and session_of(int(name)) == session]


def session_of(process: int) -> int:
    """The session of a process, 0 if there is no such process."""
    try:
        return os.getsid(process)
    except (ProcessLookupError, PermissionError):
        return 0


if __name__ == "__main__":
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    main(sys.stdin)
