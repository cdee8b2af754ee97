"""Which points the turn of a shell passes, at which a test may let its process die.

A shell has one table of them. Points that no table can name are calls of
`treefold.common.failpoints.failpoint` where they are; there are few.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from treefold.common.failpoints import failpoint
from treefold.wire.exchange import Received, Send

Kind = type[object]
"""Of a message that comes or goes, else of the event or effect itself."""


class Points(NamedTuple):
    """Names of points by kinds.

    Attributes
    ----------
    received : mapping of Kind to str
        After it came, before the core hears of it.
    before, after : mapping of Kind to str
        Before and after an effect is carried out; after it a message has left this process.
    first : mapping of Kind to str
        After the first of several effects of one kind that one event leads to.
    """

    received: Mapping[Kind, str] = {}
    before: Mapping[Kind, str] = {}
    after: Mapping[Kind, str] = {}
    first: Mapping[Kind, str] = {}

    def on_event(self, event: object) -> None:
        """Pass the point before the core hears of an event."""
        _pass(self.received, kind_of(event))

    def on_effect(self, effect: object) -> None:
        """Pass the point before an effect is carried out."""
        _pass(self.before, kind_of(effect))

    def on_done(self, effects: Sequence[object], number: int, let_out: Callable[[], None]) -> None:
        """Pass the points after effect ``number`` of those that one event leads to."""
        kinds = [kind_of(effect) for effect in effects]
        kind = kinds[number]
        _pass(self.after, kind, let_out)
        if kind not in kinds[:number] and kind in kinds[number + 1 :]:
            _pass(self.first, kind, let_out)


NOWHERE = Points()


def kind_of(thing: object) -> Kind:
    """By what the tables name an event or effect."""
    return type(thing.message if isinstance(thing, Received | Send) else thing)


def _pass(names: Mapping[Kind, str], kind: Kind, let_out: Callable[[], None] | None = None) -> None:
    if kind in names:
        failpoint(names[kind], let_out)
