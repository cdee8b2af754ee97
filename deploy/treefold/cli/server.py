"""``treefold server``: one server of a cluster."""

import gc
import sys

import msgspec

from treefold.cli.flags import Parser, check_scheduler
from treefold.common.config import load
from treefold.common.log import configure, logger

DESCRIPTION = (
    "Start one server. The first line that it prints is the address at which it takes pushes and "
    "pulls. It ends when the job has."
)
FLAGS = (
    "scheduler", "bind", "advertise", "engine", "insecure", "keys", "audit", "rank",
    "peer_bytes_max", "peer_bytes_per_s", "connect_timeout_s", "lane",
    "lane_bytes_max", "check_every", "ledger", "tape", "tape_bytes_max", "log_level",
    "metrics_port", "metrics_bind", "metrics_token_file", "timeline",
)  # fmt: skip


def main(words: list[str]) -> int:
    """Run a server until its job has ended.

    Parameters
    ----------
    words : list of str
        The command line after ``treefold server``.

    Returns
    -------
    int
        0 the job is done, 1 it failed, 3 there is no scheduler or the cluster did not form.
    """
    parser = Parser("server", DESCRIPTION, FLAGS)
    parser.add_argument("--join", metavar="ADDRESS", help="the same as --scheduler")
    options, loaded = parser.read(words, "server")
    settings = loaded.settings
    if options.join:
        settings = load(msgspec.to_builtins(settings) | {"scheduler": options.join}).settings
    check_scheduler(settings, "server")
    configure(settings.log_level, "server")
    if loaded.engine:
        logger("server").info(loaded.engine)
    gc.disable()
    from treefold.server.shell import main as run  # noqa: PLC0415 # after the flags are checked

    # Torch's objects stay for good: to look through them again and again, and once more at the end,
    # would take longer than a small job.
    gc.freeze()
    gc.enable()
    return run(settings, announce)


def announce(address: str) -> None:
    """Print the address that was bound."""
    sys.stdout.write(f"server {address}\n")
    sys.stdout.flush()
