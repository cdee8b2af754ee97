"""``treefold top``: what goes on in a cluster, drawn anew every second, or as lines of JSON."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Protocol, TextIO

import msgspec
from rich.console import Console
from rich.live import Live
from rich.text import Text

from treefold.cli.flags import Parser
from treefold.cli.main import DONE, FAILED, NOT_STARTED
from treefold.cli.rates import MS_NS, Lens, Look
from treefold.cli.screen import drawn
from treefold.cli.status import ANSWER_MS, found_address
from treefold.common.errors import UnavailableError
from treefold.launch.link import EventStatus, StatusLink, parse
from treefold.transport.access import access_of
from treefold.transport.hosts import located
from treefold.wire.permissions import CURIOUS

DESCRIPTION = (
    "Show what goes on in a cluster: who computes what, where the time goes, what happened. Drawn "
    "anew every second until the job has ended. Without --scheduler: the scheduler of this machine."
)
EVERY_NS = 1_000_000_000
GONE_NS = 60_000_000_000  # a scheduler that is silent for so long is not waited for any more
NS = 1e9
CODES = {"done": DONE, "drained": DONE, "failed": FAILED, "not_formed": NOT_STARTED}
"""Exit codes, by how the job ended."""


class View(Protocol):
    """Where looks are shown."""

    def show(self, look: Look) -> None:
        """The newest one."""


def main(words: list[str]) -> int:
    """Show what goes on until the job has ended.

    Parameters
    ----------
    words : list of str
        The command line after ``treefold top``.

    Returns
    -------
    int
        0 the job is done or was stopped, or as much was shown as was asked for; 1 it failed; 3 it
        did not form, or the scheduler does not answer.
    """
    parser = Parser("top", DESCRIPTION, ["scheduler", "keys"])
    parser.add_argument(
        "--json", action="store_true", help="print one line of JSON every second, rates included"
    )
    parser.add_argument("--once", action="store_true", help="the same as --count 1")
    parser.add_argument("--count", type=int, metavar="N", help="end after so many times")
    options, loaded = parser.read(words)
    if options.count is not None and options.count < 1:
        parser.error("--count takes 1 or more")
    is_screen = sys.stdout.isatty() and not options.json
    count = 1 if options.once else options.count
    if count is None and not is_screen and not options.json:
        count = 1  # a file or a pipe gets tables, once
    address = loaded.settings.scheduler or found_address()
    link = StatusLink(located(address, ANSWER_MS / 1000), access_of(loaded.settings, *CURIOUS))
    try:
        with _view(is_json=options.json, is_screen=is_screen and count is None) as view:
            return Watch(address, link, view, count).run(is_warm=is_screen and count is None)
    except BrokenPipeError:  # whoever read it has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    finally:
        link.close()


class Watch:
    """Asks, and shows what is answered, until the job has ended.

    Parameters
    ----------
    address : str
        The scheduler's.
    link : StatusLink
        To it.
    view : View
        Where to show it.
    count : int or None
        How often at most.
    """

    def __init__(self, address: str, link: StatusLink, view: View, count: int | None) -> None:
        self._address = address
        self._link = link
        self._view = view
        self._left = count
        self._lens = Lens(address)
        self._answered_ns = time.monotonic_ns()

    def run(self, *, is_warm: bool) -> int:
        """Watch; returns the exit code.

        Parameters
        ----------
        is_warm : bool
            Whether the first answer is shown, which has no rates yet.

        Raises
        ------
        UnavailableError
            Nobody answers.
        """
        known: Look | None = None
        while True:
            began_ns = time.monotonic_ns()
            look = self._asked(known)
            is_shown = known is not None or is_warm or look.ending is not None
            known = msgspec.structs.replace(look, silent_s=0.0)
            if is_shown:
                self._view.show(look)
                if self._left is not None:
                    self._left -= 1
            if look.ending is not None:
                return CODES[look.ending.outcome]
            if self._left == 0:
                return DONE
            time.sleep(max(0, began_ns + EVERY_NS - time.monotonic_ns()) / NS)

    def _asked(self, known: Look | None) -> Look:
        """The newest look; if there is no answer, the last one with how old it is."""
        wait_ns = EVERY_NS if known is not None else ANSWER_MS * MS_NS
        until_ns = time.monotonic_ns() + wait_ns
        answer, now_ns = None, time.monotonic_ns()
        while answer is None and now_ns < until_ns:
            self._link.ask(now_ns, is_watching=True)
            answer = self._link.body(min(until_ns - now_ns, EVERY_NS) // MS_NS)
            now_ns = time.monotonic_ns()
        if answer is not None:
            self._answered_ns = now_ns
            # Nothing is decided by it.
            at = time.clock_gettime(time.CLOCK_REALTIME)
            return self._lens.look(now_ns, at, parse(answer[1]))
        silent_ns = now_ns - self._answered_ns
        if known is None or silent_ns >= GONE_NS:
            text = f"no scheduler answered at {self._address} within {silent_ns / NS:.0f} s"
            last = "" if known is None else f"; the last that it said was round {known.round}"
            raise UnavailableError(f"{text}{last}; is it running there?")
        return msgspec.structs.replace(known, silent_s=round(silent_ns / NS, 3))


class Lines:
    """One line of JSON for each look, with the events since the one before.

    Parameters
    ----------
    out : file
        Where to.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._newest: EventStatus | None = None

    def show(self, look: Look) -> None:
        """Write it."""
        newest = self._newest
        known = look.events
        if newest is not None and newest in known:  # else another scheduler counts anew
            known = known[known.index(newest) + 1 :]
        self._newest = look.events[-1] if look.events else newest
        line = msgspec.json.encode(msgspec.structs.replace(look, events=known))
        self._out.write(line.decode() + "\n")
        self._out.flush()


class Tables:
    """Tables below each other, for files and pipes.

    Parameters
    ----------
    out : file
        Where to.
    """

    def __init__(self, out: TextIO) -> None:
        self._console = Console(file=out, highlight=False)

    def show(self, look: Look) -> None:
        """Print it."""
        for line in drawn(look):
            self._console.print(line, soft_wrap=True)


class Screen:
    """A terminal that is drawn anew; how it was at last stays there at the end.

    Parameters
    ----------
    out : file
        The terminal.
    """

    def __init__(self, out: TextIO) -> None:
        self._console = Console(file=out, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, screen=True)
        self._look: Look | None = None

    def __enter__(self) -> "Screen":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        if self._look is not None:
            for line in drawn(self._look, self._console.height - 1):
                self._console.print(line, no_wrap=True, overflow="ellipsis")

    def show(self, look: Look) -> None:
        """Draw it."""
        self._look = look
        lines = drawn(look, self._console.height)
        self._live.update(Text("\n", no_wrap=True, overflow="ellipsis").join(lines), refresh=True)


@contextlib.contextmanager
def _view(*, is_json: bool, is_screen: bool) -> Iterator[View]:
    """Where to show it; a terminal is given back as it was, after a signal as well."""
    if is_json:
        yield Lines(sys.stdout)
    elif not is_screen:
        yield Tables(sys.stdout)
    else:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        with Screen(sys.stdout) as screen:
            yield screen
