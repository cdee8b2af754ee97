"""The vocabulary in which every core talks to its shell: what happened, and what is to be done.

A core is called as ``handle(now_ns, event) -> list[effect]`` and says with ``next_deadline_ns()``
when it wants a `Tick` at the latest. Effects are carried out in list order. Times are integer
nanoseconds of a monotonic clock. Payloads are opaque: a core passes handles on and never looks
inside.
"""

from collections.abc import Hashable
from enum import IntEnum

import msgspec

from treefold.wire.messages import AnyMessage

Peer = Hashable
"""Whom a message came from or goes to: `SCHEDULER`, a routing identity, or an incarnation."""

SCHEDULER = "scheduler"


class Level(IntEnum):
    """How much a note matters, on the scale of the `logging` module."""

    DEBUG = 10
    INFO = 20
    WARNING = 30
    ERROR = 40


class Received(msgspec.Struct, frozen=True, gc=False):
    """A message arrived. ``payloads`` has the handle of each part's payload, if it has any.

    ``key`` is the public key that the sender's connection has proven; empty without keys.
    """

    peer: Peer
    message: AnyMessage
    payloads: tuple[int, ...] = ()
    key: str = ""


class PeerLost(msgspec.Struct, frozen=True, gc=False):
    """Messages to this peer can no longer be delivered."""

    peer: Peer


class Tick(msgspec.Struct, frozen=True, gc=False):
    """Time has passed; nothing else happened."""


class Send(msgspec.Struct, frozen=True, gc=False):
    """Send a message; the shell resolves ``payload``, a reference or a handle per part."""

    peer: Peer
    message: AnyMessage
    payload: object | None = None


class Note(msgspec.Struct, frozen=True, gc=False):
    """Tell the operator. Of notes about one matter there may be a bound; "" is none by name."""

    level: Level
    text: str
    about: str = ""


class Halt(msgspec.Struct, frozen=True, gc=False):
    """The process is to end with this exit status, once what was sent before is out."""

    status: int
    text: str
