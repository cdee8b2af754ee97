"""``treefold top`` on a real terminal and in a pipe, while a job trains and until it has ended."""

import fcntl
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.test_cli import MARK, QUICK, Shell, shell
from tests.integration.test_events import GATED
from tests.integration.test_survival import begin_round
from tests.support.processes import Gate, environment

__all__ = ["shell"]

ALTERNATE, MAIN = "\x1b[?1049h", "\x1b[?1049l"  # the screens of a terminal
LINES, COLUMNS = 24, 100
PATIENCE_S = 60.0  # for a text to be drawn; it takes two seconds


class Terminal:
    """A command on a terminal of its own.

    Parameters
    ----------
    shell : Shell
        Whose cluster it asks.
    words : list of str
        The command line.
    """

    def __init__(self, shell: Shell, *words: str) -> None:
        self._end, inner = os.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        values = {"TMPDIR": str(shell.folder), MARK: shell.mark, "TERM": "xterm"}
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "treefold.cli", *words],
            env=environment(values),
            stdin=inner,
            stdout=inner,
            stderr=inner,
        )
        os.close(inner)
        self.text = ""

    def shows(self, pattern: str) -> None:
        """Wait until the terminal was told to show something."""
        until = time.monotonic() + PATIENCE_S
        while re.search(pattern, self.text, re.DOTALL) is None:
            left = until - time.monotonic()
            if not select.select([self._end], [], [], max(0.0, left))[0]:
                raise AssertionError(f"no {pattern!r} in {self.text[-4000:]}")
            self._read()

    def end(self) -> int:
        """Read on until it has ended; its exit code."""
        while self._read():
            pass
        return self.popen.wait(PATIENCE_S)

    def _read(self) -> bool:
        try:
            data = os.read(self._end, 1 << 16)
        except OSError:  # how a terminal says that nobody has its other end any more
            return False
        self.text += data.decode(errors="replace")
        return bool(data)


@pytest.fixture
def gate(shell: Shell) -> Iterator[Gate]:
    """Where the job waits before its end."""
    with Gate(Path(shell.folder) / "gate") as made:
        yield made


def test_a_terminal_shows_what_goes_on_until_the_job_has_ended(shell: Shell, gate: Gate) -> None:
    script = shell.script(GATED.replace("0.02", "0.05"))
    run = shell.start("run", "--servers", "1", *QUICK, script, str(gate.path))
    begin_round(run, 1)
    terminal = Terminal(shell, "top")
    terminal.shows(r"running, view \d+, round \d+ of 40")
    terminal.shows(r"worker-0 .*█")
    terminal.shows("slots 0-7 given to worker-0")
    gate.open()
    assert terminal.end() == 0
    assert run.end() == 0
    assert "done: the job is done" in terminal.text.split(MAIN)[1], "this stays there"


def test_top_ends_with_ctrl_c_and_prints_tables_or_json_where_there_is_no_terminal(
    shell: Shell,
) -> None:
    scheduler = shell.role("scheduler", "--bind", "tcp://127.0.0.1:0")
    scheduler.line("^scheduler")
    terminal = Terminal(shell, "top")
    terminal.shows("forming, view 0.*waits for 1 servers and 1 workers")
    terminal.popen.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    assert terminal.text.count(ALTERNATE) == terminal.text.count(MAIN) == 1
    piped = shell.run("top")
    assert (piped.returncode, piped.stderr) == (0, "")
    assert "the scheduler began, and waits for 1 servers and 1 workers" in piped.stdout
    [line] = shell.run("top", "--json", "--once").stdout.splitlines()
    assert json.loads(line)["phase"] == "forming"
