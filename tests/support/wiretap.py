"""A relay between two ends of TCP connections that keeps what went through it."""

import select
import socket
import threading
from urllib.parse import urlsplit


class Wiretap:
    """Takes connections and passes their bytes on to somebody else.

    Parameters
    ----------
    address : str
        ``tcp://HOST:PORT`` of whom the bytes are for.

    Attributes
    ----------
    address : str
        Where to connect to instead.
    """

    def __init__(self, address: str) -> None:
        there = urlsplit(address)
        self._there = (str(there.hostname), int(there.port or 0))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._heard = bytearray()
        self._far, self._near = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="wiretap", daemon=True)

    def __enter__(self) -> "Wiretap":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._far.send(b"\0")
        self._thread.join()

    @property
    def heard(self) -> bytes:
        """Everything so far, in both directions."""
        return bytes(self._heard)

    def _run(self) -> None:
        other: dict[socket.socket, socket.socket] = {}
        while True:
            ready = select.select([self._near, self._listener, *other], [], [])[0]
            if self._near in ready:
                break
            for sock in ready:
                if sock is self._listener:
                    near, _ = sock.accept()
                    far = socket.create_connection(self._there)
                    other |= {near: far, far: near}
                elif sock in other:
                    self._pass_on(sock, other)
        for sock in (*other, self._listener, self._near, self._far):
            sock.close()

    def _pass_on(self, sock: socket.socket, other: dict[socket.socket, socket.socket]) -> None:
        try:
            data = sock.recv(1 << 16)
            other[sock].sendall(data)
        except OSError:
            data = b""
        self._heard += data
        if not data:
            far = other.pop(sock)
            del other[far]
            sock.close()
            far.close()
