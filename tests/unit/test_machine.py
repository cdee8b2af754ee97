"""Whether work beside the computation would only take time from it."""

import pytest

from treefold.wire.messages import View
from treefold.wire.words import Leases, Member, Phase, Role
from treefold.worker import machine

NOBODY = Leases(0, [])


def view(*members: tuple[Role, str]) -> View:
    """A view of members by role and host."""
    found = [
        Member(role, number, number + 1, "", host, 100 + number)
        for number, (role, host) in enumerate(members)
    ]
    return View(1, Phase.RUNNING, 1, found, [], NOBODY, NOBODY)


HERE = [(Role.SERVER, "here"), (Role.WORKER, "here"), (Role.WORKER, "here")]


@pytest.mark.parametrize(
    ("members", "processors", "is_crowded"),
    [
        (HERE, 2, True),
        (HERE, 3, False),
        ([*HERE, (Role.SERVER, "there")], 2, False),
        ([*HERE, (Role.WORKER, "there")], 3, False),
        ([*HERE, (Role.WORKER, "there")], 2, True),
        (HERE[1:], 1, False),
    ],
)
def test_a_machine_is_crowded_if_it_has_all_servers_and_too_few_processors(
    members: list[tuple[Role, str]],
    processors: int,
    is_crowded: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "processors", lambda: processors)
    assert machine.is_crowded(view(*members), "here") is is_crowded


def test_nothing_is_crowded_that_is_not_known() -> None:
    assert not machine.is_crowded(None, "here")
    assert machine.processors() >= 1
