"""Messages as bytes and back, for all processes of a simulated cluster together.

A view of a thousand members, which is sent to each of them whenever one joins, would otherwise be
there as bytes once for each that it is on its way to, and as an object once for each that has it:
memory as the cube and the square of the members. Small messages are read by each receiver anew, as
in reality, so that what one does to them is not seen by others.
"""

from treefold.wire import codec
from treefold.wire.messages import AnyMessage

SHARED_BYTES_MIN = 1024  # views of some 30 members
SHARED_MAX = 16  # different messages of that size that members receive at about one time


class Words:
    """Encodes a long message that goes to many once, and reads it once."""

    def __init__(self) -> None:
        self._said: AnyMessage | None = None
        self._bytes = b""
        self._read: dict[bytes, AnyMessage] = {}

    def encode(self, message: AnyMessage) -> bytes:
        """Header bytes of a message; the same object if it is the long message before."""
        if message is self._said:
            return self._bytes
        header = codec.encode(message)
        if len(header) >= SHARED_BYTES_MIN:
            self._said, self._bytes = message, header
        return header

    def decode(self, header: bytes) -> AnyMessage:
        """The message of a header; the same object for all who receive a long one."""
        if len(header) < SHARED_BYTES_MIN:
            return codec.decode(header)
        message = self._read.get(header)
        if message is None:
            message = codec.decode(header)
            if len(self._read) == SHARED_MAX:
                del self._read[next(iter(self._read))]
            self._read[header] = message
        return message
