"""``treefold status``: who is there, what is where, the round, and what anything waits for."""

import socket
import sys

import msgspec
from rich.console import Console

from treefold.cli.flags import Parser
from treefold.cli.scheduler import DEFAULT_ADDRESS
from treefold.cli.tables import print_status
from treefold.common.errors import ConfigError
from treefold.launch.link import Status, fetch, parse
from treefold.launch.runtime import running
from treefold.transport.access import access_of
from treefold.wire.permissions import CURIOUS

DESCRIPTION = (
    "Ask a scheduler what is going on. Without --scheduler: the one that runs on this machine."
)
ANSWER_MS = 4_000
PIPED_WIDTH = 160  # where there is no terminal to say how wide it is


def main(words: list[str]) -> int:
    """Print the status of a cluster.

    Parameters
    ----------
    words : list of str
        The command line after ``treefold status``.

    Returns
    -------
    int
        0 if the scheduler answered; with ``--here`` 1 if it knows of no live member on this host.
    """
    parser = Parser("status", DESCRIPTION, ["scheduler", "keys"])
    parser.add_argument("--json", action="store_true", help="print the whole document as JSON")
    parser.add_argument(
        "--here", action="store_true", help="say only whether a member on this host is live"
    )
    options, loaded = parser.read(words)
    access = access_of(loaded.settings, *CURIOUS)
    body = fetch(loaded.settings.scheduler or found_address(), ANSWER_MS, access)
    if options.here:
        return say_who_is_here(parse(body), socket.gethostname())
    if options.json:
        sys.stdout.write(msgspec.json.format(body, indent=2).decode() + "\n")
    else:
        width = None if sys.stdout.isatty() else PIPED_WIDTH
        print_status(parse(body), Console(highlight=False, width=width))
    return 0


def say_who_is_here(status: Status, host: str) -> int:
    """Name the live members of a host; the exit code is 1 if there are none."""
    names = [member.name for member in status.members if member.is_live and member.host == host]
    words = f"{', '.join(names)} of view {status.view}" if names else "no live member"
    sys.stdout.write(f"{host}: {words}\n")
    return 0 if names else 1


def found_address() -> str:
    """Address of the one scheduler of this user on this machine, or the usual one.

    Raises
    ------
    ConfigError
        There are several.
    """
    notes = running()
    if len(notes) > 1:
        lines = "".join(f"\n  {note.address} (process {note.pid})" for note in notes)
        msg = f"{len(notes)} schedulers run here; say which one with --scheduler:{lines}"
        raise ConfigError(msg)
    return notes[0].address if notes else DEFAULT_ADDRESS
