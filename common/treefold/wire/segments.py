"""Members on one host: memory that one offers and the other maps.

See `treefold.wire.messages` for what holds for all messages.
"""

from typing import Annotated

from msgspec import Meta

from treefold.common.plan import Count
from treefold.common.spec import Text
from treefold.wire.words import Message


class SegmentOffer(Message, tag=48, frozen=True):
    """A process offers a segment of its memory to a peer that may be on the same host.

    It is file descriptor ``descriptor`` of process ``pid``, has ``nbytes`` bytes and begins with
    ``token``. The peer reads from it; only the owner writes.
    """

    segment: Annotated[int, Meta(ge=1, lt=1 << 62)]
    pid: Count
    descriptor: Count
    nbytes: Count
    token: Annotated[bytes, Meta(min_length=16, max_length=16)]


class SegmentAnswer(Message, tag=49, frozen=True):
    """Whether the peer has mapped a segment, and if not, why."""

    segment: Annotated[int, Meta(ge=1, lt=1 << 62)]
    is_mapped: bool
    text: Text
