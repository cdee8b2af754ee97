"""A whole cluster in this process, for a script that was started alone: same code, same bits."""

import sys
import threading

import msgspec

from treefold.common.config import Settings, metrics_port_of
from treefold.common.log import logger
from treefold.common.process import random_number
from treefold.scheduler.shell import SchedulerShell
from treefold.server.shell import ServerShell
from treefold.transport.sockets import Context
from treefold.wire.words import Outcome
from treefold.worker.client import Client

ENDING_MAX_S = 10.0  # a thread that still computes when the interpreter ends would abort it


def connect_embedded(settings: Settings) -> Client:
    """Start a scheduler and a server as threads, and connect to them.

    Parameters
    ----------
    settings : Settings
        ``slots``, ``seed`` and the like are kept; addresses and sizes are replaced.

    Returns
    -------
    Client
        The one worker of this cluster. When it leaves, the threads end.
    """
    context: Context = Context()
    name = f"inproc://treefold-{random_number():x}"
    alone = msgspec.structs.replace(
        settings,
        servers=1,
        workers=1,
        replicas=1,
        journal="",
        keys="",  # nothing leaves this process
        audit="",
        advertise="",
        linger=False,
        max_restarts=0,
    )
    scheduler = SchedulerShell(msgspec.structs.replace(alone, bind=f"{name}-scheduler"), context)
    if scheduler.link:
        sys.stderr.write(f"treefold: live page {scheduler.link}\n")  # a script's logging is its own
    inside = msgspec.structs.replace(
        alone,
        scheduler=scheduler.address,
        bind=f"{name}-server",
        metrics_port=metrics_port_of(alone, "server"),
    )
    server = ServerShell(inside, context)
    other = threading.Thread(target=scheduler.run, name="treefold-scheduler", daemon=True)
    other.start()
    own_port = metrics_port_of(alone, "worker")
    client = EmbeddedClient(msgspec.structs.replace(inside, metrics_port=own_port), context)

    def serve() -> None:
        _serve(server, scheduler)
        other.join()
        client.wait_closed()
        context.term()

    client.cluster = threading.Thread(target=serve, name="treefold-server", daemon=True)
    client.cluster.start()
    return client


class EmbeddedClient(Client):
    """A client whose cluster lives in this process, and ends with it.

    Attributes
    ----------
    cluster : Thread
        Ends after all the others.
    """

    cluster: threading.Thread

    def leave(self, outcome: Outcome, text: str) -> None:
        """Leave the cluster, and wait a bounded time until its threads have ended."""
        super().leave(outcome, text)
        self.cluster.join(ENDING_MAX_S)
        if self.cluster.is_alive():
            logger("worker").warning(
                "the embedded cluster did not end within %.0f s; going on without it", ENDING_MAX_S
            )


def _serve(server: ServerShell, scheduler: SchedulerShell) -> None:
    """Run the server; if it breaks, end the job at once, for nobody else would notice."""
    try:
        server.run()
    except BaseException as error:
        scheduler.stop(Outcome.FAILED, f"the embedded server failed: {error}")
        raise
