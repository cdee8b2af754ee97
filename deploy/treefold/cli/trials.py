"""The round trips of `treefold doctor`: through threads, and through processes."""

import os
import sys

from treefold.cli.probe import ANSWER, round_trip
from treefold.common.config import Settings
from treefold.common.errors import JobFailedError
from treefold.launch.commands import LaunchPlan
from treefold.launch.link import Status
from treefold.launch.processes import Line
from treefold.launch.shell import Launcher
from treefold.torch.embedded import connect_embedded

FORM_TIMEOUT_S = 60.0


def embedded() -> str:
    """A push comes back right from a cluster of threads."""
    return round_trip(connect_embedded(Settings()))


class Listener:
    """Collects what a launch says, for when it fails."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def started(self, address: str) -> None:
        """The scheduler's address is known."""
        self.lines.append(f"scheduler {address}")

    def line(self, line: Line) -> None:
        """A process printed something."""
        self.lines.append(f"{line.process} | {line.text}")

    def event(self, text: str) -> None:
        """Something happened to the cluster."""
        self.lines.append(text)

    def progress(self, status: Status, names: dict[int, str]) -> None:
        """Progress is of no interest here."""


def processes(command: list[str] | None = None) -> str:
    """A push comes back right from processes, started as `treefold run` does it.

    Parameters
    ----------
    command : list of str, optional
        What the worker runs; by default the probe.
    """
    probe = [sys.executable, "-P", "-m", "treefold.cli.probe"]
    settings = Settings(servers=2, form_timeout_s=FORM_TIMEOUT_S, connect_timeout_s=FORM_TIMEOUT_S)
    plan = LaunchPlan(settings, probe if command is None else command, "ipc", os.environ)
    listener = Listener()
    code = Launcher(plan, listener).run()
    answers = [line.partition("| ")[2] for line in listener.lines if ANSWER in line]
    if code != 0 or not answers:
        lines = "\n".join(listener.lines)
        raise JobFailedError(f"the trial ended with exit code {code}, and said:\n{lines}")
    return answers[0]
