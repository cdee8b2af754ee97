"""Bytes to messages and back: the only module that knows the encoding library.

A header is one MessagePack array whose first element is the message's tag. Anything that does not
decode to a message of `treefold.wire.messages` within its limits is a `RemoteProtocolError`;
nothing of it is used.
"""

from typing import Final

import msgspec

from treefold.common.errors import DataError, RemoteProtocolError
from treefold.common.layout import split_run
from treefold.wire.messages import AnyMessage, Pulled, Push

HEADER_BYTES_MAX = 64 << 20  # a table of a million tensors; checked before decoding
DATA_HEADER_BYTES_MAX = 4 << 20

_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final[msgspec.msgpack.Decoder[AnyMessage]] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    """Header bytes of a message."""
    return _encoder.encode(message)


def decode(header: bytes | bytearray | memoryview, bytes_max: int = HEADER_BYTES_MAX) -> AnyMessage:
    """Message of a header.

    Parameters
    ----------
    header : bytes-like
        The first frame, without the routing identity.
    bytes_max : int
        Longer headers are refused unread.

    Raises
    ------
    RemoteProtocolError
        The bytes are too many, are not MessagePack, or are not a message within its limits.
    """
    if len(header) > bytes_max:
        msg = f"header of {len(header)} bytes, at most {bytes_max} are allowed here"
        raise RemoteProtocolError(msg)
    try:
        return _decoder.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        msg = f"header is not a message: {error}"
        raise RemoteProtocolError(msg) from error


def check_payload(message: AnyMessage, payload_bytes: list[int]) -> None:
    """Check the sizes of the frames after the header against what the header announces.

    Raises
    ------
    RemoteProtocolError
        Another number of frames, or a frame of another size, than announced; or a run of parts that
        cannot have as many elements as it says.
    """
    expected: list[int] = []
    if isinstance(message, Push | Pulled) and message.frame is not None:
        frame = message.frame
        try:
            sizes = split_run(message.count, frame.elements)
        except DataError as error:
            name = type(message).__name__
            raise RemoteProtocolError(f"{name}: {error}") from error
        if not frame.segment:
            expected = [size * frame.dtype.itemsize for size in sizes]
    if payload_bytes != expected:
        name = type(message).__name__
        msg = f"{name} with payload frames of {payload_bytes} bytes, announced {expected}"
        raise RemoteProtocolError(msg)
