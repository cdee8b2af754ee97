"""Whose messages are taken, by the key that their connection has proven."""

import json
import os
from pathlib import Path

import pytest

from treefold.cli.keys import main as keys
from treefold.common.audit import DENIED_PER_S_MAX, Audit
from treefold.transport.access import Access
from treefold.transport.gate import Gate
from treefold.transport.keys import read_key
from treefold.transport.sockets import Arrival
from treefold.wire.messages import (
    AnyMessage,
    DrainRequest,
    Heartbeat,
    Leave,
    Published,
    Register,
    View,
)
from treefold.wire.permissions import KeyRole
from treefold.wire.words import PROTOCOL_VERSION, Leases, Member, Outcome, Phase, Role

REGISTER = Register(PROTOCOL_VERSION, Role.WORKER, 77, "", "here", 1, "0")
BEAT = Heartbeat(5, 1, 1, 1, 1, 1, None, "", 1, 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    keys(["init", str(tmp_path / "keys")])
    keys(["add", str(tmp_path / "keys"), "other", "--role", "worker"])
    return tmp_path / "keys"


@pytest.fixture
def gate(folder: Path) -> Gate:
    return Gate(Access(str(folder), [KeyRole.SCHEDULER]), None)


def sent(folder: Path, name: str) -> Arrival:
    public = read_key(folder / f"{name}.key").public
    return Arrival("listener", b"someone", b"", [], public, "10.0.0.7")


def given(folder: Path, name: str) -> Member:
    """What the scheduler knows of who registered with this key."""
    return Member(Role.WORKER, 0, 5, "", "here", 1, read_key(folder / f"{name}.key").public)


def test_an_incarnation_belongs_to_the_key_that_registered_it(gate: Gate, folder: Path) -> None:
    gate.learn([given(folder, "worker")])
    assert not gate.denial(sent(folder, "worker"), BEAT)
    for message in (BEAT, Leave(5, Outcome.DONE, "")):
        text = gate.denial(sent(folder, "other"), message)
        assert text == "incarnation 5 belongs to another key"


def test_who_claims_a_number_before_it_is_given_does_not_keep_it(gate: Gate, folder: Path) -> None:
    assert not gate.denial(sent(folder, "other"), BEAT)
    gate.learn([given(folder, "worker")])
    assert not gate.denial(sent(folder, "worker"), BEAT)
    assert gate.denial(sent(folder, "other"), BEAT)


@pytest.mark.parametrize("message", [BEAT, REGISTER, DrainRequest(1, "server-0")])
def test_who_has_no_key_is_denied_everything(gate: Gate, message: AnyMessage) -> None:
    nobody = Arrival("listener", b"someone", b"", [])
    assert "is not on the allow-list" in gate.denial(nobody, message)


def test_a_key_that_is_taken_off_the_list_is_denied_from_then_on(folder: Path) -> None:
    access = Access(str(folder), [KeyRole.SCHEDULER])
    gate, arrival = Gate(access, None), sent(folder, "worker")
    assert not gate.denial(arrival, BEAT)
    keys(["remove", str(folder), "worker"])
    access.refresh(is_urgent=True)
    assert "is not on the allow-list (any more)" in gate.denial(arrival, BEAT)


def test_a_member_takes_views_from_a_scheduler_and_tensors_from_a_server_alone(
    folder: Path,
) -> None:
    gate = Gate(Access(str(folder), [KeyRole.WORKER]), None)

    def comes(name: str, message: AnyMessage) -> str:
        public = read_key(folder / f"{name}.key").public
        return gate.denial(Arrival("there", "there", b"", [], public), message)

    view = View(1, Phase.RUNNING, 1, [], [], Leases(0, []), Leases(0, []))
    whole = Published(0, 0, 1, b"", 0.0)
    assert not comes("scheduler", view)
    assert comes("server", view)
    assert not comes("server", whole)
    assert comes("scheduler", whole)


def test_without_keys_everybody_may_and_requests_are_audited(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    audit = Audit(str(path), "scheduler")
    gate = Gate(None, audit)
    assert not gate.denial(Arrival("listener", b"x", b"", []), DrainRequest(1, "server-3"))
    assert not gate.denial(Arrival("listener", b"x", b"", []), BEAT)
    audit.close()
    [deed] = [json.loads(line) for line in path.read_text().splitlines()]
    assert (deed["what"], deed["text"], deed["is_allowed"]) == ("DrainRequest", "server-3", True)


def test_a_flood_of_refusals_is_counted_in_the_audit_log_not_written(
    folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "audit"
    audit = Audit(str(path), "scheduler")
    gate = Gate(Access(str(folder), [KeyRole.SCHEDULER]), audit)
    tries = 10 * DENIED_PER_S_MAX
    for _ in range(tries):
        gate.denial(sent(folder, "observer"), BEAT)
    gate.denial(sent(folder, "admin"), DrainRequest(1, "server-0"))
    audit.close()
    deeds = [json.loads(line) for line in path.read_text().splitlines()]
    denied = [deed for deed in deeds if not deed["is_allowed"]]
    assert len(denied) <= 3 * DENIED_PER_S_MAX  # should the tries take more than a second
    left_out = sum(deed.get("left_out", 0) for deed in deeds)
    assert len(denied) + left_out == tries
    assert {(deed["who"], deed["role"], deed["where"]) for deed in denied} == {
        ("observer", "observer", "10.0.0.7")
    }


def test_a_disk_that_is_full_ends_nothing_and_the_next_line_says_what_is_missing(
    tmp_path: Path,
) -> None:
    audit = Audit(str(tmp_path / "audit"), "scheduler")
    file, full = os.dup(audit._descriptor), os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, audit._descriptor)
    for _ in range(3):
        audit.note("cluster", "lost")
    os.dup2(file, audit._descriptor)
    audit.note("cluster", "kept")
    audit.close()
    os.close(file)
    os.close(full)
    [deed] = [json.loads(line) for line in (tmp_path / "audit").read_text().splitlines()]
    assert (deed["text"], deed["left_out"]) == ("kept", 3)
