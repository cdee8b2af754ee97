"""A peer that begins a message and never ends it, by hand: ZeroMQ itself would keep all of it."""

import contextlib
import socket
from collections.abc import Callable

GREETING = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\0NULL" + bytes(16) + b"\0" + bytes(31)
READY = b"\x05READY\x0bSocket-Type\0\0\0\x06DEALER"
MORE, LARGE = 1, 2  # flags of a frame
MIB = 1 << 20
FRAMES = {
    "large": bytes([MORE | LARGE]) + MIB.to_bytes(8, "big") + bytes(MIB),
    "empty": bytes([MORE, 0]) * (1 << 15),
    "old": b"\xff" + (MIB + 1).to_bytes(8, "big") + bytes([MORE]) + bytes(MIB),
}
OLD_GREETING = bytes([1, 0])  # of ZMTP 1.0, of whose messages ZeroMQ does not say where from


def endless(
    address: str, kind: str, nbytes_max: int, done: Callable[[], None] = lambda: None
) -> int:
    """Send frames of a message, so many bytes at most, until the other side closes the connection.

    Calls ``done`` when all of them are sent.

    Returns
    -------
    int
        Bytes that were sent.
    """
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    frames, sent = memoryview(FRAMES[kind]), 0
    with socket.create_connection((host, int(port))) as raw, contextlib.suppress(OSError):
        _greet(raw, kind)
        while sent < nbytes_max:
            sent += raw.send(frames[sent % len(frames) :][: nbytes_max - sent])
        done()
        while raw.recv(1_024):
            pass
    return sent


def _greet(raw: socket.socket, kind: str) -> None:
    if kind == "old":
        raw.sendall(OLD_GREETING)
        return
    raw.sendall(GREETING + b"\x04" + bytes([len(READY)]) + READY)
    raw.recv(len(GREETING), socket.MSG_WAITALL)
    _, nbytes = raw.recv(2, socket.MSG_WAITALL)
    raw.recv(nbytes, socket.MSG_WAITALL)  # it is ready, too
