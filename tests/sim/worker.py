"""A worker's process: its core and its connections, with symbols for tensors."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.sim.checks import Checks, is_intact
from tests.sim.memory import NOTHING, Memory, pieces_of
from tests.sim.network import Connection, Network
from tests.sim.process import Process
from tests.sim.roles import Listener, connect
from tests.sim.world import Violation
from treefold.wire.exchange import Send
from treefold.wire.messages import Outcome, Push
from treefold.worker.core import WorkerCore
from treefold.worker.effects import (
    Complete,
    Connect,
    Fail,
    FoldPayloads,
    Initial,
    LoopEnd,
    ReleasePayload,
    Snapshot,
    Task,
)
from treefold.worker.pulls import PartRange

if TYPE_CHECKING:
    from tests.sim.trainer import Trainer
    from treefold.common.errors import TreefoldError


@dataclass(frozen=True, slots=True)
class Found:
    """A snapshot, and where its parts lie."""

    snapshot: Snapshot
    parts: Sequence[PartRange]
    memories: Sequence[Memory]


@dataclass(frozen=True, slots=True)
class Loaded:
    """The answer to a call, with what its snapshots are."""

    value: object
    found: Sequence[Found]


class WorkerProcess(Process):
    """One worker, with symbols for tensors.

    Attributes
    ----------
    outcome : Outcome or None
        How its script ended, None while it runs (and if the process died).
    is_finished : bool
        Whether the script came to its end.
    error : TreefoldError or None
        What the script was told.
    """

    def __init__(self, name: str, core: WorkerCore, network: Network, checks: Checks) -> None:
        super().__init__(name, core, network)
        self.worker = core
        self.checks = checks
        self.listeners: dict[str, Listener] = {}
        self.connections: dict[object, Connection] = {}
        self.outcome: Outcome | None = None
        self.is_finished = False
        self.error: TreefoldError | None = None
        self.numbers: Iterator[int] = itertools.count(1)
        self.trainer: Trainer | None = None
        self._view = 0
        self.acts |= {
            Send: self._send,
            FoldPayloads: self._fold,
            ReleasePayload: self._release,
            Connect: self._connect,
            Complete: self._complete,
            Fail: self._fail,
        }

    # ---- connections -----------------------------------------------------------------------------

    def open(self, peer: object, address: str) -> None:
        """Connect to a listener."""
        listener = self.listeners[address]
        self.connections[peer] = connect(self, listener, peer, next(self.numbers))

    def reconnect(self) -> None:
        """Make every connection anew."""
        for peer, connection in list(self.connections.items()):
            self.network.close(connection)
            self.open(peer, connection.up.target)

    def die(self) -> None:
        """Stop at once, without a word."""
        super().die()
        for connection in self.connections.values():
            self.network.close(connection)

    # ---- effects ---------------------------------------------------------------------------------

    def _send(self, effect: Send) -> None:
        connection = self.connections.get(effect.peer)
        if connection is None:
            raise Violation(f"{effect} before the connection is made")
        message, shared = effect.message, self.checks.reference.scenario.shared
        parts: list[Memory] = []
        if isinstance(effect.payload, Initial):
            initial, shared = effect.payload, 0.0
            value = self.checks.reference.initial
            parts = [Memory(value(initial.table, a), b - a) for a, b in initial.parts]
        elif isinstance(effect.payload, tuple):
            parts = [self.payloads.send(handle) for handle in effect.payload]
        if not parts or not isinstance(message, Push):
            self.send(connection, connection.up, message, NOTHING)
            return
        if message.count != len(parts):
            raise Violation(f"{message} with {len(parts)} payloads")
        for piece, cargo in pieces_of(self.world.rng, message, parts, shared):
            self.send(connection, connection.up, piece, cargo)

    def _fold(self, effect: FoldPayloads) -> None:
        self.payloads.fold(effect.left, effect.right)

    def _release(self, effect: ReleasePayload) -> None:
        self.payloads.pop(effect.payload)

    def _connect(self, effect: Connect) -> None:
        self.open(effect.server, effect.address)

    def _complete(self, effect: Complete) -> None:
        value = effect.value
        snapshots = value.snapshots if isinstance(value, Task | LoopEnd) else []
        if isinstance(value, Snapshot):
            snapshots = [value]
        found = [
            Found(
                item,
                self.worker.tables[item.table].parts,
                [self.payloads.pop(p) for p in item.payloads],
            )
            for item in snapshots
        ]
        for one in found:
            if is_intact(one.snapshot, one.memories):
                self.checks.on_snapshot(one.snapshot, one.parts, [m.value for m in one.memories])
        assert self.trainer is not None
        self.trainer.answer(effect.call, Loaded(value, found))

    def _fail(self, effect: Fail) -> None:
        if not self.checks.may_fail():
            raise Violation(f"{self.name} is told {effect.error!r} while the job goes on")
        assert self.trainer is not None
        self.trainer.answer(effect.call, effect.error)

    # ---- checks ----------------------------------------------------------------------------------

    def handles(self) -> int:
        """Payloads of the round being computed and of pulls."""
        local = self.worker.local
        held = 0 if local is None else len(local.payloads())
        tables = self.worker.tables.values()
        return held + sum(len(pull.got) for table in tables for pull in table.pulls.values())

    def check(self) -> None:
        """Views grow."""
        view = self.worker.view
        if view is not None:
            if view.number < self._view:
                raise Violation(f"view {view.number} follows view {self._view}")
            self._view = view.number
