"""Clusters of real processes for tests: start roles, wait for what they say, leave nothing behind.

Waits are for events (a line of output, an end) and fail loudly with everybody's output when the
event does not come. Nothing here sleeps.
"""

import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import psutil

from tests.support.netns import Network
from treefold.common import ledger
from treefold.common.config import environment_of

ROOT = Path(__file__).parents[2]
SOURCES = os.pathsep.join(str(ROOT / room) for room in (".", "common", "ps", "worker", "deploy"))
JOBS = ROOT / "tests" / "integration" / "jobs"
PATIENCE_S = 90.0  # for one event; far more than it takes on a busy machine
TAIL_LINES = 40
MESSAGE_BYTES_MAX = 4096
FINAL = r"^final (\S+)$"
QUICK: dict[str, object] = {"heartbeat_ms": 100, "dead_after_ms": 1_000, "retry_ms": 300}
"""Settings that make trouble noticed sooner than by default."""


class Process:
    """One process: its output line by line as it came, and how it ended.

    Attributes
    ----------
    name : str
        For messages.
    pid : int
        0 until it runs.
    lines : list of str
        Standard output and standard error, in the order in which they were read.
    status : int or None
        Exit status; negative for a signal; None while it runs.
    """

    def __init__(self, name: str, news: threading.Condition) -> None:
        self.name = name
        self.pid = 0
        self.lines: list[str] = []
        self.status: int | None = None
        self.open_streams = 2
        self.popen: subprocess.Popen[bytes] | None = None
        self._news = news

    @property
    def is_over(self) -> bool:
        """Whether it has ended and all of its output is here."""
        return self.status is not None and self.open_streams == 0

    def line(self, pattern: str, after: int = 0) -> re.Match[str]:
        """Wait for a line of output.

        Parameters
        ----------
        pattern : str
            Regular expression, searched for in every line.
        after : int
            Lines to skip, such as those that were there at some earlier moment.
        """
        self._wait(lambda: self.found(pattern, after) is not None or self.is_over, pattern)
        found = self.found(pattern, after)
        assert found is not None, f"{self.name} ended without {pattern!r}\n{self.transcript()}"
        return found

    def found(self, pattern: str, after: int = 0) -> re.Match[str] | None:
        """The first line that matches, None if there is none so far."""
        matches = (re.search(pattern, line) for line in self.lines[after:])
        return next((match for match in matches if match is not None), None)

    def all(self, pattern: str) -> list[tuple[str, ...]]:
        """The groups of every line that matches so far."""
        matches = (re.search(pattern, line) for line in list(self.lines))
        return [match.groups() for match in matches if match is not None]

    def end(self) -> int:
        """Wait for the process to end by itself; returns its exit status."""
        self._wait(lambda: self.is_over, "the end")
        assert self.status is not None
        return self.status

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if the process is gone."""
        if self.status is None and self.pid:
            os.kill(self.pid, number)

    def transcript(self) -> str:
        """The end of its output, for messages."""
        tail = self.lines[-TAIL_LINES:]
        return "\n".join([f"--- {self.name} (status {self.status})", *tail])

    def _wait(self, happened: Callable[[], bool], what: str) -> None:
        with self._news:
            came = self._news.wait_for(happened, PATIENCE_S)
        assert came, f"{self.name}: no {what!r} within {PATIENCE_S} s\n{self.transcript()}"


class Bits(NamedTuple):
    """What a job ended with: a hash of parameters and buffers, a digest of the servers' state."""

    final: str
    state: str


