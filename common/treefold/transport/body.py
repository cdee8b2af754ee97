"""What servers and workers have alike, for those who ask for their metrics."""

from collections.abc import Iterator
from dataclasses import dataclass

from treefold.common.metrics import NS, Reading
from treefold.common.process import Spent
from treefold.transport.carrier import Carrier
from treefold.wire.membership import Membership

WAITS = ("wait", "await")  # names of a `Spent` that are no work


@dataclass(frozen=True, slots=True)
class Body:
    """What servers and workers have alike."""

    membership: Membership
    carrier: Carrier
    spent: Spent

    @property
    def rank(self) -> int:
        """The member's rank, -1 until the scheduler has said one."""
        return self.membership.rank if self.membership.incarnation else -1

    def readings(self) -> Iterator[Reading]:
        """Metrics of any member."""
        yield Reading("cluster_view", self.membership.vitals.view)
        yield Reading("queue_depth", len(self.carrier), ("payloads",))
        yield Reading("shared_memory_bytes", self.carrier.lanes.nbytes)
        for activity, ns in self.spent.ns.copy().items():
            if activity not in WAITS:
                yield Reading("busy_seconds_total", ns / NS, (activity,))
