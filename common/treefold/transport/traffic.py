"""What has gone to and come from each peer: messages, and bytes by the way that they took."""

from collections.abc import Hashable
from dataclasses import dataclass

PEERS_COUNTED_MAX = 4_096  # those beyond are counted together


@dataclass(slots=True)
class Way:
    """One direction.

    Attributes
    ----------
    messages : int
        Whole messages.
    header_bytes, payload_bytes : int
        Bytes of first frames, and of the frames after them.
    shared_bytes : int
        Bytes of payloads that lay in shared memory, of which a message only says where.
    """

    messages: int = 0
    header_bytes: int = 0
    payload_bytes: int = 0
    shared_bytes: int = 0

    def add(self, header: int, payload: int) -> None:
        """Count one message."""
        self.messages += 1
        self.header_bytes += header
        self.payload_bytes += payload


class Traffic:
    """Counts of one process, by socket and peer.

    Attributes
    ----------
    sent, received : dict
        By name of the socket and peer: the routing identity for a listener, the socket's name again
        for a link. None stands for all peers for which there was no more room.
    cut : int
        Connections that were closed because they brought too much.
    """

    def __init__(self) -> None:
        self.sent: dict[tuple[Hashable, Hashable], Way] = {}
        self.received: dict[tuple[Hashable, Hashable], Way] = {}
        self.cut = 0

    def to(self, socket: Hashable, peer: Hashable) -> Way:
        """What has been sent to a peer."""
        return self.sent.get((socket, peer)) or _new(self.sent, socket, peer)

    def of(self, socket: Hashable, peer: Hashable) -> Way:
        """What has been received from a peer."""
        return self.received.get((socket, peer)) or _new(self.received, socket, peer)


def _new(ways: dict[tuple[Hashable, Hashable], Way], socket: Hashable, peer: Hashable) -> Way:
    key = (socket, peer if len(ways) < PEERS_COUNTED_MAX else None)
    return ways.setdefault(key, Way())
