"""What a training thread hands over to the thread that sends."""

from collections.abc import Iterator

import pytest

from treefold.common.config import load
from treefold.common.spec import Hyper
from treefold.worker.effects import Effect, Event, HyperKnown, SlotFinished, SlotMeta
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
