"""Connections with keys: who is let in, who hears why not, and what is seen on the wire."""

import json
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import zmq

from tests.support.wiretap import Wiretap
from treefold.cli.drain import ask
from treefold.cli.keys import main as keys
from treefold.common.config import Settings
from treefold.common.errors import AuthError, ConfigError
from treefold.launch.link import StatusLink, fetch
from treefold.scheduler.shell import SchedulerShell
from treefold.transport import links, sockets
from treefold.transport.access import Access
from treefold.transport.sockets import Arrival, Hub
from treefold.wire.messages import Refused
from treefold.wire.permissions import KeyRole
from treefold.wire.words import Code, Outcome

IN_TIME_S = 2.0  # within which who is refused has to hear of it
ANSWER_MS = 10_000
FRAME_MAX = 1 << 20
SECRET = bytes(range(1, 200)) * 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    keys(["init", str(tmp_path / "keys")])
    return tmp_path / "keys"


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """Keys of somebody else, who knows this cluster's listeners."""
    keys(["init", str(tmp_path / "others")])
    return tmp_path / "others"


def settings(**values: object) -> Settings:
    return Settings(bind="tcp://127.0.0.1:0", **values)  # type: ignore[arg-type] # any of them


def know(folder: Path, listeners: Path) -> Path:
    """Let a folder of keys take a scheduler's key for right."""
    lines = (listeners / "allowed").read_text().splitlines(keepends=True)
    own = (folder / "allowed").read_text().splitlines(keepends=True)
    right = [line for line in lines if line.startswith("scheduler")]
    (folder / "allowed").write_text(
        "".join([line for line in own if "scheduler" not in line] + right)
    )
    return folder


class Running:
    """A scheduler in a thread."""

    def __init__(self, **values: object) -> None:
        self.shell = SchedulerShell(settings(**values))
        self.address = self.shell.address
        self._thread = threading.Thread(target=self.shell.run)
        self._thread.start()

    def stop(self) -> None:
        self.shell.stop(Outcome.DRAINED, "")
        self._thread.join()


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """Starts schedulers."""
    made: list[Running] = []

    def begin(**values: object) -> Running:
        made.append(Running(**values))
        return made[-1]

    yield begin
    for one in made:
        one.stop()


def access(folder: Path, *roles: KeyRole) -> Access:
    return Access(str(folder), roles)


# ---- who is refused ------------------------------------------------------------------------------


def refusal(address: str, who: Access | None) -> str:
    """What one is told who asks for the status; in time."""
    begun = time.monotonic()
    with pytest.raises(AuthError) as caught:
        fetch(address, ANSWER_MS, who)
    assert time.monotonic() - begun < IN_TIME_S
    return str(caught.value)


def test_who_has_a_key_and_the_right_role_is_answered(
    folder: Path, start: Callable[..., Running]
) -> None:
    job = start(keys=str(folder))
    for role in (KeyRole.OBSERVER, KeyRole.ADMIN, KeyRole.WORKER):
        assert json.loads(fetch(job.address, ANSWER_MS, access(folder, role)))["phase"] == "forming"


def test_a_client_without_keys_is_told_so_in_time(
    folder: Path, start: Callable[..., Running]
) -> None:
    text = refusal(start(keys=str(folder)).address, None)
    assert "takes connections with keys only; pass --keys" in text


def test_a_client_with_an_unknown_key_is_told_so_in_time(
    folder: Path, others: Path, start: Callable[..., Running]
) -> None:
    stranger = access(know(others, folder), KeyRole.OBSERVER)
    text = refusal(start(keys=str(folder)).address, stranger)
    assert f"observer, {stranger.key.public}) is not on its allow-list" in text


def test_a_listener_with_an_unknown_key_is_not_spoken_to(
    folder: Path, others: Path, start: Callable[..., Running]
) -> None:
    text = refusal(start(keys=str(folder)).address, access(others, KeyRole.OBSERVER))
    assert "has no key that the allow-list" in text


def test_a_client_with_keys_does_not_speak_to_a_listener_without(
    folder: Path, start: Callable[..., Running]
) -> None:
    text = refusal(start().address, access(folder, KeyRole.OBSERVER))
    assert "does not use keys" in text


def test_what_a_role_may_not_do_is_refused_with_the_reason(
    folder: Path, start: Callable[..., Running]
) -> None:
    job = start(keys=str(folder))
    text = "observer may not send DrainRequest, only admin or server may"
    with pytest.raises(AuthError, match=text):
        ask(job.address, "server-0", access(folder, KeyRole.OBSERVER))
    answer = ask(job.address, "server-0", access(folder, KeyRole.ADMIN))
    assert isinstance(answer, Refused)
    assert answer.code is not Code.NOT_ALLOWED  # there is no such server, which is another matter


# ---- keys come and go ----------------------------------------------------------------------------