class Starter:
    """Starts processes, forked from a zygote or as new interpreters, and reads what they say."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._processes: list[Process] = []
        self._link, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._zygote = subprocess.Popen(
            [sys.executable, "-u", "-m", "tests.support.zygote", str(far.fileno())],
            pass_fds=[far.fileno()],
            cwd=ROOT,
            env=environment({}),
            start_new_session=True,
        )
        far.close()
        self._waits = selectors.DefaultSelector()
        self._waits.register(self._link, selectors.EVENT_READ, self._hear)
        self._wake, self._bell = socket.socketpair()
        self._waits.register(self._wake, selectors.EVENT_READ, self._take_up)
        self._fresh: list[tuple[int, Process]] = []
        self._thread = threading.Thread(target=self._run, name="outputs", daemon=True)
        self._is_closing = False
        self._thread.start()

    def start(
        self,
        name: str,
        command: list[str],
        values: Mapping[str, str],
        *,
        is_forked: bool = True,
        place: str = "",
    ) -> Process:
        """Start a process.

        Parameters
        ----------
        name : str
            For messages.
        command : list of str
            As `tests.support.zygote.run` takes it.
        values : mapping of str to str
            Its environment, beside what every process needs.
        is_forked : bool
            Whether to fork it from the zygote; otherwise a new interpreter is started.
        place : str
            The host of a network that it lives on; only for one that is forked.
        """
        assert is_forked or not place
        process = Process(name, self._news)
        streams = [os.pipe() for _ in range(2)]
        self._fresh += [(reader, process) for reader, _ in streams]
        writers = [writer for _, writer in streams]
        with self._news:
            self._processes.append(process)
            number = len(self._processes) - 1
        self._bell.send(b"\0")
        whole = environment(values)
        if is_forked:
            request = {"number": number, "command": command, "environment": whole, "place": place}
            socket.send_fds(self._link, [json.dumps(request).encode()], writers)
        else:
            process.popen = subprocess.Popen(
                [sys.executable, *_plain(command)],
                stdin=subprocess.DEVNULL,
                stdout=writers[0],
                stderr=writers[1],
                cwd=ROOT,
                env=whole,
            )
            process.pid = process.popen.pid
        for writer in writers:
            os.close(writer)
        with self._news:
            self._news.wait_for(lambda: process.pid, PATIENCE_S)
        return process

    def wait(self, happened: Callable[[], bool]) -> bool:
        """Wait until processes have said or done something; False if that takes too long."""
        with self._news:
            return self._news.wait_for(happened, PATIENCE_S)

    def left(self) -> list[int]:
        """Processes that were forked, at any depth, and have not ended."""
        return [pid for pid in psutil.pids() if pid != self._zygote.pid and self._is_ours(pid)]

    def _is_ours(self, pid: int) -> bool:
        try:
            return os.getsid(pid) == self._zygote.pid
        except ProcessLookupError:
            return False

    def close(self) -> None:
        """End the zygote and with it whatever was forked from it."""
        self._is_closing = True
        self._bell.send(b"\0")
        self._thread.join()
        for known in (self._link, self._bell, self._wake):
            known.close()
        self._waits.close()
        self._zygote.wait()

    # ---- the thread that reads ----------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_closing:
            for key, _ in self._waits.select():
                key.data()

    def _take_up(self) -> None:
        self._wake.recv(4096)
        while self._fresh:
            reader, process = self._fresh.pop()
            stream = _Stream(reader, process)
            self._waits.register(reader, selectors.EVENT_READ, lambda s=stream: self._read(s))

    def _hear(self) -> None:
        body = self._link.recv(MESSAGE_BYTES_MAX)
        if not body:
            self._waits.unregister(self._link)
            return
        message = json.loads(body)
        process = self._processes[message["number"]]
        with self._news:
            process.pid = message.get("started", process.pid)
            process.status = message.get("ended", process.status)
            self._news.notify_all()

    def _read(self, stream: "_Stream") -> None:
        data = os.read(stream.descriptor, 1 << 16)
        with self._news:
            stream.take(data)
            if not data:
                self._waits.unregister(stream.descriptor)
                os.close(stream.descriptor)
                stream.process.open_streams -= 1
                if stream.process.popen is not None and not stream.process.open_streams:
                    stream.process.status = stream.process.popen.wait()
            self._news.notify_all()


@dataclass
class _Stream:
    """One pipe of a process, and what of its last line is here."""

    descriptor: int
    process: Process
    rest: bytes = b""

    def take(self, data: bytes) -> None:
        *whole, self.rest = (self.rest + data).split(b"\n")
        if not data and self.rest:
            whole.append(self.rest)
        self.process.lines += [line.decode(errors="replace") for line in whole]


@dataclass
class Cluster:
    """One scheduler, some servers and workers, each in a process of its own.

    Use as a context: at its end every process that still runs is killed.

    Attributes
    ----------
    settings : dict
        Settings of every process, such as ``servers`` and ``slots``. ``NAME`` in ``bind`` stands
        for a name of each process's own.
    faults : mapping of str to list of str
        Faults of `tests.support.faults` to plant, by role: in every ``server`` and ``scheduler``
        that the cluster begins with, and in ``all`` processes, whenever they are started.
    is_forked : bool
        Whether to fork the processes from the zygote; otherwise they are new interpreters.
    network : Network, optional
        Hosts for the processes to live on, each on its own in the order in which they start. The
        address of its host is what a role binds, so settings must allow it.
    """

    starter: Starter
    settings: dict[str, object]
    faults: Mapping[str, list[str]] = field(default_factory=dict)
    is_forked: bool = True
    processes: list[Process] = field(default_factory=list)
    workers: list[Process] = field(default_factory=list)
    address: str = ""
    network: Network | None = None

    def __enter__(self) -> "Cluster":
        self.settings = QUICK | self.settings
        self.scheduler = self._role("scheduler", self.faults.get("scheduler", []))
        self.address = self.scheduler.line(r"^(?:\S+ )*((?:tcp|ipc)://\S+)$")[1]
        servers = int(str(self.settings.get("servers", 1)))
        self.servers = [self._role("server", self.faults.get("server", [])) for _ in range(servers)]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        running = [process for process in self.processes if process.status is None]
        for process in running:
            process.signal(signal.SIGKILL)
        for process in running:
            process.end()
        if error is not None:
            error.add_note(self.transcript())

    def worker(self, script: str, *arguments: str, faults: tuple[str, ...] = ()) -> Process:
        """Start a worker that runs a script of ``tests/integration/jobs``."""
        command = [*self._planted(*faults), str(JOBS / script), *arguments]
        name = f"worker {len(self.workers)}"
        values = environment_of(self.settings | {"scheduler": self.address})
        process = self._start(name, command, values)
        self.workers.append(process)
        return process

    def server(self, *faults: str, bind: str = "") -> Process:
        """Start one more server, at an address that was another one's if it is given."""
        return self._role("server", list(faults), bind)

    def restart_scheduler(self, *, is_awaited: bool = True) -> None:
        """Start another scheduler, at the same address and with the same journal."""
        self.scheduler = self._role("scheduler", [], bind=self.address)
        if is_awaited:
            self.scheduler.line(r"^(?:\S+ )*((?:tcp|ipc)://\S+)$")

    def until(self, happened: Callable[[], bool], what: str) -> None:
        """Wait until something is so; looked at whenever anybody says something or ends."""
        self.scheduler._wait(happened, what)

    def end(self, *excused: Process) -> None:
        """Wait until every process has ended by itself with status 0, but for those excused."""
        for process in self.processes:
            status = process.end()
            assert process in excused or status == 0, process.transcript()

    def bits(self, *excused: Process) -> Bits:
        """Wait for everybody's end, see that all workers have one model, and say which bits."""
        self.end(*excused)
        finals = {worker.line(FINAL)[1] for worker in self.workers if worker not in excused}
        assert len(finals) == 1, self.transcript()
        return Bits(finals.pop(), ledger.state_digest(str(self.settings["ledger"])))

    def transcript(self) -> str:
        """Everybody's last words."""
        return "\n".join(process.transcript() for process in self.processes)

    def _planted(self, *faults: str) -> list[str]:
        """The words that plant faults."""
        return [f"fault:{fault}" for fault in (*self.faults.get("all", []), *faults)]

    def _role(self, role: str, faults: list[str], bind: str = "") -> Process:
        net, host = self.network, len(self.processes)
        own = "127.0.0.1" if net is None else net.address(host)
        values = {"bind": f"tcp://{own}:0"} | self.settings
        values |= {"bind": bind} if bind else {}
        if role != "scheduler":
            values["scheduler"] = self.address
        command = [*self._planted(*faults), "-m", "treefold.cli", role]
        count = sum(process.name.startswith(role) for process in self.processes)
        values["bind"] = str(values["bind"]).replace("NAME", f"{role}-{count}")
        return self._start(f"{role} {count}", command, environment_of(values))

    def _start(self, name: str, command: list[str], values: Mapping[str, str]) -> Process:
        host, net = len(self.processes), self.network
        place = "" if net is None else net.place(host)
        process = self.starter.start(name, command, values, is_forked=self.is_forked, place=place)
        self.processes.append(process)
        return process


