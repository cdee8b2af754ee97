"""The HTTP server of the live page: its files, the feed, the report, and the drain button.

Threads of its own; it knows nothing of the scheduler but what it is handed. The files are no secret
and anybody may load them. Whatever is about the job needs a bearer token in a header, which a page
of another origin cannot send: so there is no cookie that could be abused.
"""

import contextlib
import hmac
import ipaddress
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from http import HTTPStatus
from importlib import resources
from urllib.parse import urlsplit

from treefold.common.audit import Audit
from treefold.common.errors import UnavailableError
from treefold.common.log import logger
from treefold.scheduler.feed import VIEWERS_MAX, Feed
from treefold.transport.web import PATIENCE_S, WebHandler, WebServer

ASKERS_MAX = VIEWERS_MAX + 16  # a browser asks for the files of a page all at once
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "txt": "text/plain"}
SCRIPTS = (
    "uplot.js", "feed.js", "model.js", "curves.js", "lanes.js", "cluster.js", "tables.js",
    "main.js",
)  # fmt: skip
"""In the order in which they are loaded, and put into a report."""
STYLES = ("uplot.css", "page.css")
INDEX, LICENCE = "index.html", "uplot-licence.txt"
FILES = (INDEX, LICENCE, *STYLES, *SCRIPTS)
DRAIN = "/drain/"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Right(IntEnum):
    """What whoever asks may do."""

    NOTHING = 0
    LOOK = 1
    DRAIN = 2


@dataclass(slots=True)
class Desk:
    """What the server of the page is handed.

    Attributes
    ----------
    feed : Feed
        Where documents come from.
    begin : callable
        The document that a page begins with.
    report : callable
        The whole page as one file.
    drain : callable
        Asks for a member to be drained, by its name; returns the reason why not, or nothing.
    rights : dict of str to Right
        By token.
    host : str
        By which this machine is called in the link.
    audit : Audit or None
        Where it is written down who has drained whom.
    """

    feed: Feed
    begin: Callable[[], bytes]
    report: Callable[[], bytes]
    drain: Callable[[str], str]
    rights: dict[str, Right]
    host: str
    audit: Audit | None = None
    files: dict[str, bytes] = field(default_factory=dict)


class PageServer(WebServer):
    """Serves the page.

    Parameters
    ----------
    host : str
        Where to listen.
    port : int
        0 takes a free one.
    desk : Desk
        What it answers with.
    """

    def __init__(self, host: str, port: int, desk: Desk) -> None:
        self.desk = desk
        super().__init__(host, port, _Handler, ASKERS_MAX)


def file(name: str) -> bytes:
    """A file of the page, as it was installed."""
    return (resources.files("treefold.scheduler") / "page" / name).read_bytes()


class _Handler(WebHandler):
    """One request."""

    server: PageServer
    _right = Right.NOTHING

    def do_GET(self) -> None:  # noqa: N802 # as it is inherited
        """Answer a request for a file, the feed, or the report."""
        path = self.path.partition("?")[0]
        name = path.removeprefix("/") or INDEX
        if not self._is_called_right():
            return
        if name in FILES:
            files = self.server.desk.files
            files[name] = body = files.get(name) or file(name)
            self._say(HTTPStatus.OK, body, TYPES[name.rpartition(".")[2]])
        elif path not in ("/feed", "/report"):
            self._say(HTTPStatus.NOT_FOUND, b"there is no such page\n")
        elif self._may(Right.LOOK):
            self._tell(self._stream if path == "/feed" else self._report)

    def do_POST(self) -> None:  # noqa: N802 # as it is inherited
        """Drain a member."""
        path = self.path.partition("?")[0]
        if not self._is_called_right():
            return
        if not path.startswith(DRAIN):
            self._say(HTTPStatus.NOT_FOUND, b"there is no such thing to do\n")
        elif self._may(Right.DRAIN):
            self._tell(lambda: self._drain(path.removeprefix(DRAIN)))

    # ---- who asks --------------------------------------------------------------------------------

    def _is_called_right(self) -> bool:
        """Whether this machine was called by a name of its own.

        A page of somebody else can let its own name point here, and a browser would take us for it.
        """
        with contextlib.suppress(ValueError):  # brackets that do not belong there
            name = urlsplit("//" + self.headers.get("Host", "")).hostname or ""
            known = ("localhost", socket.gethostname().lower(), self.server.desk.host.lower())
            if name in known or _is_number(name):
                return True
        self._say(HTTPStatus.MISDIRECTED_REQUEST, b"this is not the host that was asked for\n")
        return False

    def _may(self, wanted: Right) -> bool:
        given = self.headers.get("Authorization", "").encode("latin-1", "replace")
        right = Right.NOTHING
        for token, one in self.server.desk.rights.items():
            if hmac.compare_digest(given, f"Bearer {token}".encode()):
                right = max(right, one)
        self._right = right
        if right >= wanted:
            return True
        what, audit = self.path.partition("?")[0], self.server.desk.audit
        if audit is not None:
            audit.deny("page", f"{self.command} {what}", who=("", "", self._where()))
        status = HTTPStatus.FORBIDDEN if right else HTTPStatus.UNAUTHORIZED
        text = b"this token may only look\n" if right else b"the token of the link is needed\n"
        self._say(status, text)
        return False

    def _where(self) -> str:
        return str(self.client_address[0])

    # ---- what is answered ------------------------------------------------------------------------

    def _tell(self, answer: Callable[[], None]) -> None:
        try:
            answer()
        except UnavailableError as error:
            self._say(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n".encode())

    def _stream(self) -> None:
        """Server-sent events, until somebody goes."""
        desk = self.server.desk
        with desk.feed.viewer() as is_welcome:
            if not is_welcome:
                text = f"{VIEWERS_MAX} pages are open already\n"
                self._say(HTTPStatus.SERVICE_UNAVAILABLE, text.encode())
                return
            documents = desk.feed.documents(PATIENCE_S)
            first = desk.begin()
            self._head(HTTPStatus.OK, "text/event-stream")
            may = {"may_drain": self._right is Right.DRAIN}
            self._send_event("rights", json.dumps(may).encode())
            self._send_event("begin", first)
            for body in documents:
                self._send_event("news", body)
            self._send_event("end", b"{}")

    def _send_event(self, kind: str, body: bytes) -> None:
        # A document is one line; a comment keeps a connection that has nothing to say.
        text = b"event: %s\ndata: %s\n\n" % (kind.encode(), body) if body else b": still here\n\n"
        self.wfile.write(text)
        self.wfile.flush()

    def _report(self) -> None:
        self._say(HTTPStatus.OK, self.server.desk.report(), TYPES["html"])

    def _drain(self, member: str) -> None:
        desk = self.server.desk
        refusal = desk.drain(member)
        who = ("", "page", self._where())
        if desk.audit is not None and refusal:
            desk.audit.deny("DrainRequest", f"{member}: {refusal}", who=who)
        elif desk.audit is not None:
            desk.audit.note("DrainRequest", member, who=who)
        body = json.dumps({"member": member, "refusal": refusal}).encode()
        self._say(HTTPStatus.CONFLICT if refusal else HTTPStatus.OK, body, "application/json")

    def _head(self, status: HTTPStatus, kind: str, length: int | None = None) -> None:
        self.send_response(status)
        if status is HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()

    def _say(self, status: HTTPStatus, body: bytes, kind: str = "text/plain") -> None:
        self._head(status, kind, len(body))
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 # as it is inherited
        """Say what was asked for, to those who look for it."""
        logger("page").debug(format, *args)


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
