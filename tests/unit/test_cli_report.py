"""``treefold report`` against strangers, links that are none, and an end in the middle."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.synthetic import LOOKING, Synthetic, served
from treefold.cli import report
from treefold.common import whole
from treefold.common.errors import AuthError, ConfigError, UnavailableError

OLD = b"the report of yesterday"


@contextmanager
def stranger(answer: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """Listens, and says this to whoever asks; gives the link and what was asked."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            near, _ = listener.accept()
            with near:
                asked.append(near.recv(1 << 16))
                near.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        host = f"http://127.0.0.1:{listener.getsockname()[1]}"
        yield f"{host}/#some-token", asked
        socket.create_connection(listener.getsockname()).close()
        thread.join()


@pytest.mark.parametrize(
    "answer",
    [
        b"\0\1 no HTTP at all\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\nhalf",
        b"HTTP/1.0 200 OK\r\n\r\n<html>something else",
        b"HTTP/1.0 500 No\r\n\r\n",
        b"",
    ],
)
def test_what_a_stranger_says_is_no_report_and_leaves_the_file(
    answer: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "run.html"
    file.write_bytes(OLD)
    with stranger(answer) as (link, _), pytest.raises(UnavailableError, match=r"127\.0\.0\.1"):
        report.main([str(file), link])
    assert file.read_bytes() == OLD


def test_the_token_goes_to_nobody_but_whom_the_link_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stranger(b"") as (proxy, heard), stranger(b"") as (other, told):
        monkeypatch.setenv("http_proxy", proxy.partition("#")[0])
        monkeypatch.setenv("no_proxy", "")
        moved = f"HTTP/1.0 302 Found\r\nLocation: {other.partition('#')[0]}\r\n\r\n".encode()
        with stranger(moved) as (link, asked), pytest.raises(UnavailableError, match="302"):
            report.main([str(tmp_path / "run.html"), link])
        assert asked[0].startswith(b"GET /report ")
        assert (heard, told) == ([], [])


@pytest.mark.parametrize(
    "link",
    [
        "http://127.0.0.1:1/", "https://127.0.0.1:1/#token", "http://[::1/#token",
        "http://127.0.0.1:http/#token", "http://127.0.0.1:99999/#token", "http:///#token",
        "http://127.0.0.1:1/#t\u20acken", "nonsense",
    ],
)  # fmt: skip
def test_a_link_that_is_none_is_refused_with_how_one_looks(link: str) -> None:
    with pytest.raises(ConfigError, match="http://HOST:PORT/#TOKEN"):
        report.fetch(link)


@pytest.mark.parametrize("host", ["a b", "no..name"])
def test_a_host_that_cannot_be_is_an_error_of_its_own(host: str) -> None:
    with pytest.raises(UnavailableError, match=host):
        report.fetch(f"http://{host}:1/#token")


def test_a_report_is_saved_whole_and_an_end_in_the_middle_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.html"
    with served(Synthetic(1, 1)) as (link, _):
        address = link.partition("#")[0]
        assert report.main([str(file), f"{address}#{LOOKING}"]) == 0
        saved = file.read_bytes()
        assert b'"is_live": false' in saved
        with pytest.raises(AuthError):
            report.main([str(file), f"{address}#wrong"])

    def interrupted(path: Path, body: bytes) -> int:
        with path.open("wb") as half:
            half.write(body[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        whole.write_whole(file, OLD)
    assert file.read_bytes() == saved
    assert list(tmp_path.iterdir()) == [file]
