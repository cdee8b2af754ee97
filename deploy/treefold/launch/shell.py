"""The launcher: processes and signals around `treefold.launch.core`. Decides nothing.

One thread. It waits for output, for a signal (a child's end among them) or for the next question to
the scheduler, whichever is first.
"""

import contextlib
import os
import selectors
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Protocol

from treefold.launch.commands import Attempt, LaunchPlan
from treefold.launch.core import SCHEDULER, LaunchCore, LaunchLimits, Stage
from treefold.launch.effects import (
    AddressKnown,
    AskStatus,
    BeginAttempt,
    Effect,
    EndProcess,
    Event,
    Finish,
    KillProcess,
    ProcessExited,
    Say,
    StartProcess,
    StatusSeen,
    StopAsked,
    Tick,
)
from treefold.launch.guard import session_of
from treefold.launch.link import Status, StatusLink, parse
from treefold.launch.processes import Child, Guard, Line, Stream
from treefold.transport.access import access_of
from treefold.wire.permissions import CURIOUS

STATUS_NS = 250_000_000  # between two looks at the progress
STATUS_LOST_NS = 2_000_000_000  # an answer that took longer is not waited for
TURN_MAX_S = 0.25
PAGE = "page "  # begins the scheduler's line with the link to the live page
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Reporter(Protocol):
    """To whom the launcher tells what happens."""

    def started(self, address: str) -> None:
        """The scheduler's address is known; comes before everything else."""

    def line(self, line: Line) -> None:
        """A process printed something."""

    def event(self, text: str) -> None:
        """Something happened to the cluster."""

    def progress(self, status: Status, names: dict[int, str]) -> None:
        """How it goes, a few times per second; ``names`` has this launch's name of each pid."""


