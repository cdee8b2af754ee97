"""Declarations on their way to the scheduler: sent until answered, again after a new registration.

Part of `treefold.worker.core` in a file of its own; just as pure.
"""

from treefold.wire.exchange import SCHEDULER, Send
from treefold.wire.membership import MS, Membership
from treefold.wire.messages import DeclarePlan, DeclareTable
from treefold.worker.effects import DeclareCalled, Effect, LoopCalled

RETRY_MS = 500
CALLS_MAX = 1 << 40  # of one registration, so that answers to an earlier one are told from ours


class Declarations:
    """Calls of the script that the scheduler has not answered yet.

    Parameters
    ----------
    membership : Membership
        Who this worker is.
    out : list of Effect
        The core's effects.
    """

    def __init__(self, membership: Membership, out: list[Effect]) -> None:
        self._membership = membership
        self._out = out
        self._pending: dict[int, DeclareCalled | LoopCalled] = {}
        self._tables: dict[int, DeclareCalled] = {}
        self._deadline_ns: int | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether a call of the script is not answered."""
        return any(call not in self._tables for call in self._pending)

    def next_deadline_ns(self) -> int | None:
        """When the unanswered are to be sent again."""
        return self._deadline_ns if self._pending else None

    def add(self, now_ns: int, event: DeclareCalled | LoopCalled) -> None:
        """Take on one call."""
        self._pending[event.call] = event
        self._send(event)
        self._deadline_ns = now_ns + RETRY_MS * MS

    def announce(self, now_ns: int) -> None:
        """Send everything that is not answered."""
        for event in self._pending.values():
            self._send(event)
        self._deadline_ns = now_ns + RETRY_MS * MS

    def retry(self, now_ns: int) -> None:
        """Send everything again if it is time."""
        if self._pending and self._deadline_ns is not None and now_ns >= self._deadline_ns:
            self.announce(now_ns)

    def renew(self, now_ns: int) -> None:
        """Send everything under a new incarnation, tables that the old one declared among it."""
        self._pending = {**self._tables, **self._pending}
        self.announce(now_ns)

    def pop(self, number: int) -> DeclareCalled | LoopCalled | None:
        """The call that was answered, None if the script has its answer already.

        So it is if an incarnation was answered that this process has no more: what that one
        declared may not count any longer.
        """
        registration, call = divmod(number, CALLS_MAX)
        if registration != self._membership.registrations:
            return None
        event = self._pending.pop(call, None)
        if call in self._tables:  # announced again for a new incarnation, which the script ignores
            return None
        if isinstance(event, DeclareCalled):
            self._tables[call] = event
        return event

    def clear(self) -> list[int]:
        """Give up; returns the calls that will not be answered."""
        calls = [call for call in self._pending if call not in self._tables]
        self._pending.clear()
        return calls

    def _send(self, event: DeclareCalled | LoopCalled) -> None:
        if not self._membership.is_member:
            return
        who = self._membership.incarnation
        number = event.call + CALLS_MAX * self._membership.registrations
        if isinstance(event, DeclareCalled):
            self._out.append(Send(SCHEDULER, DeclareTable(who, number, event.spec, event.record)))
        else:
            self._out.append(Send(SCHEDULER, DeclarePlan(who, number, event.plan)))
