"""Bytes to messages and back: the only module that knows the encoding library.

A header is one MessagePack array whose first element is the message's tag. Anything that does not
decode to a message of `treefold.wire.messages` within its limits is a `RemoteProtocolError`;
nothing of it is used.
"""

from collections.abc import Sequence
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from treefold.common.errors import DataError, RemoteProtocolError
from treefold.common.layout import split_run
from treefold.wire.chain import UnitCopy
from treefold.wire.messages import AnyMessage, Pulled, Push
from treefold.wire.words import RUN_BYTES_MAX, Message

HEADER_BYTES_MAX = 64 << 20  # a table of a million tensors; checked before decoding
DATA_HEADER_BYTES_MAX = 4 << 20
BUNDLE_MAX = 64  # messages in one header
WITH_PAYLOAD = (Push, Pulled, UnitCopy)


class Bundle(Message, tag=50, frozen=True):
    """Messages of one sender to one receiver, to be taken in one after the other.

    None of them has a payload.
    """

    messages: Annotated[list[AnyMessage], Meta(min_length=1, max_length=BUNDLE_MAX)]


Header = AnyMessage | Bundle

_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final[msgspec.msgpack.Decoder[Header]] = msgspec.msgpack.Decoder(Header)


def encode(message: AnyMessage) -> bytes:
    """Header bytes of a message."""
    return _encoder.encode(message)


def encode_all(messages: list[AnyMessage]) -> bytes:
    """Header bytes of messages without a payload, in this order."""
    return _encoder.encode(messages[0] if len(messages) == 1 else Bundle(messages))


def decode(header: bytes | bytearray | memoryview, bytes_max: int = HEADER_BYTES_MAX) -> AnyMessage:
    """The one message of a header; otherwise as `decode_all`."""
    messages = decode_all(header, bytes_max)
    if len(messages) > 1:
        raise RemoteProtocolError(f"{len(messages)} messages where one is expected")
    return messages[0]


def decode_all(
    header: bytes | bytearray | memoryview, bytes_max: int = HEADER_BYTES_MAX
) -> Sequence[AnyMessage]:
    """Messages of a header, in order.

    Parameters
    ----------
    header : bytes-like
        The first frame, without the routing identity.
    bytes_max : int
        Longer headers are refused unread.

    Raises
    ------
    RemoteProtocolError
        The bytes are too many, are not MessagePack, or are not messages within their limits.
    """
    if len(header) > bytes_max:
        msg = f"header of {len(header)} bytes, at most {bytes_max} are allowed here"
        raise RemoteProtocolError(msg)
    try:
        found = _decoder.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        msg = f"header is not a message: {error}"
        raise RemoteProtocolError(msg) from error
    return found.messages if isinstance(found, Bundle) else (found,)


def check_payload(message: AnyMessage, payload_bytes: list[int]) -> None:
    """Check the sizes of the frames after the header against what the header announces.

    Raises
    ------
    RemoteProtocolError
        More or fewer frames, or a frame of another size, than announced; or a run of parts that
        cannot have as many elements as it says.
    """
    expected: list[int] = []
    if isinstance(message, WITH_PAYLOAD) and message.frame is not None:
        frame = message.frame
        if frame.nbytes > RUN_BYTES_MAX:
            msg = f"a payload of {frame.nbytes} bytes, at most {RUN_BYTES_MAX} are allowed"
            raise RemoteProtocolError(msg)
        try:
            split_run(message.count, frame.elements)
        except DataError as error:
            name = type(message).__name__
            raise RemoteProtocolError(f"{name}: {error}") from error
        if not frame.segment:
            expected = [frame.nbytes]
    if payload_bytes != expected:
        name = type(message).__name__
        msg = f"{name} with payload frames of {payload_bytes} bytes, announced {expected}"
        raise RemoteProtocolError(msg)
