"""A small HTTP server: a thread for each request, and no more of them than it was told.

What metrics and the live page have in common. It knows nothing of what it shows.
"""

import contextlib
import io
import ipaddress
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from treefold.common.errors import ConfigError
from treefold.common.log import logger

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PATIENCE_S = 5.0  # for each piece of a request or of an answer
REQUEST_S = 10.0  # for a whole request: who sends a byte now and then holds a place as well
REQUEST_BYTES_MAX = 64 << 10  # of one, before anybody knows who asks
TOKEN_LETTERS_MIN = 16
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 # compared, not bound


class WebHandler(BaseHTTPRequestHandler):
    """Answers one request, which is neither endless nor endlessly slow."""

    protocol_version = "HTTP/1.0"  # one request for each connection
    server_version, sys_version = "treefold", ""
    timeout = PATIENCE_S
    rbufsize = 0

    def setup(self) -> None:
        """Bound what is read."""
        super().setup()
        self.rfile = io.BufferedReader(_Bounded(self.rfile))


class _Bounded(io.RawIOBase):
    """What a client sends, up to a size and a time."""

    def __init__(self, source: io.BufferedIOBase) -> None:
        self._source = source
        self._left = REQUEST_BYTES_MAX
        self._until = time.monotonic() + REQUEST_S

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int | None:
        if self._left <= 0 or time.monotonic() >= self._until:
            raise TimeoutError("a request is too long, or takes too long")
        count = self._source.readinto(buffer)
        self._left -= count or 0
        return count

    def close(self) -> None:
        self._source.close()
        super().close()


class WebServer(ThreadingMixIn, HTTPServer):
    """Listens, and answers a bounded number of requests at a time.

    Parameters
    ----------
    host : str
        Where to listen.
    port : int
        0 takes a free one.
    handler : type
        Answers one request.
    askers_max : int
        Requests at a time; more are closed at once.

    Raises
    ------
    OSError, OverflowError
        It cannot listen there.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, port: int, handler: type[WebHandler], askers_max: int) -> None:
        self._host = host
        self._free = threading.Semaphore(askers_max)
        self._is_closing = False
        self._thread: threading.Thread | None = None
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), handler)

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.server_address[1])

    def start(self, name: str) -> None:
        """Begin to answer, in a thread of this name."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening; requests that are being answered end by themselves."""
        self._is_closing = True
        host = EVERYWHERE.get(self._host, self._host)
        with contextlib.suppress(OSError):  # a thread that waits for somebody sees that it is over
            socket.create_connection((host, self.port), PATIENCE_S).close()
        if self._thread is not None:
            self._thread.join()
        self.server_close()

    def _run(self) -> None:
        while not self._is_closing:
            self.handle_request()

    def server_bind(self) -> None:
        """Bind, without looking up what the host is called, which may take long."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "treefold", self.server_address[1]

    def process_request(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: object
    ) -> None:
        """Answer in a thread, if there is one left."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: object
    ) -> None:
        """Answer."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away in the middle is nothing to print a trace for."""
        del request
        logger("web").debug("a request of %s failed", client_address, exc_info=True)


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(file: str, what: str) -> str:
    """A secret from a file.

    Parameters
    ----------
    file : str
        Its path.
    what : str
        What it is for, for the error.

    Raises
    ------
    ConfigError
        The file cannot be read, or the token is too short.
    """
    try:
        token = Path(file).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the token for {what} cannot be read: {error}") from error
    if len(token) < TOKEN_LETTERS_MIN:
        msg = f"the token in {file} has {len(token)} characters; {TOKEN_LETTERS_MIN} are the least"
        raise ConfigError(msg)
    return token


def told(host: str, advertise: str) -> str:
    """A host as others write it who are to connect to it.

    Parameters
    ----------
    host : str
        That was bound.
    advertise : str
        Address that others are told of this process; its host counts if every one was bound.
    """
    if host in EVERYWHERE:
        host = urlsplit(advertise).hostname or socket.gethostname()
    return f"[{host}]" if ":" in host else host
