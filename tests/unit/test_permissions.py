"""Roles and messages: whatever the table does not name is denied."""

from typing import get_args

import msgspec
import pytest

from treefold.wire import permissions
from treefold.wire.messages import (
    AnyMessage,
    DrainRequest,
    Pull,
    Push,
    Register,
    StatusRequest,
)
from treefold.wire.permissions import SENDERS, KeyRole, denial
from treefold.wire.words import PROTOCOL_VERSION, Role

KINDS = get_args(AnyMessage)


def test_every_message_has_an_entry_and_no_other_kind_has_one() -> None:
    assert set(SENDERS) == set(KINDS)


def test_every_message_may_be_sent_by_somebody() -> None:
    assert [kind.__name__ for kind, senders in SENDERS.items() if not senders] == []


@pytest.mark.parametrize("role", list(KeyRole))
def test_a_kind_without_an_entry_is_denied_to_every_role(
    role: KeyRole, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(permissions.SENDERS, StatusRequest)
    assert "only nobody may" in denial(role, StatusRequest(1))


@pytest.mark.parametrize(
    ("role", "kinds"),
    [
        (KeyRole.OBSERVER, {"StatusRequest", "Probe"}),
        (KeyRole.ADMIN, {"StatusRequest", "DrainRequest", "Probe"}),
        (
            KeyRole.WORKER,
            {
                "Register", "Heartbeat", "DeclareTable", "DeclarePlan", "Leave", "StatusRequest",
                "Push", "RoundHyper", "RoundMeta", "Pull", "SegmentOffer", "SegmentAnswer", "Probe",
            },
        ),
        (
            KeyRole.SCHEDULER,
            {
                "Registered", "Refused", "HeartbeatSeen", "Accepted", "View", "AssignTable",
                "Grant", "Flush", "NormDecision", "StatusReply", "Stop", "Fenced", "SavedSeen",
                "LeaveAsked", "QuorumDecision", "HealthDecision", "ProbeSeen",
            },
        ),
        (
            KeyRole.SERVER,
            {
                "DrainRequest",
                "Register", "Refused", "Heartbeat", "Leave", "RoundLate", "NormReport",
                "ChainSynced", "ChainDiffers", "ShardSaved", "Push", "RoundHyper", "Pulled",
                "Published", "RoundStatus", "ChainRound", "ChainAsk", "ChainApplied", "UnitCopy",
                "UnitTaken", "SegmentOffer", "SegmentAnswer", "QuorumReport", "HealthReport",
                "ProbeSeen",
            },
        ),
    ],
)  # fmt: skip
def test_a_role_may_send_these_kinds_and_no_other(role: KeyRole, kinds: set[str]) -> None:
    assert {kind.__name__ for kind, senders in SENDERS.items() if role in senders} == kinds


@pytest.mark.parametrize("role", list(KeyRole))
@pytest.mark.parametrize("claimed", list(Role))
def test_a_key_registers_only_as_what_it_is(role: KeyRole, claimed: Role) -> None:
    message = Register(PROTOCOL_VERSION, claimed, 1, "", "here", 1, "0")
    may = (role, claimed) in ((KeyRole.WORKER, Role.WORKER), (KeyRole.SERVER, Role.SERVER))
    assert (denial(role, message) == "") is may


def test_a_denial_names_the_role_the_message_and_who_may() -> None:
    assert "for nobody else" in denial(KeyRole.SERVER, DrainRequest(1, "server-0"))
    assert not denial(KeyRole.SERVER, DrainRequest(1, "server-0", 5))
    text = denial(KeyRole.OBSERVER, DrainRequest(1, "server-0"))
    assert (
        text == "a key with the role observer may not send DrainRequest, only admin or server may"
    )


def test_an_observer_can_neither_push_nor_pull() -> None:
    push = msgspec.structs.replace(Push(1, 1, 1, 0, 0, 0, 1, 0, 1, 0, 0, [], None), sender=2)
    pull = Pull(1, 1, 1, 0, 0, 0, 0, [])
    assert denial(KeyRole.OBSERVER, push)
    assert denial(KeyRole.OBSERVER, pull)
    assert not denial(KeyRole.WORKER, push)
