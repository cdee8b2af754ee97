"""Default deny: what a peer sends is taken only if the role of its key allows it.

Asked for every message, so that a key that is taken off the allow-list counts for nothing from then
on, on connections that it has already as well. An incarnation belongs to the key with which it
registered at the scheduler; views tell the others. Nobody speaks in another one's name: neither
beats, leaves and reports at the scheduler nor pushes, pulls and relays at a server. A number of
which nothing is known yet, since its view is late, is anybody's as far as this goes.
"""

from collections.abc import Hashable, Iterable

from treefold.common.audit import Audit
from treefold.transport.access import Access
from treefold.transport.sockets import Arrival
from treefold.wire.exchange import SCHEDULER
from treefold.wire.messages import AnyMessage, DeclareTable, DrainRequest, Leave, Register, View
from treefold.wire.permissions import claimed, denial
from treefold.wire.words import MEMBERS_MAX, Member

OWNERS_MAX = 2 * MEMBERS_MAX  # remembered with those that views do not name any more
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
        self._owners: dict[Hashable, str] = {}

    def learn(self, members: Iterable[Member]) -> None:
        """Each of these members has the key that it has, and nobody else speaks in its name."""
        if self._access is None:
            return
        for member in members:
            if member.key:
                self._owners[member.incarnation] = member.key
                if member.origin:
                    self._owners.setdefault(member.origin, member.key)

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
        number = claimed(message)
        name: Hashable = number
        if not number:
            if isinstance(arrival.sender, bytes):
                return ""
            if isinstance(message, View) and arrival.sender == SCHEDULER:
                self._follow(message)
            name = arrival.sender  # a link is called as who listens at its other end
        owner = self._owners.get(name, arrival.public)
        return "" if owner == arrival.public else f"incarnation {name} belongs to another key"

    def _follow(self, view: View) -> None:
        """Learn who is there. Who is gone may have said something that is still on its way."""
        self.learn(view.members)
        excess = len(self._owners) - OWNERS_MAX
        if excess > 0:
            named = {who for one in view.members for who in (one.incarnation, one.origin)}
            gone = [who for who in self._owners if who not in named]
            for who in gone[:excess]:
                del self._owners[who]


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
