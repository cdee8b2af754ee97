"""What a process counts of what it does, for those who ask for its metrics.

A `Tally` sees every event with the effects that it led to. One thread owns it: the one that owns
the sockets, which also makes the readings.
"""

from collections.abc import Iterator, Mapping, Sequence

from treefold.common.metrics import Durations, Reading
from treefold.common.process import Spent
from treefold.transport.traffic import Traffic, Way
from treefold.wire.exchange import Received, Send
from treefold.wire.messages import Refused

OK, REFUSED, MALFORMED = "ok", "refused", "malformed"


def op_of(kind: type) -> str:
    """What a message is called in a label: ``round_meta`` for `RoundMeta`."""
    name = kind.__name__
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)[1:]


class Tally:
    """Counts what every role does.

    Parameters
    ----------
    spans : mapping of type to str
        What an event, or a message that came, is called in a timeline; others are left out.
    spent : Spent, optional
        Stopwatches whose spans belong into a timeline too.

    Attributes
    ----------
    malformed : int
        Messages that did not decode.
    """

    def __init__(self, spans: Mapping[type, str], spent: Spent | None = None) -> None:
        self.spans = spans
        self.spent = spent
        self.malformed = 0
        self._durations: dict[type, Durations] = {}
        self._refused: dict[type, int] = {}
        self._counts: dict[type, int] = {}

    def see(self, event: object, effects: Sequence[object], began_ns: int, ended_ns: int) -> None:
        """An event was dealt with."""
        if not isinstance(event, Received):
            return
        kind = type(event.message)
        known = self._durations.get(kind)
        if known is None:
            known = self._durations[kind] = Durations()
            self._counts[kind] = 0
        known.add(ended_ns - began_ns)
        self._counts[kind] += 1
        for effect in effects:
            if isinstance(effect, Send) and isinstance(effect.message, Refused):
                self._refused[kind] = self._refused.get(kind, 0) + 1
                self.refuse(kind, effect.message)
                return

    def refuse(self, kind: type, refusal: Refused) -> None:
        """A message of this kind was refused."""

    def readings(self) -> Iterator[Reading]:
        """What was counted, and what a role knows beside that."""
        for kind, durations in self._durations.items():
            op, refused = op_of(kind), self._refused.get(kind, 0)
            yield Reading("requests_total", self._counts[kind] - refused, (op, OK))
            if refused:
                yield Reading("requests_total", refused, (op, REFUSED))
            yield Reading("request_duration_seconds", durations.counts(), (op,))
        yield Reading("requests_total", self.malformed, ("unknown", MALFORMED))

    def offered(self, address: str) -> None:
        """The metrics can be asked for there."""

    def rank(self) -> int:
        """The process's rank, -1 if it has none."""
        return -1

    def targets(self) -> list[tuple[str, str]]:
        """Where else there are metrics, as ``host:port``, and whose they are."""
        return []


def of_traffic(traffic: Traffic) -> Iterator[Reading]:
    """What went by the sockets."""
    for word, ways in (("receive", traffic.received), ("transmit", traffic.sent)):
        total = Way()
        for way in ways.values():
            total.messages += way.messages
            total.header_bytes += way.header_bytes
            total.payload_bytes += way.payload_bytes
            total.shared_bytes += way.shared_bytes
        yield Reading(f"network_{word}_messages_total", total.messages)
        yield Reading(f"network_{word}_bytes_total", total.header_bytes, ("header",))
        yield Reading(f"network_{word}_bytes_total", total.payload_bytes, ("payload",))
        yield Reading(f"network_{word}_bytes_total", total.shared_bytes, ("shared",))
    yield Reading("connections_cut_total", traffic.cut)
