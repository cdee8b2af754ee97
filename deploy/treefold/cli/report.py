"""``treefold report``: save a run so far as one page that opens without any network."""

import sys
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from treefold.cli.flags import Parser
from treefold.common.errors import AuthError, ConfigError, UnavailableError
from treefold.launch.runtime import running

DESCRIPTION = (
    "Save everything that the live page of a job shows, from the beginning on, as one file that a "
    "browser opens without any network. Without LINK: of the job that this user runs on this "
    "machine. `treefold run --report FILE` saves the same when the job is over."
)
ANSWER_S = 30.0


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
        Path(options.file).write_bytes(page)
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
        Nobody answers there.
    """
    where = urlsplit(link)
    if where.scheme != "http" or not where.hostname or not where.fragment:
        msg = f"{link!r} is no link to a live page, which is http://HOST:PORT/#TOKEN"
        raise ConfigError(msg)
    headers = {"Authorization": f"Bearer {where.fragment}"}
    request = urllib.request.Request(f"http://{where.netloc}/report", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:  # noqa: S310 # as above
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace").strip()
        error.close()
        kind = AuthError if error.code in (401, 403) else UnavailableError
        raise kind(f"{where.netloc} does not give a report: {text}") from error
    except OSError as error:
        raise UnavailableError(f"nobody answers at {where.netloc}: {error}") from error
