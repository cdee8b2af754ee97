"""Answers ZeroMQ's question whether a key may connect (ZAP, ZeroMQ RFC 27), in a thread.

In a thread of its own, so that who is refused hears of it while the process computes.
"""

import threading
from typing import TYPE_CHECKING

import zmq
from zmq.utils import z85

from treefold.common.audit import Audit
from treefold.common.log import logger
from treefold.transport.access import Access
from treefold.transport.bell import Bell

if TYPE_CHECKING:
    from treefold.transport.sockets import Context

ENDPOINT = "inproc://zeromq.zap.01"
DOMAIN = b"treefold"
CURVE = b"CURVE"
WORDS = 7  # of a request with one credential
REFUSED_SAID_MAX = 20  # then only the audit log hears of it


class Doorman:
    """Lets in whose key is allowed.

    Parameters
    ----------
    context : Context
        Whose listeners are guarded.
    access : Access
        Says who is allowed.
    audit : Audit, optional
        Told of everybody.
    """

    def __init__(self, context: "Context", access: Access, audit: Audit | None) -> None:
        self._access = access
        self._audit = audit
        self._log = logger("transport")
        self._refused = 0
        self._socket = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(ENDPOINT)
        self._bell = Bell()
        self._thread = threading.Thread(target=self._run, name="treefold-zap", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; from now on nobody is let in."""
        self._bell.ring()
        self._thread.join()
        self._bell.close()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._bell.fileno(), zmq.POLLIN)
        while self._bell.fileno() not in (ready := dict(poller.poll())):
            if self._socket in ready:
                self._socket.send_multipart(self._answer(self._socket.recv_multipart()))
        self._socket.close(0)

    def _answer(self, words: list[bytes]) -> list[bytes]:
        head = words[:2]  # version, number of the request
        where = words[3].decode(errors="replace") if len(words) > 3 else ""
        is_curve = len(words) == WORDS and words[5] == CURVE
        public = z85.encode(words[6]).decode() if is_curve and len(words[6]) == 32 else ""
        self._access.refresh(is_urgent=True)
        entry = self._access.entry(public)
        if entry is None:
            text = f"the key {public or '(none)'} is not on the allow-list"
            self._refused += 1
            if self._refused <= REFUSED_SAID_MAX:
                self._log.warning("refused a connection from %s: %s", where, text)
            if self._audit is not None:
                self._audit.deny("connect", text, who=("", "", where))
            return [*head, b"400", b"not allowed", b"", b""]
        if self._audit is not None:
            self._audit.note("connect", who=(entry.name, entry.role, where))
        return [*head, b"200", b"", public.encode(), b""]
