"""``treefold run``: a whole cluster on this machine, for as long as a script runs."""

import os
import shutil
import sys
from pathlib import Path

import msgspec

from treefold.checkpoint.store import Store
from treefold.cli.display import display_on
from treefold.cli.flags import Parser
from treefold.cli.main import NOT_STARTED
from treefold.common.config import KEYS, Loaded, Settings
from treefold.common.errors import ConfigError
from treefold.common.tape import check_is_new
from treefold.common.timeline import begin, merge
from treefold.launch.commands import TRANSPORTS, LaunchPlan
from treefold.launch.shell import Launcher

DESCRIPTION = (
    "Start a scheduler, servers and workers on this machine, run SCRIPT in every worker, and end "
    "with the script's own exit code. Nothing is left behind, on Ctrl-C neither."
)
COMMAND_METAVAR = "SCRIPT [ARG ...] | -- COMMAND [ARG ...]"
COMMAND_HELP = "a Python script with its arguments, or after -- any command"
CHOSEN_HERE = ("scheduler", "bind", "advertise", "engine", "insecure", "rank", "linger", "state")
"""Settings that a launch on one machine chooses by itself."""


def main(words: list[str]) -> int:
    """Run a script.

    Parameters
    ----------
    words : list of str
        The command line after ``treefold run``.

    Returns
    -------
    int
        The script's exit code; 1 the job failed, 3 the cluster did not form; from 128 on the number
        of the signal that ended the run.
    """
    known = parser()
    options, loaded = known.read(words)
    plan = LaunchPlan(
        settings=settings_of(loaded),
        command=command_of(options.command, known),
        transport=options.transport,
        environment=os.environ,
    )
    base = plan.settings.timeline
    begin(base)
    with display_on(sys.stdout, sys.stderr) as display:
        try:
            code = Launcher(plan, display).run()
        except OSError as error:
            display.event(f"the processes cannot be started: {error}")
            return NOT_STARTED
        finally:
            if base:
                display.event(f"timeline of {merge(base)} processes in {base}")
        display.ended(code)
    return code


def parser() -> Parser:
    """The flags of ``treefold run``."""
    made = Parser("run", DESCRIPTION, [key for key in KEYS if key not in CHOSEN_HERE])
    made.add_argument(
        "--transport",
        choices=TRANSPORTS,
        default="ipc",
        help="how the processes talk: sockets in a private folder, or loopback ports (default ipc)",
    )
    made.add_argument(
        "command",
        nargs="...",
        metavar=COMMAND_METAVAR,
        help=COMMAND_HELP,
    )
    return made


def command_of(words: list[str], parser: Parser) -> list[str]:
    """What each worker runs.

    Parameters
    ----------
    words : list of str
        A script with its arguments, or ``--`` and a command.
    parser : Parser
        Ends with usage.

    Raises
    ------
    ConfigError
        There is no such script or command.
    """
    is_command = words[:1] == ["--"]
    words = words[1:] if is_command else words
    if not words:
        parser.error("which script? treefold run [FLAGS] SCRIPT [ARG ...]")
    if not is_command and not Path(words[0]).is_file():
        msg = f"there is no script {words[0]!r} in {Path.cwd()}; for another command: -- COMMAND"
        raise ConfigError(msg)
    if is_command and shutil.which(words[0]) is None:
        msg = f"there is no command {words[0]!r}"
        raise ConfigError(msg)
    return words if is_command else [sys.executable, *words]


def settings_of(loaded: Loaded) -> Settings:
    """Settings for the members, which start together and, with replicas, are started again.

    So each may wait for the others as long as the cluster may take to form.
    """
    settings = _resumed(loaded)
    check_is_new(settings.tape)
    waits = ["connect_timeout_s"] + (["rejoin_grace_s"] if settings.is_recoverable else [])
    page = {"page_port": 0} if loaded.origins["page_port"] == "default" else {}
    longer = {
        key: max(getattr(settings, key), settings.form_timeout_s)
        for key in waits
        if loaded.origins[key] == "default"
    }
    return msgspec.structs.replace(settings, **longer, **page)


def _resumed(loaded: Loaded) -> Settings:
    """What the job had that is gone on with: the flags need not say it again."""
    settings = loaded.settings
    versions = Store(settings.resume).versions() if settings.resume else []
    if not versions:
        return settings
    manifest = Store(settings.resume).manifest(versions[0])
    known = {"slots": manifest.slots, "seed": manifest.seed}
    taken = {key: value for key, value in known.items() if loaded.origins[key] == "default"}
    return msgspec.structs.replace(settings, **taken)
