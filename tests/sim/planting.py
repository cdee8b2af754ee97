"""How bugs are planted in the cores: by functions that patch them, registered by name."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.sim.scenario import Theme
from treefold.scheduler import balance
from treefold.scheduler.core import SchedulerCore
from treefold.server.core import ServerCore
from treefold.wire.exchange import Received
from treefold.worker.core import WorkerCore

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], None]
AnyCore = ServerCore | SchedulerCore | WorkerCore
Before = Callable[[AnyCore, object], object]
After = Callable[[AnyCore, object, list[object]], list[object]]
PLANTED: dict[str, tuple[Plant, Theme, int]] = {}
"""Bugs by name, with the kind of seeds in which each is met most often, and the first of them."""


def plant(theme: Theme, first: int = 0) -> Callable[[Plant], Plant]:
    """Register a bug under its function's name; seeds before ``first`` are known not to meet it."""

    def register(function: Plant) -> Plant:
        PLANTED[function.__name__] = function, theme, first
        return function

    return register


def change_input(patch: Patch, core: type[AnyCore], before: Before) -> None:
    """Let ``before`` change what a kind of core is given."""
    handle: Any = core.handle  # each kind of core has its own events and effects

    def changed(self: AnyCore, now_ns: int, event: object) -> object:
        return handle(self, now_ns, before(self, event))

    patch.setattr(core, "handle", changed)


def change_output(patch: Patch, core: type[AnyCore], after: After) -> None:
    """Let ``after`` change what a kind of core wants done."""
    handle: Any = core.handle  # each kind of core has its own events and effects

    def changed(self: AnyCore, now_ns: int, event: object) -> list[object]:
        return after(self, event, list(handle(self, now_ns, event)))

    patch.setattr(core, "handle", changed)


def no_backup_tasks(patch: Patch) -> None:
    """Let slots that are leased to nobody be missed: backup tasks would have them computed."""
    patch.setattr(balance.Balance, "help", lambda *_: [])
    patch.setattr(SchedulerCore, "check_invariants", lambda _: None)


def message_of(event: object) -> object:
    """The message that an event brings, None if it brings none."""
    return event.message if isinstance(event, Received) else None
