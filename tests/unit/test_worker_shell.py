"""What a training thread hands over, and when the thread that sends is woken for it."""

import select
from collections.abc import Iterator

import pytest

from treefold.common.config import load
from treefold.common.spec import Hyper
from treefold.worker.effects import Effect, Event, HyperKnown, Reported, SlotFinished, SlotMeta
from treefold.worker.shell import WorkerShell

GROUPS: list[Hyper] = [{"lr": 0.5}]
KNOWN = HyperKnown(3, 7, 0, GROUPS, 0.0)


@pytest.fixture
def shell() -> Iterator[WorkerShell]:
    made = WorkerShell(load({"scheduler": "ipc:///nonexistent/never"}).settings)
    yield made
    made.hub.close()


class Seen:
    """A core that only notes what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def handle(self, now_ns: int, event: Event) -> list[Effect]:
        del now_ns
        self.events.append(event)
        return []


def is_ringing(shell: WorkerShell) -> bool:
    return bool(select.select([shell.hub.bell.fileno()], [], [], 0)[0])


def test_who_sends_is_woken_once_for_all_that_was_handed_over(shell: WorkerShell) -> None:
    shell.wake()
    assert not is_ringing(shell), "there is nothing to send"
    shell.post(Reported(1, None, []))
    shell.post(Reported(2, None, []))
    assert not is_ringing(shell)
    shell.wake()
    assert is_ringing(shell)
    shell.hub.bell.silence()
    shell.wake()
    assert not is_ringing(shell), "it has not looked since"


@pytest.mark.parametrize(
    ("finished", "is_said"),
    [
        (None, True),
        (SlotFinished(7, 0, {3: SlotMeta(GROUPS, 0.0, b"")}), False),
        (SlotFinished(7, 0, {4: SlotMeta(GROUPS, 0.0, b"")}), True),
        (SlotFinished(8, 0, {3: SlotMeta(GROUPS, 0.0, b"")}), True),
    ],
    ids=["goes on", "over", "over, of another table", "of another round"],
)
def test_what_a_round_steps_with_is_not_said_twice_by_a_slot_that_is_over(
    shell: WorkerShell, finished: SlotFinished | None, is_said: bool
) -> None:
    seen = Seen()
    shell._loop.core = seen  # type: ignore[assignment] # of which nothing else is needed
    shell.post(KNOWN)
    if finished is not None:
        shell.post(finished)
    shell._take_events()
    assert seen.events == [KNOWN] * is_said + [finished] * (finished is not None)