def bits_alone(starter: Starter, folder: Path, script: str, *arguments: str) -> Bits:
    """Run a job in one process, with an embedded cluster, and say which bits it ends with.

    Parameters
    ----------
    starter : Starter
        Starts it.
    folder : Path
        For its ledger.
    script : str
        In ``tests/integration/jobs``; then its arguments, before them settings as ``KEY=VALUE`` and
        faults as ``fault:NAME``.
    """
    faults = [argument for argument in arguments if argument.startswith("fault:")]
    pairs = [one.partition("=") for one in arguments if not one.startswith(("-", "fault:"))]
    values: dict[str, object] = {"ledger": str(folder)}
    values.update({key: value for key, _, value in pairs})
    rest = [argument for argument in arguments if argument.startswith("-")]
    command = [*faults, str(JOBS / script), *rest]
    process = starter.start("alone", command, environment_of(values))
    assert process.end() == 0, process.transcript()
    return Bits(process.line(FINAL)[1], ledger.state_digest(str(folder)))


class Gate:
    """A place where processes wait until a test lets them through: a FIFO without a writer.

    Parameters
    ----------
    path : Path
        Where to make it; what a script opens for reading.
    """

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self._descriptor: int | None = None

    def __enter__(self) -> "Gate":
        return self

    def __exit__(self, *_: object) -> None:
        self.open()
        if self._descriptor is not None:
            os.close(self._descriptor)

    def open(self) -> None:
        """Let everybody through who waits, and who comes later."""
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDWR)


def environment(values: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process: nothing of the person's own settings, and one thread.

    It runs what is in this checkout, wherever the installed package points.
    """
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "TMPDIR") if key in os.environ}
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TREEFOLD_CONFIG": os.devnull}
    return kept | fixed | {"PYTHONPATH": SOURCES} | dict(values)


def _plain(command: list[str]) -> list[str]:
    """A command for a new interpreter; planted faults need the zygote's way of running it."""
    if command[0].startswith("fault:"):
        return ["-m", "tests.support.zygote", "--run", *command]
    return command