class Door:
    """A listener and somebody who has a link to it, in one thread."""

    def __init__(self, folder: Path, who: Access, address: str = "tcp://127.0.0.1:0") -> None:
        self.listener = Hub(access=access(folder, KeyRole.SCHEDULER))
        self.link = Hub(access=who)
        self.address = self.listener.listen(
            "door", address, insecure=False, frame_bytes_max=FRAME_MAX
        )

    def connect(self, address: str) -> None:
        self.link.connect("there", address, FRAME_MAX, KeyRole.SCHEDULER)

    def pass_on(self, header: bytes, payload: bytes = b"") -> Arrival:
        """Send until it arrives."""
        arrivals: list[Arrival] = []
        deadline = time.monotonic() + ANSWER_MS / 1000
        while not arrivals:
            assert time.monotonic() < deadline
            if payload:
                self.link.send_frame("there", None, header, memoryview(payload))
            else:
                self.link.send("there", None, header)
            list(self.link.wait(50_000_000, 64))
            arrivals += self.listener.wait(50_000_000, 64)
        return arrivals[0]

    def close(self) -> None:
        self.link.close()
        self.listener.close()


@pytest.fixture
def door(folder: Path) -> Iterator[Door]:
    made = Door(folder, access(folder, KeyRole.WORKER))
    yield made
    made.close()


def test_a_sender_is_who_its_key_says_from_where_it_is(door: Door, folder: Path) -> None:
    door.connect(door.address)
    arrival = door.pass_on(b"hello")
    assert arrival.public == access(folder, KeyRole.WORKER).key.public
    assert arrival.where == "127.0.0.1"


def test_a_key_that_is_added_is_let_in_without_a_restart(
    folder: Path, others: Path, start: Callable[..., Running]
) -> None:
    job = start(keys=str(folder))
    stranger = access(know(others, folder), KeyRole.OBSERVER)
    refusal(job.address, stranger)
    keys(["add", str(folder), "guest", "--role", "observer", "--public", stranger.key.public])
    assert fetch(job.address, ANSWER_MS, stranger)


def test_a_key_that_is_removed_counts_for_nothing_on_connections_that_it_has(
    folder: Path, start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("treefold.transport.access.LOOK_NS", 0)
    job = start(keys=str(folder))
    with closing(StatusLink(job.address, access(folder, KeyRole.OBSERVER))) as link:
        link.ask(1)
        assert link.body(ANSWER_MS)
        keys(["remove", str(folder), "observer"])
        link.ask(2)
        with pytest.raises(AuthError, match="is not on the allow-list"):
            link.body(ANSWER_MS)


def test_a_worker_key_is_changed_while_the_old_one_goes_on(
    folder: Path, start: Callable[..., Running]
) -> None:
    job = start(keys=str(folder))
    old = access(folder, KeyRole.WORKER)
    keys(["rotate", str(folder), "worker"])
    new = access(folder, KeyRole.WORKER)
    assert old.key.public != new.key.public
    for one in (old, new):
        assert fetch(job.address, ANSWER_MS, one)
    keys(["remove", str(folder), "worker-old"])
    refusal(job.address, old)
    assert fetch(job.address, ANSWER_MS, new)


def test_a_link_finds_a_listener_that_came_back_with_a_new_key(door: Door, folder: Path) -> None:
    door.connect(door.address)
    assert door.pass_on(b"before").header == b"before"
    keys(["rotate", str(folder), "scheduler"])
    address = door.address
    door.listener.close()
    door.listener = Hub(access=access(folder, KeyRole.SCHEDULER))
    door.listener.listen("door", address, insecure=False, frame_bytes_max=FRAME_MAX)
    assert door.pass_on(b"after").header == b"after"


def test_a_link_that_worked_waits_when_somebody_else_has_the_address(
    door: Door, folder: Path, others: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "GIVE_UP_NS", 0)
    monkeypatch.setattr(links, "REOPEN_NS", 1)
    door.connect(door.address)
    door.pass_on(b"before")
    address = door.address
    door.listener.close()
    stranger = Hub(access=access(others, KeyRole.SCHEDULER))
    stranger.listen("door", address, insecure=False, frame_bytes_max=FRAME_MAX)
    for _ in range(20):
        list(door.link.wait(50_000_000, 64))
    stranger.close()
    door.listener = Hub(access=access(folder, KeyRole.SCHEDULER))
    door.listener.listen("door", address, insecure=False, frame_bytes_max=FRAME_MAX)
    assert door.pass_on(b"after").header == b"after"


def test_a_listener_that_is_stopped_is_waited_for_and_not_taken_for_another_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "HANDSHAKE_MS", 50)
    monkeypatch.setattr(links, "PROMPT_NS", 20_000_000)
    monkeypatch.setattr(links, "GIVE_UP_NS", 0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub = Hub(access=access(folder, KeyRole.WORKER))
        at = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        hub.connect("there", at, FRAME_MAX, KeyRole.SCHEDULER)
        accepted = [silent.accept()[0]]
        for _ in range(3):  # each time the last handshake was given up
            while not select.select([silent], [], [], 0)[0]:
                list(hub.wait(10_000_000, 64))
            accepted.append(silent.accept()[0])
        hub.close()
        for one in accepted:
            one.close()


def test_an_allow_list_that_cannot_be_read_leaves_everything_as_it_was(folder: Path) -> None:
    who = access(folder, KeyRole.WORKER)
    (folder / "allowed").write_text("nonsense\n")
    who.refresh(is_urgent=True)
    assert who.entry(who.key.public) == who.key.entry


# ---- what is seen --------------------------------------------------------------------------------


@pytest.mark.parametrize("has_keys", [True, False])
def test_a_payload_is_not_on_the_wire_in_clear_unless_there_are_no_keys(
    folder: Path, *, has_keys: bool
) -> None:
    who = access(folder, KeyRole.WORKER) if has_keys else None
    at = access(folder, KeyRole.SCHEDULER) if has_keys else None
    door = Door(folder, access(folder, KeyRole.WORKER))
    door.close()
    door.listener, door.link = Hub(access=at), Hub(access=who)
    bind = "tcp://127.0.0.1:0"
    address = door.listener.listen("door", bind, insecure=False, frame_bytes_max=FRAME_MAX)
    with Wiretap(address) as tap:
        door.connect(tap.address)
        arrival = door.pass_on(b"a header in clear", SECRET)
        assert bytes(arrival.payloads[0]) == SECRET
        door.close()
        assert (SECRET in tap.heard) is not has_keys
        assert (b"a header in clear" in tap.heard) is not has_keys
        assert len(tap.heard) > len(SECRET)


# ---- without keys --------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://10.1.2.3:0"])
def test_without_keys_nothing_that_others_can_reach_is_bound(address: str) -> None:
    hub = Hub()
    with pytest.raises(ConfigError, match=r"treefold keys init DIR.*or set insecure"):
        hub.listen("door", address, insecure=False, frame_bytes_max=FRAME_MAX)
    hub.close()


def test_insecure_binds_it_and_a_warning_says_so_again_and_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sockets, "WARNING_S", 0)
    monkeypatch.setattr(logging.getLogger("treefold"), "propagate", True)
    hub = Hub()
    hub.listen("door", "tcp://0.0.0.0:0", insecure=True, frame_bytes_max=FRAME_MAX)
    for _ in range(3):
        list(hub.wait(0, 1))
    hub.close()
    assert caplog.text.count("--insecure: tcp://0.0.0.0:0 can be reached") == 3


