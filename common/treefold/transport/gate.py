"""Default deny: what a peer sends is taken only if the role of its key allows it.

Asked for every message, so that a key that is taken off the allow-list counts for nothing from then
on, on connections that it has already as well.
"""

from treefold.common.audit import Audit
from treefold.transport.access import Access
from treefold.transport.sockets import Arrival
from treefold.wire.messages import AnyMessage, DeclareTable, DrainRequest, Leave, Register
from treefold.wire.permissions import denial

AUDITED = (Register, Leave, DeclareTable, DrainRequest)
"""What is written down although it is allowed: what changes who is there, and what is where."""


class Gate:
    """Decides about arrivals.

    Parameters
    ----------
    access : Access or None
        Who is allowed; without keys everybody who can connect is.
    audit : Audit, optional
        Told of what is refused, and of requests that change the cluster.
    """

    def __init__(self, access: Access | None, audit: Audit | None) -> None:
        self._access = access
        self._audit = audit

    def denial(self, arrival: Arrival, message: AnyMessage) -> str:
        """Why a message is not taken, empty if it is."""
        if self._access is None:
            if self._audit is not None and isinstance(message, AUDITED):
                self._audit.note(type(message).__name__, _words(message))
            return ""
        entry = self._access.entry(arrival.public)
        if entry is None:
            name, role = "", ""
            reason = f"the key {arrival.public or '(none)'} is not on the allow-list (any more)"
        else:
            name, role = entry.name, entry.role
            reason = denial(entry.role, message)
        if self._audit is not None:
            who = (name, role, arrival.where)
            if reason:
                self._audit.deny(type(message).__name__, reason, who=who)
            elif isinstance(message, AUDITED):
                self._audit.note(type(message).__name__, _words(message), who=who)
        return reason


def _words(message: AnyMessage) -> str:
    """What a request is about."""
    match message:
        case Register():
            return f"{message.role.name.lower()} on {message.host}, process {message.pid}"
        case Leave():
            return f"incarnation {message.incarnation}: {message.outcome.name.lower()}"
        case DeclareTable():
            return f"table {message.spec.name}"
        case DrainRequest():
            return message.member
        case _:
            return ""