class Launcher:
    """Runs one script on a cluster of this machine.

    Parameters
    ----------
    plan : LaunchPlan
        What is to be launched.
    reporter : Reporter
        Told what happens.
    """

    def __init__(self, plan: LaunchPlan, reporter: Reporter) -> None:
        self._plan = plan
        self._reporter = reporter
        sizes = plan.settings
        limits = LaunchLimits(
            sizes.servers,
            sizes.workers,
            sizes.max_restarts,
            is_safe=sizes.is_recoverable,
            is_journaled=bool(sizes.journal),
            is_saving=bool(sizes.checkpoint),
        )
        self._core = LaunchCore(limits)
        self._access = access_of(sizes, *CURIOUS)
        self._selector = selectors.DefaultSelector()
        self._guard = Guard()
        self._folder = tempfile.mkdtemp(prefix="treefold-")
        self._guard.add_folder(self._folder)
        self._attempts = 0
        self._attempt: Attempt | None = None
        self._children: dict[str, Child] = {}
        self._names: dict[int, str] = {}  # of processes that are or were members, by their pids
        self._link: StatusLink | None = None
        self._asked_ns = 0
        self._is_answered = True
        self._is_announced = False
        self._page = ""
        self._code: int | None = None

    def run(self) -> int:
        """Launch, and wait for the end.

        Returns
        -------
        int
            Exit code of the whole.

        Raises
        ------
        ConfigError
            The place for sockets cannot be used.
        """
        try:
            with self._signals():
                self._feed(Tick())
                while self._code is None:
                    self._turn()
            return self._code
        finally:
            self._clean_up()

    # ---- one turn --------------------------------------------------------------------------------

    def _turn(self) -> None:
        for key, _ in self._selector.select(self._timeout_s()):
            if isinstance(key.data, Stream):
                self._read(key.data)
            else:
                key.data()
        self._reap()
        self._look_at_status()
        deadline_ns = self._core.next_deadline_ns()
        if deadline_ns is not None and time.monotonic_ns() >= deadline_ns:
            self._feed(Tick())

    def _timeout_s(self) -> float:
        deadline_ns = self._core.next_deadline_ns()
        if deadline_ns is None:
            return TURN_MAX_S
        return min(TURN_MAX_S, max(0.0, (deadline_ns - time.monotonic_ns()) / 1e9))

    def _feed(self, event: Event) -> None:
        for effect in self._core.handle(time.monotonic_ns(), event):
            self._perform(effect)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case BeginAttempt():
                self._begin_attempt()
            case StartProcess(name):
                self._start(name)
            case EndProcess(name) if name in self._children:
                self._children[name].end()
            case KillProcess(name) if name in self._children:
                self._children[name].kill()
            case AskStatus():
                self._ask()
            case Say(text):
                self._reporter.event(text)
            case Finish(code):
                self._code = code

    # ---- processes -------------------------------------------------------------------------------

    def _begin_attempt(self) -> None:
        self._close_link()
        self._attempts += 1
        folder = Path(self._folder) / str(self._attempts)
        folder.mkdir()
        self._attempt = Attempt(self._plan, str(folder), is_again=self._attempts > 1)
        self._attempt.link = self._page
        self._is_announced = False

    def _start(self, name: str) -> None:
        attempt = self._attempt
        if attempt is None:
            return
        child = Child(name, attempt.command(name), attempt.environment(name), self._guard)
        self._children[name] = child
        for stream in child.streams:
            self._selector.register(stream.pipe, selectors.EVENT_READ, stream)
        if name == SCHEDULER and attempt.scheduler and not self._is_announced:
            self._announce(attempt.scheduler)

    def _announce(self, address: str) -> None:
        """The scheduler's address is known: tell everybody."""
        self._is_announced = True
        self._reporter.started(address)
        self._link = StatusLink(address, self._access)
        self._feed(AddressKnown())

    def _read(self, stream: Stream) -> None:
        for line in stream.read():
            self._take_line(line)
        if not stream.is_open:
            self._selector.unregister(stream.pipe)

    def _take_line(self, line: Line) -> None:
        """Pass a line on; the scheduler's first ones are its address and the link to its page."""
        attempt = self._attempt
        is_first = line.text.startswith(f"{SCHEDULER} ") and not line.is_error
        is_link = line.process == SCHEDULER and line.text.startswith(PAGE) and not line.is_error
        if is_link and attempt is not None:
            self._take_link(attempt, line.text.removeprefix(PAGE))
            return
        if attempt is None or line.process != SCHEDULER or not is_first:
            self._reporter.line(line)
        elif not self._is_announced:
            attempt.scheduler = line.text.partition(" ")[2]
            self._announce(attempt.scheduler)

    def _take_link(self, attempt: Attempt, link: str) -> None:
        """A scheduler that was started again usually has the page where it was."""
        if link != self._page:
            self._page = attempt.link = link
            self._reporter.event(f"live page {link}")

    def _reap(self) -> None:
        """Take note of the processes that have ended."""
        for name, child in list(self._children.items()):
            code = child.poll()
            if code is None:
                continue
            del self._children[name]
            for stream in child.streams:
                if stream.is_open:
                    self._selector.unregister(stream.pipe)
            for line in child.bury():
                self._take_line(line)
            self._feed(ProcessExited(name, code))

    # ---- status ----------------------------------------------------------------------------------

    def _ask(self) -> None:
        if self._link is not None:
            self._asked_ns = time.monotonic_ns()
            self._is_answered = False
            self._link.ask(self._asked_ns)

    def _look_at_status(self) -> None:
        answer = self._link.body() if self._link is not None else None
        if answer is not None:
            self._is_answered = True
            self._take_status(answer[0], parse(answer[1]))
        since_ns = time.monotonic_ns() - self._asked_ns
        if since_ns >= (STATUS_NS if self._is_answered else STATUS_LOST_NS):
            self._ask()

    def _take_status(self, asked_ns: int, status: Status) -> None:
        if self._core.stage is Stage.RUNNING:
            sessions = {child.session: name for name, child in self._children.items()}
            pids = [member.pid for member in status.members]
            names = {pid: sessions[session_of(pid)] for pid in pids if session_of(pid) in sessions}
            self._names |= names
            self._reporter.progress(status, names)
        ending = status.ending
        outcome, text = (ending.outcome, ending.text) if ending else ("", "")
        is_leased = status.plan is None or status.plan.kind == "slots"
        live = {m.pid for m in status.members if m.is_live}
        drained = {m.pid for m in status.members if m.is_draining}
        self._feed(
            StatusSeen(
                asked_ns,
                status.phase,
                is_leased,
                outcome,
                text,
                status.round,
                members=frozenset(self._names[pid] for pid in live & self._names.keys()),
                drained=frozenset(self._names[pid] for pid in drained & self._names.keys()),
            )
        )

    def _close_link(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    # ---- signals and the end ---------------------------------------------------------------------

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Signals wake the selector instead of interrupting what is going on."""
        waking, bell = os.pipe()
        os.set_blocking(waking, False)
        os.set_blocking(bell, False)
        numbers = (*STOPPING, signal.SIGCHLD)
        handlers = {number: signal.signal(number, _leave_to_bell) for number in numbers}
        before = signal.set_wakeup_fd(bell, warn_on_full_buffer=False)
        self._selector.register(waking, selectors.EVENT_READ, self._hear(waking))
        try:
            yield
        finally:
            self._selector.unregister(waking)
            signal.set_wakeup_fd(before)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.close(waking)
            os.close(bell)

    def _hear(self, waking: int) -> Callable[[], None]:
        def hear() -> None:
            for number in os.read(waking, 256):
                if number in STOPPING:
                    self._feed(StopAsked(number))

        return hear

    def _clean_up(self) -> None:
        self._close_link()
        for child in self._children.values():
            child.kill()
        self._guard.close()
        self._selector.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _leave_to_bell(number: int, frame: FrameType | None) -> None:
    """Do nothing: the number has been written to the wakeup descriptor already."""
    del number, frame
