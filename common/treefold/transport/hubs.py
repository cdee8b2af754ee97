"""The sockets of a process, as its settings say."""

from treefold.common.audit import Audit
from treefold.common.config import Settings
from treefold.transport.access import access_of
from treefold.transport.meters import PeerBudget
from treefold.transport.sockets import Context, Hub
from treefold.wire.permissions import KeyRole


def hub_of(settings: Settings, role: KeyRole, context: Context | None, audit: Audit | None) -> Hub:
    """Sockets with the keys of this role, and with what a peer may bring.

    Raises
    ------
    ConfigError
        The keys cannot be used.
    """
    budget = PeerBudget(settings.peer_bytes_max, settings.peer_bytes_per_s)
    return Hub(context, access_of(settings, role), audit, budget)
