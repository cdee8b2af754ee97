"""Questions to a listener, such as the scheduler, from a process that is no member of the cluster.

Tensors do not travel here, so this module does without torch: a command that only asks for the
status starts in a fraction of the time.
"""

import time

import zmq

from treefold.common.address import is_ipv6
from treefold.common.errors import AuthError
from treefold.transport.access import Access
from treefold.transport.links import Link, Step
from treefold.wire.messages import AnyMessage, Refused
from treefold.wire.permissions import KeyRole
from treefold.wire.words import Code

REPLY_BYTES_MAX = 64 << 20  # as much as any control message may have
RECONNECT_MS = 50
RECONNECT_MAX_MS = 1_000


def check_allowed(address: str, message: AnyMessage) -> None:
    """Raise what a listener's refusal means.

    Raises
    ------
    AuthError
        This process's key does not allow what it asked for.
    """
    if isinstance(message, Refused) and message.code is Code.NOT_ALLOWED:
        raise AuthError(f"{address} refuses this process: {message.text}")


class Requester:
    """One link to a listener. Belongs to one thread.

    Parameters
    ----------
    address : str
        Of the listener, which need not be there yet.
    access : Access, optional
        This process's keys.
    role : KeyRole
        What the listener has to be.

    Raises
    ------
    ConfigError
        The address is malformed.
    """

    def __init__(
        self, address: str, access: Access | None = None, role: KeyRole = KeyRole.SCHEDULER
    ) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        options: dict[int, int] = {
            zmq.LINGER: 0,
            zmq.MAXMSGSIZE: REPLY_BYTES_MAX,
            zmq.RECONNECT_IVL: RECONNECT_MS,
            zmq.RECONNECT_IVL_MAX: RECONNECT_MAX_MS,
            zmq.IPV6: int(is_ipv6(address)),
        }
        try:
            self._link = Link(self._context, address, options, access, role)
        except BaseException:
            self._context.term()
            raise

    def send(self, header: bytes) -> None:
        """Send one message without a payload; it waits for the listener if need be."""
        self._link.socket.send(header)

    def receive(self, timeout_ms: int) -> bytes | None:
        """Header of the next message, None if there is none within ``timeout_ms``.

        Raises
        ------
        AuthError
            The listener refuses this process, or has not shown a right key itself.
        """
        deadline_ns = time.monotonic_ns() + timeout_ms * 1_000_000
        while True:
            link, poller = self._link, zmq.Poller()
            poller.register(link.socket, zmq.POLLIN)
            if link.monitor is not None:
                poller.register(link.monitor, zmq.POLLIN)
            left_ms = max(0, (deadline_ns - time.monotonic_ns()) // 1_000_000)
            ready = dict(poller.poll(left_ms))
            if link.socket in ready:
                return link.socket.recv_multipart()[0]
            step = link.look()
            if step is Step.REFUSED:
                raise AuthError(link.refusal)
            if step is Step.REOPEN or (link.due_ns and time.monotonic_ns() >= link.due_ns):
                link.reopen()
                return None  # what was sent is lost with the old socket: ask again
            if not left_ms:
                return None

    def close(self) -> None:
        """Close the link; questions that were not sent yet are forgotten."""
        self._link.close()
        self._context.term()
