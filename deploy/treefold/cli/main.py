"""The command `treefold`: finds the subcommand, and turns what it raises into an exit code.

A subcommand is a module with ``main(words) -> int``. It is imported only when it is called for, so
that none waits for what another one needs.
"""

import argparse
import importlib
import sys
from importlib import metadata
from typing import TYPE_CHECKING

from treefold.common.errors import (
    AuthError,
    ConfigError,
    FormationError,
    SchedulerLostError,
    TreefoldError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

DONE, FAILED, USAGE, NOT_STARTED = 0, 1, 2, 3

COMMANDS = {
    "run": "run a script on a scheduler, servers and workers of this machine",
    "scheduler": "start the scheduler of a cluster",
    "server": "start one server",
    "worker": "start one worker: run a command with the cluster's settings",
    "status": "say who is there, what is where, and what is waited for",
    "top": "show live what goes on in a cluster, and where the time goes",
    "drain": "let others take over a member's work, and the member leave",
    "report": "save what the live page of a job shows, as one file",
    "keys": "make, list, add, remove or change keys",
    "checkpoint": "list, inspect, verify or export checkpoints",
    "replay": "step again what a job recorded, and compare",
    "render": "print a cluster as a Compose file",
    "doctor": "check the installation with a push and pull round trip",
    "config": "show every setting and where its value comes from",
}


def main() -> int:
    """Run the command that ``sys.argv`` names.

    Returns
    -------
    int
        0 done, 1 the script or the job failed, 2 wrong usage, 3 not started or no cluster.
    """
    options = _parser().parse_args(sys.argv[1:2])
    module = importlib.import_module(f"treefold.cli.{options.command}")
    command: Callable[[list[str]], int] = module.main
    try:
        return command(sys.argv[2:])
    except TreefoldError as error:
        sys.stderr.write(f"treefold {options.command}: {error}\n")
        return exit_code_of(error)
    except KeyboardInterrupt:
        return 130


def exit_code_of(error: TreefoldError) -> int:
    """The exit code that an error of a command leads to."""
    if isinstance(error, ConfigError):
        return USAGE
    lost = AuthError | FormationError | SchedulerLostError | UnavailableError
    return NOT_STARTED if isinstance(error, lost) else FAILED


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="treefold",
        description="A parameter server for PyTorch: the same bits on any cluster.",
        epilog="\n".join(["commands:", *lines, "", "treefold COMMAND --help says more."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"treefold {metadata.version('treefold')}"
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument("command", choices=COMMANDS, help="what to do")
    return parser
