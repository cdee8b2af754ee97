"""What members share one machine, and what of it each can expect."""

import os

from treefold.wire.messages import View
from treefold.wire.words import Role


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_crowded(view: View | None, host: str) -> bool:
    """Whether all servers are on this machine, with more members than processors.

    Then what goes on beside a worker's computation takes the time from it, or from another one's.

    Parameters
    ----------
    view : View or None
        The cluster.
    host : str
        This machine's name, as members give it.
    """
    members = [] if view is None else view.members
    servers = [member for member in members if member.role is Role.SERVER]
    here = [member for member in members if member.host == host]
    is_alone = bool(servers) and all(server.host == host for server in servers)
    return is_alone and len(here) > processors()
