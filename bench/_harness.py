"""Contenders side by side: processes that stay, windows taken in turn, medians and ratios.

All contenders of a run are started first. Then every one of them gets a window, in turns whose
order rotates, while the others sleep; what the machine does meanwhile meets them all. A ratio is
the median of the ratios within a turn.
"""

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
import torch.multiprocessing as multiprocessing
import zmq
from rich.console import Console
from rich.table import Table

from bench._link import Answer, BenchError, Link, Order, Seat, Stage
from treefold.common.config import KEYS
from treefold.launch.processes import Guard

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

ROOT = str(Path(__file__).parent.parent)
END_S = 30.0  # how long a contender may take to end by itself
TAIL_LINES = 30
WINDOWS_MIN = 5  # fewer say nothing about the spread
SETTLE_STEPS = 2  # before a window, so that a contender that has slept is awake
FORKED = multiprocessing.get_context("forkserver")


class Contender(ABC):
    """Some processes that do one work one way.

    Parameters
    ----------
    name : str
        As the table has it.
    members : int
        How many processes report to the conductor.
    """

    def __init__(self, name: str, members: int) -> None:
        self.name = name
        self.setup_s = 0.0
        self._members = members
        self._seats: list[Seat] = []

    @abstractmethod
    def launch(self, stage: Stage) -> None:
        """Start the processes."""

    @abstractmethod
    def check(self) -> None:
        """Raise `BenchError` if one of the processes has ended."""

    @abstractmethod
    def stop(self) -> None:
        """Wait for the processes, who have been told to end, and kill who does not."""

    @abstractmethod
    def freeze(self) -> None:
        """Make sure that it uses no processor until `thaw`."""

    @abstractmethod
    def thaw(self) -> None:
        """Let it run again."""

    def open(self, stage: Stage) -> None:
        """Start the processes, and wait until they are ready."""
        self.launch(stage)
        self._seats = stage.gather(self._members, self.check)

    def ask(self, order: Order) -> list[Answer]:
        """Give every player an order and wait for all answers, by rank."""
        players = [seat for seat in self._seats if seat.hello["role"] == "player"]
        for seat in players:
            seat.tell(order)
        try:
            return [seat.hear() for seat in players]
        except BenchError as error:
            self.check()
            raise BenchError(f"{self.name}: {error}") from error

    def window(self, steps: int, settle: int = SETTLE_STEPS) -> list[Answer]:
        """Let every player take so many steps."""
        return self.ask(Order(do="window", steps=steps, settle=settle, given=""))

    def question(self, what: str, given: str = "") -> list[object]:
        """What every player answers to a question of the benchmark's own."""
        self.thaw()
        answers = self.ask(Order(do=what, steps=0, settle=0, given=given))
        self.freeze()
        return [answer["value"] for answer in answers]

    def close(self) -> None:
        """Tell everybody to end, and wait."""
        for seat in self._seats:
            try:
                seat.tell(Order(do="end", steps=0, settle=0, given=""))
            except BenchError as error:
                sys.stderr.write(f"{self.name}: {error}\n")
            seat.close()
        self.stop()


@dataclass(frozen=True, slots=True)
class Part:
    """One process of a `Processes`: ``run(link, *given)``, a function of a module."""

    role: str
    rank: int
    run: Callable[..., None]
    given: tuple[object, ...]


def play(part: Part, link: Link) -> None:
    """Be a part, in a session of its own: signals of the terminal are the conductor's."""
    os.setsid()
    part.run(link, *part.given)


class Processes(Contender):
    """A contender whose processes run functions of this package.

    Parameters
    ----------
    name : str
        As the table has it.
    parts : sequence of Part
        Its processes.
    is_spinning : bool
        Whether they use the processor while they wait; then they are stopped between windows.
    """

    def __init__(self, name: str, parts: Sequence[Part], is_spinning: bool = False) -> None:
        super().__init__(name, len(parts))
        self._parts = parts
        self._is_spinning = is_spinning
        self._processes: list[BaseProcess] = []
        self._stage: Stage | None = None

    def launch(self, stage: Stage) -> None:
        """Start the processes."""
        for part in self._parts:
            link = Link(stage.path, part.role, part.rank)
            process = FORKED.Process(target=play, args=(part, link), daemon=True)
            process.start()
            self._processes.append(process)
            stage.watch(process.pid or 0)
        self._stage = stage

    def check(self) -> None:
        """Raise `BenchError` if one of the processes has ended."""
        ended = [process.exitcode for process in self._processes if process.exitcode is not None]
        if ended:
            raise BenchError(f"{self.name}: processes ended with {ended}")

    def freeze(self) -> None:
        """Stop the processes if they would spin."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them run again."""
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """Wait for the processes, and kill who does not end."""
        self.thaw()
        for process in self._processes:
            process.join(END_S if not self._is_spinning else 1.0)
            process.kill()
            process.join()
            if self._stage is not None:
                self._stage.forget(process.pid or 0)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes if self._is_spinning else []:
            if process.pid is not None and process.exitcode is None:
                os.kill(process.pid, number)


