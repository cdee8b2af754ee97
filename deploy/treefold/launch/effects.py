"""What the launcher's core is told and what it wants done."""

import signal
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AddressKnown:
    """Members may be started: the scheduler's address is known."""


@dataclass(frozen=True, slots=True)
class ProcessExited:
    """A process has ended; ``code`` is its exit code, or minus the number of the signal."""

    name: str
    code: int


@dataclass(frozen=True, slots=True)
class StatusSeen:
    """The scheduler answered a request that was sent at ``asked_ns``.

    ``is_leased`` is false if each worker is one slot, with its own loader, and cannot be replaced.
    ``outcome`` and ``text`` say how the job ended; both are empty while it has not. ``members`` are
    the processes of this launch in which live members run, ``drained`` those of members that were
    told to leave.
    """

    asked_ns: int
    phase: str
    is_leased: bool = True
    outcome: str = ""
    text: str = ""
    round: int = 0
    members: frozenset[str] = frozenset()
    drained: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class StopAsked:
    """A signal asked the launcher to end."""

    number: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; the first one begins the launch."""


@dataclass(frozen=True, slots=True)
class BeginAttempt:
    """Make a fresh place for sockets; what follows starts the job from its beginning."""


@dataclass(frozen=True, slots=True)
class StartProcess:
    """Start a process."""

    name: str


@dataclass(frozen=True, slots=True)
class EndProcess:
    """Ask a process to end (SIGTERM)."""

    name: str


@dataclass(frozen=True, slots=True)
class KillProcess:
    """Kill a process and all that it started (SIGKILL)."""

    name: str


@dataclass(frozen=True, slots=True)
class AskStatus:
    """Ask the scheduler what is going on, now."""


@dataclass(frozen=True, slots=True)
class Say:
    """Tell the operator."""

    text: str


@dataclass(frozen=True, slots=True)
class Finish:
    """Every process is gone: end with this exit code."""

    code: int


Event = AddressKnown | ProcessExited | StatusSeen | StopAsked | Tick
Effect = BeginAttempt | StartProcess | EndProcess | KillProcess | AskStatus | Say | Finish


def describe_exit(code: int) -> str:
    """How a process ended, in words.

    Parameters
    ----------
    code : int
        Its exit code, or minus the number of the signal that ended it.
    """
    return f"was killed by {signal_name(-code)}" if code < 0 else f"exited with code {code}"


def signal_name(number: int) -> str:
    """Name of a signal, such as ``SIGKILL``."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