def test_with_keys_any_address_is_bound_and_nothing_is_warned_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("treefold"), "propagate", True)
    hub = Hub(access=access(folder, KeyRole.SERVER))
    hub.listen("door", "tcp://0.0.0.0:0", insecure=False, frame_bytes_max=FRAME_MAX)
    list(hub.wait(0, 1))
    hub.close()
    assert "insecure" not in caplog.text


# ---- the audit log -------------------------------------------------------------------------------


def test_the_audit_log_says_who_asked_for_what_from_where_and_what_came_of_it(
    folder: Path, others: Path, tmp_path: Path, start: Callable[..., Running]
) -> None:
    path = tmp_path / "audit.jsonl"
    job = start(keys=str(folder), audit=str(path))
    refusal(job.address, access(know(others, folder), KeyRole.OBSERVER))
    with pytest.raises(AuthError):
        ask(job.address, "server-0", access(folder, KeyRole.OBSERVER))
    ask(job.address, "server-1", access(folder, KeyRole.ADMIN))
    job.stop()
    deeds = [json.loads(line) for line in path.read_text().splitlines()]
    told = [
        (deed["what"], deed["is_allowed"], deed.get("who", ""), deed.get("where", ""))
        for deed in deeds
    ]
    assert ("connect", False, "", "127.0.0.1") in told
    assert ("connect", True, "observer", "127.0.0.1") in told
    assert ("DrainRequest", False, "observer", "127.0.0.1") in told
    assert ("DrainRequest", True, "admin", "127.0.0.1") in told
    assert [deed["text"] for deed in deeds if deed["what"] == "cluster"]  # the end of the job
    secrets = [file.read_text().split("secret = ")[1] for file in folder.glob("*.key")]
    assert not [secret for secret in secrets if secret.strip().strip("'") in path.read_text()]
    assert path.stat().st_mode & 0o077 == 0


def test_a_socket_of_the_wrong_kind_learns_nothing(
    folder: Path, start: Callable[..., Running]
) -> None:
    """Plain ZeroMQ, as any program could speak it: not a byte comes back."""
    job = start(keys=str(folder))
    context = zmq.Context()
    plain = context.socket(zmq.DEALER)
    plain.setsockopt(zmq.LINGER, 0)
    plain.connect(job.address)
    plain.send(b"hello")
    is_answered = plain.poll(500)
    plain.close()
    context.term()
    assert not is_answered
