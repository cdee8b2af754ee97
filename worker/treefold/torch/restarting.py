"""A script that begins anew in its own process, when the job has gone back to a checkpoint.

A script cannot go back by itself: it may have left the loop that is to be repeated. So the process
runs it from the start again, and what was trained already is come by without computing it.
"""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable

from treefold.common.errors import RolledBackError
from treefold.common.log import logger

FOLDER = os.getcwd()  # noqa: PTH109 # as the process began, for relative paths in its command


def is_rolled_back(error: BaseException | None) -> bool:
    """Whether an error, or one that it came of, says that the job has gone back."""
    seen: dict[int, None] = {}
    while error is not None and id(error) not in seen:
        if isinstance(error, RolledBackError):
            return True
        seen[id(error)] = None
        error = error.__cause__ or error.__context__
    return False


def can_begin_anew() -> bool:
    """Whether this process is a script of its own that can be run from the start."""
    is_main = threading.current_thread() is threading.main_thread()
    is_script = getattr(sys.modules.get("__main__"), "__file__", None) is not None
    return is_main and is_script and not hasattr(sys, "ps1") and len(sys.orig_argv) > 1


def begin_anew(leave: Callable[[], None]) -> None:
    """Run this process's command from the start, in its place.

    Parameters
    ----------
    leave : callable
        Closes connections first.
    """
    logger("worker").warning("the job has gone back to a checkpoint: the script begins anew")
    leave()
    for child in multiprocessing.active_children():  # such as those that read data ahead
        child.terminate()
        child.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os.chdir(FOLDER)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 # the same command
