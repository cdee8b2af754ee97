"""Messages that wait to be sent: those to one peer leave together.

What an event leads to is often several small messages to the same peer, and sending and receiving
costs per message of ZeroMQ. They are put together until the loop is about to wait, or to do work
that takes long. Belongs to the thread that owns the sockets.
"""

from collections.abc import Hashable

import zmq

from treefold.transport.budgets import Purse
from treefold.transport.sockets import Hub
from treefold.wire.codec import BUNDLE_MAX, encode, encode_all
from treefold.wire.messages import AnyMessage

Address = tuple[Hashable, bytes | None]
"""A socket's name and, for a listener, the peer's routing identity."""


class Outbox:
    """Queues of messages by peer.

    Parameters
    ----------
    hub : Hub
        The sockets.

    Attributes
    ----------
    traffic : Traffic
        The hub's.
    lost : list of bytes
        Identities of peers that could not be reached since the list was last emptied.
    """

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self.traffic = hub.traffic
        self._queued: dict[Address, list[AnyMessage]] = {}
        self.lost: list[bytes] = []
        self._purse = Purse()

    def send(self, socket: Hashable, identity: bytes | None, message: AnyMessage) -> None:
        """Queue a message without a payload.

        Parameters
        ----------
        socket : hashable
            The hub's name of the socket.
        identity : bytes or None
            The peer, for a listener.
        message : AnyMessage
            What to say. Refusals and status documents to a peer that has had too many are left out.
        """
        if identity is not None and not self._purse.allows(identity, message):
            return
        address = (socket, identity)
        queued = self._queued.get(address)
        if queued is None:
            self._queued[address] = [message]
            return
        queued.append(message)
        if len(queued) == BUNDLE_MAX:
            del self._queued[address]
            self._leave(address, queued)

    def send_frame(
        self, socket: Hashable, identity: bytes | None, message: AnyMessage, frame: memoryview
    ) -> list[zmq.MessageTracker] | None:
        """Send a message with a payload, after what is queued; see `Hub.send_frame`."""
        address = (socket, identity)
        queued = self._queued.pop(address, None)
        if queued is not None:
            self._leave(address, queued)
        return self._hub.send_frame(socket, identity, encode(message), frame)

    def flush(self) -> None:
        """Send everything that is queued."""
        if self._queued:
            queued, self._queued = self._queued, {}
            for address, messages in queued.items():
                self._leave(address, messages)

    def _leave(self, address: Address, messages: list[AnyMessage]) -> None:
        socket, identity = address
        if not self._hub.send(socket, identity, encode_all(messages)) and identity is not None:
            self.lost.append(identity)
