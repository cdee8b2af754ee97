"""Questions to a listener, such as the scheduler, from a process that is no member of the cluster.

Tensors do not travel here, so this module does without torch: a command that only asks for the
status starts in a fraction of the time.
"""

import zmq

from treefold.common.address import is_ipv6
from treefold.common.errors import ConfigError

REPLY_BYTES_MAX = 64 << 20  # as much as any control message may have
RECONNECT_MS = 50
RECONNECT_MAX_MS = 1_000


class Requester:
    """One link to a listener. Belongs to one thread.

    Parameters
    ----------
    address : str
        Of the listener, which need not be there yet.

    Raises
    ------
    ConfigError
        The address is malformed.
    """

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        options = {
            zmq.LINGER: 0,
            zmq.MAXMSGSIZE: REPLY_BYTES_MAX,
            zmq.RECONNECT_IVL: RECONNECT_MS,
            zmq.RECONNECT_IVL_MAX: RECONNECT_MAX_MS,
            zmq.IPV6: int(is_ipv6(address)),
        }
        for option, value in options.items():
            self._socket.setsockopt(option, value)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            msg = f"{address!r} is not an address that can be connected to: {error}"
            raise ConfigError(msg) from error

    def send(self, header: bytes) -> None:
        """Send one message without a payload; it waits for the listener if need be."""
        self._socket.send(header)

    def receive(self, timeout_ms: int) -> bytes | None:
        """Header of the next message, None if there is none within ``timeout_ms``."""
        if not self._socket.poll(timeout_ms):
            return None
        return self._socket.recv_multipart()[0]

    def close(self) -> None:
        """Close the link; questions that were not sent yet are forgotten."""
        self._socket.close(0)
        self._context.term()
