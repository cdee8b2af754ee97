"""``treefold worker``: one worker of a cluster, which is any command that uses treefold."""

import os

import msgspec

from treefold.cli.flags import Parser, check_scheduler
from treefold.cli.run import COMMAND_HELP, COMMAND_METAVAR, command_of
from treefold.common.config import PREFIX, environment_of
from treefold.common.log import configure
from treefold.launch.commands import prepared
from treefold.launch.link import fetch
from treefold.transport.access import access_of
from treefold.wire.permissions import KeyRole

DESCRIPTION = (
    "Wait for the scheduler, then become COMMAND with the cluster's settings in its environment: "
    "signals reach it and its exit code is seen as if it had been started without treefold."
)
FLAGS = (
    "scheduler", "engine", "keys", "rank", "slots", "seed", "consistency", "staleness",
    "staleness_max", "quorum", "grace", "late", "compensation", "health", "connect_timeout_s",
    "retry_ms", "lane", "lane_bytes_max", "ledger", "log_level", "metrics_port", "metrics_bind",
    "metrics_token_file", "timeline",
)  # fmt: skip


def main(words: list[str]) -> int:
    """Become a worker.

    Parameters
    ----------
    words : list of str
        The command line after ``treefold worker``.

    Returns
    -------
    int
        Never: the command takes the place of this process, and its exit code is that of the worker.

    Raises
    ------
    ConfigError
        There is no such command, or no scheduler's address is set.
    UnavailableError
        No scheduler answered.
    """
    parser = Parser("worker", DESCRIPTION, FLAGS)
    parser.add_argument("command", nargs="...", metavar=COMMAND_METAVAR, help=COMMAND_HELP)
    options, loaded = parser.read(words, "worker")
    settings = loaded.settings
    check_scheduler(settings, "worker")
    if loaded.engine:
        configure(settings.log_level, "worker").info(loaded.engine)
    command = command_of(options.command, parser)
    access = access_of(settings, KeyRole.WORKER)
    fetch(settings.scheduler, int(settings.connect_timeout_s * 1000), access)
    values = environment_of(msgspec.to_builtins(settings)) | {PREFIX + "CONFIG": os.devnull}
    os.execvpe(command[0], command, prepared(os.environ) | values)  # noqa: S606 # no shell is the point
