"""Default deny: what a peer sends is taken only if the role of its key allows it.

Asked for every message, so that a key that is taken off the allow-list counts for nothing from then
on, on connections that it has already as well. At the scheduler an incarnation belongs to the key
that it was given to: nobody beats, leaves or reports in another one's name.
"""

from collections import OrderedDict

from treefold.common.audit import Audit
from treefold.transport.access import Access
from treefold.transport.sockets import Arrival
from treefold.wire.messages import (
    AnyMessage,
    DeclareTable,
    DrainRequest,
    Leave,
    Register,
    Registered,
)
from treefold.wire.permissions import denial
from treefold.wire.words import MEMBERS_MAX

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
        self._asked: OrderedDict[int, str] = OrderedDict()
        self._owners: dict[int, str] = {}

    def grant(self, message: Registered) -> None:
        """An incarnation is given to who asked with this nonce: to the key that it has."""
        public = self._asked.pop(message.nonce, None)
        if public is not None:
            self._owners[message.incarnation] = public

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
            reason = denial(entry.role, message) or self._impostor(arrival, message)
        if self._audit is not None:
            who = (name, role, arrival.where)
            if reason:
                self._audit.deny(type(message).__name__, reason, who=who)
            elif isinstance(message, AUDITED):
                self._audit.note(type(message).__name__, _words(message), who=who)
        return reason

    def _impostor(self, arrival: Arrival, message: AnyMessage) -> str:
        """Why a member may not speak in this name; empty if it may."""
        if isinstance(message, Register):
            self._asked[message.nonce] = arrival.public
            if len(self._asked) > MEMBERS_MAX:
                self._asked.popitem(last=False)
            return ""
        claimed: int | None = getattr(message, "incarnation", None)
        if not claimed or not isinstance(arrival.sender, bytes):
            return ""
        owner = self._owners.get(claimed)
        if owner is None and len(self._owners) < MEMBERS_MAX:
            # This scheduler was started again, and the member is from before.
            self._owners[claimed] = owner = arrival.public
        if owner in (None, arrival.public):
            return ""
        return f"incarnation {claimed} belongs to another key"


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
