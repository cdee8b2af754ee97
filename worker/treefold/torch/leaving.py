"""How a script ends: as done, as failed and with which error, or because it is asked to."""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import NoReturn

from treefold.torch.restarting import begin_anew, can_begin_anew, is_rolled_back
from treefold.wire.words import Outcome

Leave = Callable[[Outcome, str], None]


class ExitWatch:
    """Calls ``leave`` once when the interpreter ends, with what the script ended with.

    Parameters
    ----------
    leave : callable
        Called with the outcome and one line of text.
    drain : callable, optional
        Called when the process is asked to end (SIGTERM), unless the script handles that itself.
        A second signal ends the process at once.

    Notes
    -----
    An exit status is seen if it is given to ``sys.exit``; a bare ``raise SystemExit(n)`` passes
    every hook of the interpreter unseen and counts as done here, though not for the process itself.
    """

    def __init__(self, leave: Leave, drain: Callable[[], None] | None = None) -> None:
        self._leave = leave
        self._drain = drain
        self._failure = ""
        self._pid = os.getpid()
        self._hook = sys.excepthook
        self._exit = sys.exit

    def install(self) -> None:
        """Begin to watch."""
        self._hook, self._exit = sys.excepthook, sys.exit
        sys.excepthook = self.on_exception
        sys.exit = self.on_exit
        atexit.register(self.on_end)
        is_free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if self._drain is not None and is_free and _is_main_thread():
            signal.signal(signal.SIGTERM, self.on_term)

    def remove(self) -> None:
        """Stop watching."""
        atexit.unregister(self.on_end)
        if sys.excepthook == self.on_exception:
            sys.excepthook = self._hook
        if sys.exit == self.on_exit:
            sys.exit = self._exit
        if signal.getsignal(signal.SIGTERM) == self.on_term and _is_main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def on_exception(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """Note what the script failed with, and let it be shown as always.

        If it is that the job has gone back to a checkpoint, the script begins anew.
        """
        if is_rolled_back(error) and os.getpid() == self._pid and can_begin_anew():
            begin_anew(lambda: self._leave(Outcome.DRAINED, "the script begins anew"))
        lines = str(error).strip().splitlines()
        self._failure = f"{kind.__name__}: {lines[0]}" if lines else kind.__name__
        self._hook(kind, error, trace)

    def on_exit(self, status: str | int | None = None) -> NoReturn:
        """Note with which status the script wants to end."""
        self._failure = "" if status in (None, 0) else f"exit status {status}"
        self._exit(status)

    def on_term(self, number: int, frame: FrameType | None) -> None:
        """Drain at the first signal. A forked process ends at once, as without a handler."""
        del frame
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() == self._pid and self._drain is not None:
            self._drain()
        else:
            os.kill(os.getpid(), number)

    def on_end(self) -> None:
        """Leave the cluster. A forked process has nothing to leave."""
        if os.getpid() != self._pid:
            return
        outcome = Outcome.FAILED if self._failure else Outcome.DONE
        self._leave(outcome, self._failure)


def _is_main_thread() -> bool:
    """Whether this is the thread that may set signal handlers."""
    return threading.current_thread() is threading.main_thread()


def end_with(failure: BaseException, status: int) -> None:
    """Should ``failure`` end the script, show it as always and exit with ``status`` instead of 1.

    Parameters
    ----------
    failure : BaseException
        About to be raised.
    status : int
        Exit status of the process.
    """
    shown = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        shown(kind, error, trace)
        if error is failure:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    sys.excepthook = hook
