"""``treefold scheduler``: for a cluster whose other members are started by hand or elsewhere."""

import sys
from contextlib import ExitStack

import msgspec

from treefold.cli.flags import Parser
from treefold.common.config import Settings
from treefold.common.errors import ConfigError
from treefold.common.log import configure, logger
from treefold.launch.runtime import noted

DESCRIPTION = (
    "Start the scheduler. The first line that it prints is its address, which servers and "
    "workers need. It ends when the job has."
)
DEFAULT_ADDRESS = "tcp://127.0.0.1:29700"
FLAGS = (
    "bind", "advertise", "engine", "insecure", "keys", "audit",
    "peer_bytes_max", "peer_bytes_per_s", "servers", "workers", "replicas",
    "journal", "checkpoint", "checkpoint_every", "checkpoints_kept", "resume", "state", "slots",
    "seed",
    "heartbeat_ms", "dead_after_ms",
    "server_dead_after_ms", "form_timeout_s", "rejoin_grace_s", "max_restarts", "linger",
    "log_level",
    "metrics_port", "metrics_bind", "metrics_token_file", "timeline",
    "page_port", "page_bind", "page_token_file", "report",
)  # fmt: skip


def main(words: list[str]) -> int:
    """Run a scheduler until its job has ended.

    Parameters
    ----------
    words : list of str
        The command line after ``treefold scheduler``.

    Returns
    -------
    int
        0 the job is done, 1 it failed, 3 the cluster did not form in time.
    """
    _, loaded = Parser("scheduler", DESCRIPTION, FLAGS).read(words, "scheduler")
    settings = loaded.settings
    if loaded.origins["bind"] == "default":
        settings = msgspec.structs.replace(settings, bind=DEFAULT_ADDRESS)
    configure(settings.log_level, "scheduler")
    if loaded.engine:
        logger("scheduler").info(loaded.engine)
    return serve(settings)


def serve(settings: Settings) -> int:
    """Run a scheduler, and let `treefold status` find it while it runs."""
    from treefold.scheduler.shell import main as run  # noqa: PLC0415 # after the flags are checked

    with ExitStack() as stack:

        def announce(address: str, link: str) -> None:
            sys.stdout.write(f"scheduler {address}\n")
            sys.stdout.write(f"page {link}\n" if link else "")
            sys.stdout.flush()
            try:
                stack.enter_context(noted(address, link))
            except (ConfigError, OSError) as error:
                logger("scheduler").warning("treefold status needs --scheduler: %s", error)

        return run(settings, announce)
