"""The scheduler process: one socket around `treefold.scheduler.core`. Decides nothing."""

import signal
from collections.abc import Callable

from treefold.common.config import Settings
from treefold.common.log import logger
from treefold.common.process import random_number
from treefold.scheduler.core import (
    Effect,
    Event,
    SchedulerCore,
    SchedulerLimits,
    SchedulerStopAsked,
)
from treefold.transport.loop import Loop
from treefold.transport.sockets import CONTROL_FRAME_BYTES_MAX, Arrival, Context, Hub, advertised
from treefold.wire.codec import encode
from treefold.wire.exchange import Halt, Note, Peer, PeerLost, Send
from treefold.wire.membership import MS
from treefold.wire.messages import Outcome

LISTENER = "listener"


class SchedulerShell:
    """The scheduler, in a process or a thread of its own.

    Parameters
    ----------
    settings : Settings
        Where to listen, and how many of each role form the cluster.
    context : Context, optional
        Shared with other roles when several live in one process.
    """

    def __init__(self, settings: Settings, context: Context | None = None) -> None:
        self._hub = Hub(context)
        bound = self._hub.listen(
            LISTENER,
            settings.bind,
            insecure=settings.insecure,
            frame_bytes_max=CONTROL_FRAME_BYTES_MAX,
        )
        self.address = advertised(bound, settings.advertise)
        self._core = SchedulerCore(limits_of(settings))
        self._loop: Loop[Event, Effect] = Loop(self._hub, self._core, self._perform)
        self._halt: Halt | None = None
        self._stop: SchedulerStopAsked | None = None
        self._log = logger("scheduler")

    @property
    def ending(self) -> str:
        """Why the process ends, once `run` has returned."""
        return "" if self._halt is None else self._halt.text

    def run(self) -> int:
        """Serve until the job has ended; returns the exit status."""
        self._loop.feed(PeerLost(None))  # starts the core's clock
        while self._halt is None:
            self._loop.turn(_peer_of)
            if self._stop is not None:
                stop, self._stop = self._stop, None
                self._loop.feed(stop)
        self._hub.close()
        return self._halt.status

    def stop(self, outcome: Outcome, text: str) -> None:
        """Ask the scheduler to end the job; may be called from a signal handler or a thread."""
        self._stop = SchedulerStopAsked(outcome, text)
        self._hub.bell.ring()

    def _perform(self, effect: Effect) -> list[Event]:
        match effect:
            case Send(peer, message, _):
                if isinstance(peer, bytes):
                    self._hub.send(LISTENER, peer, encode(message))
            case Note(level, text):
                self._log.log(level, text)
            case Halt():
                self._halt = self._halt or effect  # what came in the same batch changes nothing
        return []


def limits_of(settings: Settings) -> SchedulerLimits:
    """The core's settings, with a fresh number for this job."""
    return SchedulerLimits(
        job=random_number(),
        servers=settings.servers,
        workers=settings.workers,
        heartbeat_ns=settings.heartbeat_ms * MS,
        dead_after_ns=settings.dead_after_ms * MS,
        server_dead_after_ns=settings.server_dead_after_ms * MS,
        form_timeout_ns=int(settings.form_timeout_s * 1000) * MS,
        rejoin_grace_ns=int(settings.rejoin_grace_s * 1000) * MS,
        is_lingering=settings.linger,
        is_restarting=settings.max_restarts > 0,
    )


def main(settings: Settings, announce: Callable[[str], None]) -> int:
    """Run the scheduler in this process until the job has ended.

    Parameters
    ----------
    settings : Settings
        Where to listen, and how many of each role form the cluster.
    announce : callable
        Told the bound address before anything else happens.

    Returns
    -------
    int
        Exit status.
    """
    shell = SchedulerShell(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _stop_once(shell))
    announce(shell.address)
    status = shell.run()
    if status:
        logger("scheduler").error(shell.ending)
    return status


def _stop_once(shell: SchedulerShell) -> None:
    """First signal: end the job. Second: the default, which ends the process at once."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    shell.stop(Outcome.DRAINED, "the scheduler was asked to stop")


def _peer_of(arrival: Arrival) -> Peer:
    return arrival.sender
