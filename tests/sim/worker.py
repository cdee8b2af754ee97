"""A worker's process: its core and its connections, with symbols for tensors."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.sim.checks import Checks, is_intact
from tests.sim.memory import NOTHING, Memory, pieces_of
from tests.sim.network import Connection, Network
from tests.sim.process import Process
from tests.sim.roles import Listener, connect
from tests.sim.streams import Streamed
from tests.sim.world import Violation
from treefold.common.errors import RolledBackError
from treefold.wire.exchange import Send
from treefold.wire.messages import Push
from treefold.worker.core import WorkerCore
from treefold.worker.effects import (
    Aligned,
    Arrived,
    Complete,
    Connect,
    Disconnect,
    Fail,
    FoldPayloads,
    Initial,
    LoopEnd,
    ReleasePayload,
    Retire,
    Snapshot,
    StreamBegun,
    StreamsOver,
    Task,
)
from treefold.worker.pulls import PartRange

if TYPE_CHECKING:
    from tests.sim.trainer import Trainer
    from treefold.common.errors import TreefoldError
    from treefold.wire.words import Outcome


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
        self.begin_anew: Callable[[], None] = self.die
        self.streams: dict[int, Streamed] = {}
        self._view = 0
        self.acts |= {
            Send: self._send,
            FoldPayloads: self._fold,
            ReleasePayload: self._release,
            Retire: self._retire,
            Connect: self._connect,
            Disconnect: self._disconnect,
            Complete: self._complete,
            Fail: self._fail,
            StreamBegun: self._begin_stream,
            Arrived: self._arrive,
            StreamsOver: self._end_streams,
        }

    def _retire(self, _: Retire) -> None:
        self.network.count("retired")
        self.payloads.retire()
        if self.trainer is not None:
            self.trainer.retire()

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

    def _disconnect(self, effect: Disconnect) -> None:
        self.network.close(self.connections.pop(effect.server))

    def _begin_stream(self, effect: StreamBegun) -> None:
        self.network.count("streams")
        self.streams[effect.table] = Streamed(effect.table, effect.version)

    def _arrive(self, effect: Arrived) -> None:
        stream = self.streams[effect.table]
        if effect.part in stream.parts or stream.is_void:
            raise Violation(f"{effect} of {stream} comes again")
        stream.parts[effect.part] = self.payloads.pop(effect.payload)
        self._wake()

    def _end_streams(self, effect: StreamsOver) -> None:
        if effect.error is not None and not self._may_be_told(effect.error):
            raise Violation(f"{self.name} is told {effect.error!r} while the job goes on")
        self.network.count("streams given up")
        for stream in self.streams.values():
            stream.is_void, stream.error = True, effect.error
        self._wake()

    def _wake(self) -> None:
        assert self.trainer is not None
        self.trainer.wake()

    def _complete(self, effect: Complete) -> None:
        value = effect.value
        snapshots = value.snapshots if isinstance(value, Task | LoopEnd | Aligned) else []
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
            if one.snapshot.is_streaming:
                self.checks.enter(self.view)
                self.checks.on_begun(one.snapshot)
            elif is_intact(one.snapshot, one.memories):
                values = [memory.value for memory in one.memories]
                self.checks.on_snapshot(self.view, one.snapshot, one.parts, values)
        assert self.trainer is not None
        self.trainer.answer(effect.call, Loaded(value, found))

    def _fail(self, effect: Fail) -> None:
        if not self._may_be_told(effect.error):
            raise Violation(f"{self.name} is told {effect.error!r} while the job goes on")
        assert self.trainer is not None
        self.trainer.answer(effect.call, effect.error)

    @property
    def view(self) -> int:
        """The newest view that this worker has."""
        return 0 if self.worker.view is None else self.worker.view.number

    def _may_be_told(self, error: object) -> bool:
        is_rolled_back = isinstance(error, RolledBackError) and bool(self.checks.rollbacks)
        return is_rolled_back or self.checks.may_fail()

    # ---- checks ----------------------------------------------------------------------------------

    def is_to_be_checked(self, is_busy: bool, is_holding: bool) -> bool:
        """Only what is held can be wrong, and what is held twice stays so for a while."""
        del is_busy
        return is_holding and self.is_due

    def handles(self) -> int:
        """Payloads of the round being computed and of pulls."""
        rounds = (self.worker.local, self.worker.exchange.stream.older)
        held = sum(len(one.payloads()) for one in rounds if one is not None)
        tables = self.worker.tables.values()
        return held + sum(len(pull.payloads()) for table in tables for pull in table.pulls.values())

    def check(self) -> None:
        """Views grow."""
        view = self.worker.view
        if view is not None:
            if view.number < self._view:
                raise Violation(f"view {view.number} follows view {self._view}")
            self._view = view.number
