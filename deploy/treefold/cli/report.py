"""``treefold report``: save a run so far as one page that opens without any network."""

import sys
from http import HTTPStatus
from http.client import HTTP_PORT, HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

from treefold.cli.flags import Parser
from treefold.common.errors import AuthError, ConfigError, UnavailableError
from treefold.common.whole import write_whole
from treefold.launch.runtime import running

DESCRIPTION = (
    "Save everything that the live page of a job shows, from the beginning on, as one file that a "
    "browser opens without any network. Without LINK: of the job that this user runs on this "
    "machine. `treefold run --report FILE` saves the same when the job is over."
)
ANSWER_S = 30.0
TEXT_MAX = 200  # of what somebody says who has no report
MARK = b'id="recorded"'  # of the element with the data


def main(words: list[str]) -> int:
    """Save a report.

    Parameters
    ----------
    words : list of str
        The command line after ``treefold report``.

    Returns
    -------
    int
        0 if it is saved.
    """
    parser = Parser("report", DESCRIPTION, [])
    parser.add_argument("file", metavar="FILE", help="where it goes, such as run.html")
    parser.add_argument("link", metavar="LINK", nargs="?", help="of the live page, with its #")
    options, _ = parser.read(words)
    page = fetch(options.link or found_link())
    try:
        write_whole(Path(options.file), page)
    except OSError as error:
        raise ConfigError(f"the report cannot be written: {error}") from error
    sys.stdout.write(f"{options.file}: {len(page):,} bytes\n")
    return 0


def found_link() -> str:
    """The link to the live page of the one job of this user on this machine.

    Raises
    ------
    ConfigError
        There is none, or there are several.
    """
    links = [note.link for note in running() if note.link]
    if not links:
        msg = "no job with a live page runs here; say which one with the link that its start showed"
        raise ConfigError(msg)
    if len(links) > 1:
        lines = "".join(f"\n  treefold report FILE '{link}'" for link in links)
        raise ConfigError(f"{len(links)} jobs with a live page run here; say which one:{lines}")
    return links[0]


def fetch(link: str) -> bytes:
    """Ask the scheduler for its report.

    Parameters
    ----------
    link : str
        Of the live page, with the token behind the #.

    Raises
    ------
    ConfigError
        It is no such link.
    AuthError
        The token is not the right one.
    UnavailableError
        Nobody answers there, or somebody who has no report.
    """
    host, port, token = _parts(link)
    headers = {"Authorization": f"Bearer {token}"}
    try:
        # No proxy and no redirection: whoever has the token may drain.
        connection = HTTPConnection(host, port, timeout=ANSWER_S)
        try:
            connection.request("GET", "/report", headers=headers)
            answer = connection.getresponse()
            status, body = answer.status, answer.read()
        finally:
            connection.close()
    except OSError as error:
        raise UnavailableError(f"nobody answers at {host}:{port}: {error}") from error
    except (HTTPException, UnicodeError) as error:
        text = f"{host}:{port} does not answer as a live page does: {error!r}"
        raise UnavailableError(text) from error
    if status != HTTPStatus.OK or MARK not in body:
        text = body[:TEXT_MAX].decode(errors="replace").strip()
        is_refused = status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
        kind = AuthError if is_refused else UnavailableError
        raise kind(f"{host}:{port} does not give a report (status {status}): {text}")
    return body


def _parts(link: str) -> tuple[str, int, str]:
    """Host, port and token of a link."""
    try:
        where = urlsplit(link)
        host, port, token = where.hostname or "", where.port or HTTP_PORT, where.fragment
    except ValueError:  # brackets, or a port that is no number
        where, host, port, token = urlsplit(""), "", 0, ""
    is_token = bool(token) and token.isascii() and token.isprintable()
    if not host or where.scheme != "http" or not is_token:
        msg = f"{link!r} is no link to a live page, which is http://HOST:PORT/#TOKEN"
        raise ConfigError(msg)
    return host, port, token
