"""What a worker can be asked for: the state of its core, and what its tally has counted."""

from collections.abc import Callable, Iterator, Sequence

from treefold.common.metrics import NS, Reading
from treefold.transport.body import Body
from treefold.transport.tally import Tally, of_traffic
from treefold.transport.traffic import Traffic
from treefold.wire.messages import Grant, Published, Pulled, RoundStatus, View
from treefold.worker.core import WorkerCore
from treefold.worker.effects import Contributed, HyperKnown, SlotFinished

SPANS: dict[type, str] = {
    Contributed: "push", HyperKnown: "hyper", SlotFinished: "push", Pulled: "pull",
    Published: "pull", RoundStatus: "push", View: "view", Grant: "grant",
}  # fmt: skip
"""What a worker's timeline shows of what its I/O thread does."""
REASONS = {"wait": "slot", "await": "parameters"}
"""Why a script waits, by the name that a `Spent` has for it."""


class WorkerTally(Tally):
    """A worker's metrics.

    Parameters
    ----------
    core : WorkerCore
        Decides.
    body : Body
        What members have alike.
    queued : callable
        How many events wait for the I/O thread.
    traffic : Traffic
        What went by the sockets.
    """

    def __init__(
        self, core: WorkerCore, body: Body, queued: Callable[[], int], traffic: Traffic
    ) -> None:
        super().__init__(SPANS, body.spent)
        self._core = core
        self._body = body
        self._queued = queued
        self._traffic = traffic
        self._finished = 0

    def offered(self, address: str) -> None:
        """Tell the scheduler, with the next heartbeat."""
        self._body.membership.vitals.metrics = address

    def rank(self) -> int:
        """The member's rank."""
        return self._body.rank

    def see(self, event: object, effects: Sequence[object], began_ns: int, ended_ns: int) -> None:
        """Count messages, and slots."""
        super().see(event, effects, began_ns, ended_ns)
        self._finished += isinstance(event, SlotFinished)

    def readings(self) -> Iterator[Reading]:
        """Everything that a worker can be asked for."""
        yield from super().readings()
        yield from self._body.readings()
        yield from of_traffic(self._traffic)
        vitals = self._core.membership.vitals
        yield Reading("queue_depth", self._queued(), ("events",))
        yield Reading("worker_step", self._core.position)
        yield Reading("worker_steps_total", self._finished)
        yield Reading("worker_samples_total", vitals.samples)
        if vitals.loss is not None:
            yield Reading("worker_loss", vitals.loss)
        spent = self._body.spent.ns
        for name, reason in REASONS.items():
            yield Reading("worker_wait_seconds_total", spent.get(name, 0) / NS, (reason,))
