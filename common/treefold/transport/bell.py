"""What wakes a thread that waits for sockets."""

import socket


class Bell:
    """Wakes the thread that waits in `Hub.wait`. `ring` may be called from any thread."""

    def __init__(self) -> None:
        self._far, self._near = socket.socketpair()
        self._far.setblocking(False)
        self._near.setblocking(False)

    def fileno(self) -> int:
        """Descriptor that becomes readable when the bell rings."""
        return self._near.fileno()

    def ring(self) -> None:
        """Wake the waiting thread; a full pipe means that it is awake anyway."""
        try:
            self._far.send(b"\0")
        except (BlockingIOError, OSError):
            return

    def silence(self) -> None:
        """Forget all rings so far."""
        try:
            while self._near.recv(4096):
                pass
        except BlockingIOError:
            return

    def close(self) -> None:
        """Free the descriptors."""
        self._far.close()
        self._near.close()