class Cluster(Contender):
    """A contender that ``treefold run`` starts, on the path of a user.

    Parameters
    ----------
    name : str
        As the table has it.
    module : str
        What each worker runs; it gets the path of the conductor's socket and ``given``.
    given : str
        Its second argument.
    workers : int
        How many of them.
    flags : mapping of str to object
        Flags of ``treefold run``.
    """

    def __init__(
        self, name: str, module: str, given: str, workers: int, flags: Mapping[str, object]
    ) -> None:
        super().__init__(name, workers)
        self._worker = [sys.executable, "-m", module]
        self._given = given
        fixed: dict[str, object] = {"workers": workers, "log-level": "warning"}
        self._flags = fixed | {"config": os.devnull} | dict(flags)
        self._process: subprocess.Popen[bytes] | None = None
        self._output = Path()

    def launch(self, stage: Stage) -> None:
        """Start the cluster."""
        command = [sys.executable, "-m", "treefold.cli", "run"]
        command += [f"--{key}={value}" for key, value in self._flags.items()]
        command += ["--", *self._worker, stage.path, self._given]
        self._output = Path(stage.folder, self.name.replace(" ", "-"))
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def check(self) -> None:
        """Raise `BenchError` if the cluster has ended."""
        assert self._process is not None
        if self._process.poll() is not None:
            raise BenchError(f"{self.name} ended with {self._process.returncode}:\n{self._tail()}")

    def freeze(self) -> None:
        """Nothing: its processes wait without work, and a stopped one would be given up."""

    def thaw(self) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Wait for the cluster to end."""
        if self._process is None:
            return
        try:
            status = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait(END_S)
            sys.stderr.write(f"{self.name} did not end by itself:\n{self._tail()}\n")
            return
        if status:
            sys.stderr.write(f"{self.name} ended with {status}:\n{self._tail()}\n")

    def _tail(self) -> str:
        lines = self._output.read_text(errors="replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:])


def lane_flags(lane: str) -> dict[str, object]:
    """The flag that chooses a lane, if this treefold has several."""
    return {"lane": lane} if "lane" in KEYS else {}


# ---- running -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Window:
    """One window of one contender.

    Attributes
    ----------
    seconds : float
        From the first player's beginning to the last one's end.
    answers : list of Answer
        By rank.
    elsewhere : float
        Processors that other programs used meanwhile.
    """

    seconds: float
    answers: list[Answer]
    elsewhere: float


@contextmanager
def staged() -> Iterator[Stage]:
    """A context with a place for contenders; nothing of it is left, however this process ends."""
    FORKED.set_forkserver_preload(["torch", "zmq", "bench._harness"])
    guard = Guard()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        stage = Stage(folder, guard)
        try:
            yield stage
        finally:
            stage.close()
    guard.close()


@contextmanager
def opened(contenders: Sequence[Contender], stage: Stage) -> Iterator[None]:
    """A context in which all contenders run and wait; they have ended after it."""
    begun: list[Contender] = []
    try:
        for contender in contenders:
            begun.append(contender)
            contender.open(stage)
            contender.window(1, settle=1)
            contender.freeze()
        yield
    finally:
        for contender in begun:
            contender.thaw()
            contender.close()


def take_turns(
    contenders: Sequence[Contender], windows: int, steps: int
) -> dict[str, list[Window]]:
    """Give every contender its windows, one after the other.

    Parameters
    ----------
    contenders : sequence of Contender
        Opened.
    windows, steps : int
        Windows of each contender, and steps of a window.
    """
    found: dict[str, list[Window]] = {contender.name: [] for contender in contenders}
    for turn in range(windows):
        first = turn % len(contenders)
        for contender in [*contenders[first:], *contenders[:first]]:
            contender.thaw()
            found[contender.name].append(_window(contender, steps))
            contender.freeze()
    return found


def _window(contender: Contender, steps: int) -> Window:
    watch = Elsewhere()
    answers = contender.window(steps)
    elsewhere = watch.processors()
    began_ns = min(answer["began_ns"] for answer in answers)
    ended_ns = max(answer["ended_ns"] for answer in answers)
    return Window((ended_ns - began_ns) / 1e9, answers, elsewhere)


class Elsewhere:
    """How much of the machine programs other than this one and its children use."""

    def __init__(self) -> None:
        self._all_s, self._busy_s = self._machine()
        self._own_s = self._own()

    def processors(self) -> float:
        """Processors used since this object was made."""
        all_s, busy_s = self._machine()
        passed_s = (all_s - self._all_s) / (psutil.cpu_count() or 1)
        used_s = busy_s - self._busy_s - (self._own() - self._own_s)
        return max(0.0, used_s / passed_s) if passed_s > 0 else 0.0

    def _machine(self) -> tuple[float, float]:
        times = psutil.cpu_times()
        return sum(times), sum(times) - times.idle - getattr(times, "iowait", 0.0)

    def _own(self) -> float:
        used_s = 0.0
        here = psutil.Process()
        for process in [here, *here.children(recursive=True)]:
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            used_s += times.user + times.system
        return used_s


def start(main: Callable[[], None]) -> None:
    """Run a benchmark; what goes wrong with a contender ends it with a line that says so."""
    try:
        main()
    except BenchError as error:
        sys.exit(f"the benchmark failed: {error}")


# ---- reporting -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure of several windows: median, least and most."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of some values."""
        return cls(statistics.median(values), min(values), max(values))

    def document(self, digits: int = 2) -> dict[str, float]:
        """For JSON."""
        shown = {"median": self.median, "min": self.least, "max": self.most}
        return {name: round(value, digits) for name, value in shown.items()}


def rates(windows: Sequence[Window], per_window: float) -> list[float]:
    """Something per second, window by window."""
    return [per_window / window.seconds for window in windows]


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios within a turn."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def machine(found: Mapping[str, Sequence[Window]] | None = None) -> dict[str, object]:
    """On what this was measured, and what else ran there, for JSON."""
    document: dict[str, object] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processors": psutil.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "zmq": zmq.zmq_version(),
    }
    if found:
        seen = [window.elsewhere for windows in found.values() for window in windows]
        document["processors_used_elsewhere"] = Spread.of(seen).document()
    return document


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """One table; the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 140
    Console(width=width).print(table)


def print_document(document: Mapping[str, object]) -> None:
    """The last line."""
    print(json.dumps(document), flush=True)
