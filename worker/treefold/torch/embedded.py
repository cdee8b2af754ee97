"""A whole cluster in this process, for a script that was started alone: same code, same bits."""

import threading

import msgspec

from treefold.common.config import Settings
from treefold.common.process import random_number
from treefold.scheduler.shell import SchedulerShell
from treefold.server.shell import ServerShell
from treefold.transport.sockets import Context
from treefold.wire.messages import Outcome
from treefold.worker.client import Client


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
        settings, servers=1, workers=1, advertise="", linger=False, max_restarts=0
    )
    scheduler = SchedulerShell(msgspec.structs.replace(alone, bind=f"{name}-scheduler"), context)
    inside = msgspec.structs.replace(alone, scheduler=scheduler.address, bind=f"{name}-server")
    server = ServerShell(inside, context)
    threading.Thread(target=scheduler.run, name="treefold-scheduler", daemon=True).start()
    threading.Thread(
        target=_serve, args=(server, scheduler), name="treefold-server", daemon=True
    ).start()
    return Client(inside, context)


def _serve(server: ServerShell, scheduler: SchedulerShell) -> None:
    """Run the server; if it breaks, end the job at once, for nobody else would notice."""
    try:
        server.run()
    except BaseException as error:
        scheduler.stop(Outcome.FAILED, f"the embedded server failed: {error}")
        raise
