"""A small HTTP server against those who send too much, or too slowly."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

import pytest

from treefold.transport import web
from treefold.transport.web import REQUEST_BYTES_MAX, WebHandler, WebServer

LINES = 90  # http.client has a bound of its own: 100 headers, each as long as a whole request


class Hello(WebHandler):
    """Says that it has understood."""

    def do_GET(self) -> None:  # noqa: N802 # as it is inherited
        """Answer."""
        self.send_response(HTTPStatus.OK)
        self.end_headers()


@contextmanager
def connected() -> Iterator[socket.socket]:
    """A connection to a server."""
    server = WebServer("127.0.0.1", 0, Hello, 4)
    server.start("web")
    try:
        with socket.create_connection(("127.0.0.1", server.port), 10) as near:
            yield near
    finally:
        server.stop()


def test_a_request_is_answered() -> None:
    with connected() as near:
        near.sendall(b"GET / HTTP/1.0\r\nX: " + b"a" * (REQUEST_BYTES_MAX // 2) + b"\r\n\r\n")
        assert near.recv(15) == b"HTTP/1.0 200 OK"


def test_a_request_that_is_too_long_is_not_kept_to_its_end() -> None:
    with connected() as near, pytest.raises(ConnectionError):
        ask_at_length(near)


def ask_at_length(near: socket.socket) -> None:
    """A request that http.client alone would take."""
    near.sendall(b"GET / HTTP/1.0\r\n")
    for number in range(LINES):
        near.sendall(b"X%d: " % number + b"a" * 60_000 + b"\r\n")
    near.sendall(b"\r\n")
    if not near.recv(15):
        raise ConnectionResetError


def test_who_sends_a_byte_now_and_then_does_not_hold_a_place_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(web, "REQUEST_S", 0.2)
    with connected() as near, pytest.raises(ConnectionError):
        ask_slowly(near)


def ask_slowly(near: socket.socket) -> None:
    """A header that goes on for five seconds."""
    tick = threading.Event()
    near.sendall(b"GET / HTTP/1.0\r\nX: ")
    for _ in range(100):
        near.sendall(b"a")
        tick.wait(0.05)
