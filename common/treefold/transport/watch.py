"""Looks on while a process works: counts for those who ask, and writes down what took how long.

A `Loop` has a watch only if metrics or a timeline are wanted; without one it pays for a comparison.
The thread that owns the sockets does all of the work here. Those who ask, on threads of the HTTP
endpoint, leave a `Questions` that it answers between two events.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import TYPE_CHECKING

from treefold.common.config import Settings
from treefold.common.errors import ConfigError
from treefold.common.log import logger
from treefold.common.metrics import Reading
from treefold.common.timeline import Timeline, part_of
from treefold.transport.questions import Questions
from treefold.transport.sockets import Arrival
from treefold.transport.tally import Tally
from treefold.wire.exchange import Received
from treefold.wire.words import Role

if TYPE_CHECKING:
    from treefold.transport.endpoint import Endpoint

WAIT_LEAST_NS = 5_000  # shorter waits are left out of a timeline
SHOWN = ("table", "shard", "round", "slot", "version", "part", "count")


class Watch:
    """Counts and writes down what one process does.

    Parameters
    ----------
    role : Role
        Of the process.
    tally : Tally
        Counts.
    ring : callable
        Wakes the thread that owns the sockets.

    Attributes
    ----------
    address : str
        Where metrics can be asked for, as ``host:port``; empty if they cannot.
    timeline : Timeline or None
        Where spans go.
    """

    def __init__(self, role: Role, tally: Tally, ring: Callable[[], None]) -> None:
        self.address = ""
        self.tally = tally
        self.timeline: Timeline | None = None
        self._role, self._number = role.name.lower(), int(role)
        self._rank = -1
        self._questions = Questions(ring)
        self._endpoint: Endpoint | None = None
        self._is_begun = False
        self._shown: dict[type, list[str]] = {}

    def open(self, settings: Settings) -> None:
        """Begin to offer metrics, as the settings say.

        Raises
        ------
        ConfigError
            The port is taken, or can be reached from elsewhere and there is no token.
        """
        from treefold.transport.endpoint import Endpoint  # noqa: PLC0415 # who does not ask need not wait

        self._endpoint = Endpoint(settings, self.ask, self.ask_targets)
        self.address = self._endpoint.address
        self.tally.offered(self.address)
        logger("metrics").info("http://%s/metrics", self.address)

    def record(self, base: str) -> None:
        """Begin to write a timeline; ``base`` is what the files of a run are called.

        Raises
        ------
        ConfigError
            There can be no such file.
        """
        number = 10 * os.getpid() + self._number  # several may live in one process
        try:
            self.timeline = Timeline(part_of(base, self._role), number)
        except OSError as error:
            raise ConfigError(f"a timeline cannot be written: {error}") from error
        self.timeline.name(self._role)
        if self.tally.spent is not None:
            self.tally.spent.timeline = self.timeline

    # ---- for those who ask, on any thread -------------------------------------------------------

    def ask(self) -> list[Reading]:
        """All readings.

        Raises
        ------
        UnavailableError
            The process is too busy to answer.
        """
        return self._questions.ask(self._readings)

    def ask_targets(self) -> list["Target"]:
        """Where metrics of the whole cluster are."""
        return self._questions.ask(self._targets)

    def _readings(self) -> list[Reading]:
        labels = (metadata.version("treefold"), self._role, str(self.tally.rank()))
        return [Reading("build_info", 1, labels), *self.tally.readings()]

    def _targets(self) -> list["Target"]:
        return [(self.address, self._role), *self.tally.targets()]

    # ---- for the thread that owns the sockets ----------------------------------------------

    def turn(self) -> None:
        """Answer questions, and write what there is to write."""
        self._questions.answer()
        if self.timeline is not None:
            self._write(self.timeline)

    def _write(self, timeline: Timeline) -> None:
        if not self._is_begun:
            self._is_begun = True
            timeline.own("exchange")
        rank = self.tally.rank()
        if rank != self._rank:
            self._rank = rank
            timeline.name(f"{self._role}-{rank}")
        timeline.write_at(time.monotonic_ns())

    def handled(self, event: object, effects: Sequence[object], began_ns: int) -> None:
        """An event, and everything that it led to, is dealt with."""
        ended_ns = time.monotonic_ns()
        self.tally.see(event, effects, began_ns, ended_ns)
        if self.timeline is not None:
            what = event.message if isinstance(event, Received) else event
            name = self.tally.spans.get(type(what))
            if name is not None:
                self.timeline.span(name, began_ns, ended_ns, self._about(what))

    def _about(self, what: object) -> dict[str, int]:
        """What a span is about, for people who look at it."""
        kind = type(what)
        known = self._shown.get(kind)
        if known is None:
            fields = getattr(kind, "__struct_fields__", ())
            known = self._shown[kind] = [name for name in SHOWN if name in fields]
        return {name: getattr(what, name) for name in known}

    def waiting(self, arrivals: Iterator[Arrival]) -> Iterator[Arrival]:
        """The same arrivals; how long the first one was waited for is written down."""
        if self.timeline is None:
            yield from arrivals
            return
        began_ns = time.monotonic_ns()
        first = next(arrivals, None)
        ended_ns = time.monotonic_ns()
        if ended_ns - began_ns >= WAIT_LEAST_NS:
            self.timeline.span("wait", began_ns, ended_ns)
        if first is not None:
            yield first
            yield from arrivals

    def close(self) -> None:
        """Stop offering metrics, and finish the timeline."""
        if self._endpoint is not None:
            self._endpoint.close()
        if self.tally.spent is not None:
            self.tally.spent.timeline = None
        if self.timeline is not None:
            self.timeline.close()
            self.timeline = None


Target = tuple[str, str]
"""Where metrics are, as ``host:port``, and whose they are."""


def watch_for(
    settings: Settings, role: Role, tally: Tally, ring: Callable[[], None]
) -> Watch | None:
    """A watch, if the settings ask for anything that needs one.

    Raises
    ------
    ConfigError
        Metrics cannot be offered, or a timeline not be written, where the settings say.
    """
    if settings.metrics_port < 0 and not settings.timeline:
        return None
    made = Watch(role, tally, ring)
    if settings.metrics_port >= 0:
        made.open(settings)
    if settings.timeline:
        made.record(settings.timeline)
    return made
