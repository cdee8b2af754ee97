"""What `treefold run` shows: the address, everybody's output, events, and how far training is.

On a terminal the progress is a live table below the output; elsewhere it is a line now and then.
"""

import os
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol, Self, TextIO

from treefold.launch.link import MemberStatus, Status
from treefold.launch.processes import Line

RATE_NS = 3_000_000_000  # samples/s is a mean over so long
PLAIN_NS = 2_000_000_000  # at most one line of progress in so long, and only if there was some
OURS = "treefold"


@dataclass(slots=True)
class Speed:
    """Samples per second of one worker, from what it reports."""

    _seen: deque[tuple[int, int]] = field(default_factory=deque)

    def see(self, now_ns: int, samples: int) -> float:
        """Take in a report; returns the mean of the last seconds, samples/s."""
        if self._seen and samples < self._seen[-1][1]:
            return 0.0  # of a scheduler that began anew, and has not heard of it yet
        self._seen.append((now_ns, samples))
        while len(self._seen) > 2 and now_ns - self._seen[1][0] > RATE_NS:
            self._seen.popleft()
        then_ns, then = self._seen[0]
        return (samples - then) * 1e9 / (now_ns - then_ns) if now_ns > then_ns else 0.0


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """One worker as it is shown."""

    name: str
    round: int
    speed: float
    loss: float | None
    slots: list[int]
    waiting: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far training is."""

    headline: str
    round: int
    end_round: int
    epoch: int
    speed: float
    loss: float | None
    rows: list[WorkerRow]

    @property
    def summary(self) -> str:
        """The total in one line."""
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        if not self.end_round:  # own loaders, whose samples and length nobody counts
            return f"round {self.round}{loss}"
        where = f"epoch {self.epoch}, round {self.round} of {self.end_round}"
        return f"{where}, {self.speed:,.0f} samples/s{loss}"


class Meter:
    """Turns one status after the other into progress."""

    def __init__(self) -> None:
        self._speeds: dict[int, Speed] = {}

    def read(self, now_ns: int, status: Status, names: dict[int, str]) -> Progress:
        """What a status says of the progress.

        Parameters
        ----------
        now_ns : int
            When it came.
        status : Status
            The scheduler's.
        names : dict of int to str
            Names to show, by process id.

        Returns
        -------
        Progress
        """
        workers = status.live("worker")
        rows = [self._row(now_ns, worker, names) for worker in workers]
        rows.sort(key=lambda row: (len(row.name), row.name))
        weighed = [(row.loss, len(row.slots)) for row in rows if row.loss is not None]
        slots = sum(weight for _, weight in weighed)
        loss = sum(loss * weight for loss, weight in weighed) / slots if slots else None
        plan = status.plan
        return Progress(
            headline=headline(status),
            round=status.round,
            end_round=plan.end_round if plan and plan.kind == "slots" else 0,
            epoch=plan.epoch if plan else 0,
            speed=sum(row.speed for row in rows),
            loss=loss,
            rows=rows,
        )

    def _row(self, now_ns: int, worker: MemberStatus, names: dict[int, str]) -> WorkerRow:
        speed = self._speeds.setdefault(worker.incarnation, Speed()).see(now_ns, worker.samples)
        name = names.get(worker.pid, worker.name)
        return WorkerRow(name, worker.round, speed, worker.loss, worker.slots, worker.waiting)


def headline(status: Status) -> str:
    """Who is there."""
    expected = status.expected
    servers, workers = len(status.live("server")), len(status.live("worker"))
    if status.phase == "forming":
        there = f"{servers} of {expected.servers} servers, {workers} of {expected.workers} workers"
        return f"forming: {there}"
    return f"{servers} servers, {workers} workers"


class View(Protocol):
    """Where the display is shown."""

    def write(self, text: str, *, is_error: bool) -> None:
        """One line of text."""

    def show(self, progress: Progress) -> None:
        """The newest progress."""

    def close(self) -> None:
        """Take away what moves."""


class PlainView:
    """Lines, for files and pipes.

    Parameters
    ----------
    out, error : file
        Where output and errors go.
    """

    def __init__(self, out: TextIO, error: TextIO) -> None:
        self._out = out
        self._error = error
        self._shown = ""
        self._shown_ns = 0

    def write(self, text: str, *, is_error: bool) -> None:
        """One line of text."""
        stream = self._error if is_error else self._out
        stream.write(text + "\n")
        stream.flush()

    def show(self, progress: Progress) -> None:
        """The newest progress: not too often, and only if it is another one."""
        is_training = progress.round > 0
        text = progress.summary if is_training else progress.headline
        key = str(progress.round) if is_training else progress.headline
        now_ns = time.monotonic_ns()
        if key != self._shown and now_ns - self._shown_ns >= PLAIN_NS:
            self._shown, self._shown_ns = key, now_ns
            self.write(f"{OURS} | {text}", is_error=False)

    def close(self) -> None:
        """Nothing moves here."""


class Display:
    """The launcher's reporter.

    Parameters
    ----------
    view : View
        Where it is shown.
    """

    def __init__(self, view: View) -> None:
        self._view = view
        self._meter = Meter()
        self._is_cut_off = False
        self._begun_ns = time.monotonic_ns()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._view.close()

    def started(self, address: str) -> None:
        """Print the scheduler's address."""
        self._write(f"scheduler {address}")

    def line(self, line: Line) -> None:
        """Pass on what a process printed."""
        self._write(f"{line.process} | {line.text}", is_error=line.is_error)

    def event(self, text: str) -> None:
        """Print what happened to the cluster."""
        self._write(f"{OURS} | {text}")

    def progress(self, status: Status, names: dict[int, str]) -> None:
        """Show how far training is."""
        if not self._is_cut_off:
            self._view.show(self._meter.read(time.monotonic_ns(), status, names))

    def ended(self, code: int) -> None:
        """Print how it all ended."""
        self._view.close()
        seconds = (time.monotonic_ns() - self._begun_ns) / 1e9
        how = "done" if code == 0 else f"ended with exit code {code}"
        self._write(f"{OURS} | {how} after {seconds:.1f} s")

    def _write(self, text: str, *, is_error: bool = False) -> None:
        """Print a line; if nobody reads any more, ask the launcher to end."""
        if self._is_cut_off:
            return
        try:
            self._view.write(text, is_error=is_error)
        except BrokenPipeError:
            self._is_cut_off = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            signal.raise_signal(signal.SIGHUP)


def display_on(out: TextIO, error: TextIO) -> Display:
    """A display that suits where output goes: live on a terminal, lines elsewhere.

    Parameters
    ----------
    out, error : file
        Where output and errors go.
    """
    if not out.isatty():
        return Display(PlainView(out, error))
    from treefold.cli.live import LiveView  # noqa: PLC0415 # rich is for terminals only

    return Display(LiveView(out, error))
