"""The live page as the scheduler's shell has it: samples, publishes, serves, and saves at the end.

A thread of its own asks once a second; the thread that owns the sockets answers between two events
and reads the core there, so that nothing is read while it changes.
"""

import contextlib
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from treefold.common.audit import Audit
from treefold.common.config import Settings
from treefold.common.errors import ConfigError, UnavailableError
from treefold.common.log import logger
from treefold.common.whole import write_whole
from treefold.scheduler.core import SchedulerCore
from treefold.scheduler.feed import Feed
from treefold.scheduler.history import History
from treefold.scheduler.pages import Desk, PageServer, Right
from treefold.scheduler.report import report_of
from treefold.scheduler.status import status_of
from treefold.transport.questions import Questions
from treefold.transport.web import is_loopback, read_token, told

EVERY_S = 1.0
CLOSING_S = 1.0  # for pages to take the last document
TOKEN_BYTES = 18


class Live:
    """What is shown of a job while it runs.

    Parameters
    ----------
    settings : Settings
        Where to listen, the tokens, and the file of the report.
    core : SchedulerCore
        Is read, on the thread that calls `turn`.
    ring : callable
        Wakes that thread.
    drain : callable
        Asks the core for a member to be drained, on that thread; returns why not, or nothing.
    audit : Audit, optional
        Where it is written down.

    Attributes
    ----------
    link : str
        Opens the page in a browser; empty without a page.

    Raises
    ------
    ConfigError
        The port is taken, there is no token where one is needed, or it cannot be read.
    """

    def __init__(
        self,
        settings: Settings,
        core: SchedulerCore,
        ring: Callable[[], None],
        drain: Callable[[str], str],
        audit: Audit | None = None,
    ) -> None:
        if settings.report and not Path(settings.report).parent.is_dir():
            raise ConfigError(f"there is no folder for the report {settings.report}")
        self._core = core
        self._file = settings.report
        self._history = History()
        self._feed = Feed()
        self._questions = Questions(ring)
        self._drain = drain
        self._server: PageServer | None = None
        self.link = ""
        if settings.page_port >= 0:
            self._server = self._serve(settings, audit)
        self._is_over = threading.Event()
        threading.Thread(target=self._run, name="treefold-live", daemon=True).start()

    def turn(self) -> None:
        """Do what was asked for; called between two events."""
        self._questions.answer()

    def close(self) -> None:
        """Show the end, and save it."""
        self._is_over.set()
        self._tick()
        self._feed.end(CLOSING_S)
        if self._server is not None:
            self._server.stop()
        if self._file:
            self._save(report_of(self._begin(is_live=False)))

    # ---- the thread that asks ------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_over.wait(EVERY_S):
            with contextlib.suppress(UnavailableError):  # it is busy, and asked again
                self._questions.ask(self._tick)

    # ---- the thread that owns the sockets --------------------------------------------------------

    def _tick(self) -> None:
        now_ns, at = time.monotonic_ns(), _unix_s()
        self._core.is_watched = self._feed.is_watched or bool(self._file)
        self._history.sample(now_ns, at, self._core)
        if self._feed.is_watched:
            self._feed.publish(_joined(at, self._history.news(), status_of(self._core, now_ns)))

    def _begin(self, *, is_live: bool) -> bytes:
        document = self._history.document() | {"is_live": is_live}
        return _joined(_unix_s(), document, status_of(self._core, time.monotonic_ns()))

    # ---- the server ------------------------------------------------------------------------------

    def _serve(self, settings: Settings, audit: Audit | None) -> PageServer:
        host, token = settings.page_bind, token_of(settings)
        rights = {token: Right.DRAIN}
        if settings.metrics_token_file:
            rights.setdefault(read_token(settings.metrics_token_file, "metrics"), Right.LOOK)
        desk = Desk(
            self._feed,
            begin=lambda: self._questions.ask(lambda: self._begin(is_live=True)),
            report=lambda: report_of(self._questions.ask(lambda: self._begin(is_live=False))),
            drain=lambda member: self._questions.ask(lambda: self._drain(member)),
            rights=rights,
            host=told(host, settings.advertise).strip("[]"),
            audit=audit,
        )
        try:
            server = PageServer(host, settings.page_port, desk)
        except (OSError, OverflowError) as error:
            where = f"{host} port {settings.page_port}"
            msg = f"the live page cannot be offered at {where}: {error}"
            raise ConfigError(f"{msg}; page_port 0 takes a free one") from error
        # What follows the # stays in the browser: it is in no log and in no request.
        self.link = f"http://{told(host, settings.advertise)}:{server.port}/#{token}"
        server.start("treefold-page")
        return server

    def _save(self, page: bytes) -> None:
        try:
            write_whole(Path(self._file), page)
        except OSError as error:  # the job is over, and was not about this
            logger("scheduler").error("the report cannot be saved: %s", error)


def token_of(settings: Settings) -> str:
    """The secret of the page: that of the file, or one made up for this process.

    Raises
    ------
    ConfigError
        The file cannot be read, the token is too short, or there is none and other machines can
        ask for the page.
    """
    if settings.page_token_file:
        return read_token(settings.page_token_file, "the live page")
    if not is_loopback(settings.page_bind):
        msg = (
            f"page_bind is {settings.page_bind}, which other machines can reach: name a file with "
            "a token in page_token_file, or bind to 127.0.0.1"
        )
        raise ConfigError(msg)
    return secrets.token_urlsafe(TOKEN_BYTES)


def _unix_s() -> float:
    """For people: nothing is decided by it."""
    return round(time.clock_gettime(time.CLOCK_REALTIME), 3)


def _joined(at: float, document: dict[str, object], status: bytes) -> bytes:
    """One document, with the status in it as it is."""
    head = msgspec.json.encode(document | {"at": at})
    return head[:-1] + b',"status":' + status + b"}"
