"""How long a listener takes to answer, and how fast bytes get there and back.

See `treefold.wire.messages` for what holds for all messages.
"""

from typing import Annotated

from msgspec import Meta

from treefold.common.plan import Count
from treefold.wire.words import PROBE_BYTES_MAX, Message


class Probe(Message, tag=31, frozen=True):
    """Anybody who may ask for the status to a listener: answer with so many bytes."""

    call: Count
    answer_bytes: Annotated[int, Meta(ge=0, le=PROBE_BYTES_MAX)]
    body: Annotated[bytes, Meta(max_length=PROBE_BYTES_MAX)]


class ProbeSeen(Message, tag=32, frozen=True):
    """A listener's answer to a probe."""

    call: Count
    body: Annotated[bytes, Meta(max_length=PROBE_BYTES_MAX)]
