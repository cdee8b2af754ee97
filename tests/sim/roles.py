"""The scheduler's and the servers' processes."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from tests.sim.checks import Checks
from tests.sim.network import Connection, End, Network, Payload
from tests.sim.process import Process
from tests.sim.reference import fold
from tests.sim.world import Violation
from treefold.scheduler.core import SchedulerCore
from treefold.server.core import ServerCore
from treefold.server.effects import (
    ComputeNorm,
    FoldPayloads,
    NormComputed,
    OpenShard,
    PartRef,
    PublishVersion,
    RecordVersion,
    ReleasePayload,
    ReleaseVersion,
)
from treefold.wire.codec import decode
from treefold.wire.exchange import SCHEDULER, PeerLost, Send
from treefold.wire.messages import StatusReply, StatusRequest

VERSIONS_HELD_MAX = 2
NORM_ROUNDS_MAX = 6


class Listener(Process):
    """A process that others connect to."""

    def send_to(self, identity: object, effect: Send, payload: Payload | None) -> bool:
        """Send to a routing identity; False if nobody has it any more."""
        connection = self.network.connections.get(identity) if isinstance(identity, bytes) else None
        if connection is None:
            return False
        self.send(connection, connection.down, effect.message, payload)
        return True


def connect(client: Process, listener: Process, peer: object, number: int) -> Connection:
    """Open a connection; the client knows the listener as ``peer``."""
    identity = b"%s>%s.%d" % (client.name.encode(), listener.name.encode(), number)
    connection = Connection(
        identity,
        End(client.name, listener.name, identity, listener.receive),
        End(listener.name, client.name, peer, client.receive),
    )
    client.network.connect(connection)
    return connection


class SchedulerProcess(Listener):
    """The scheduler."""

    def __init__(self, core: SchedulerCore, network: Network) -> None:
        super().__init__("scheduler", core, network)
        self.scheduler = core
        self.acts[Send] = self._send
        self._view = 0

    def _send(self, effect: Send) -> None:
        self.send_to(effect.peer, effect, None)

    def check(self) -> None:
        """Views grow, and nothing is kept for ever."""
        core = self.scheduler
        if core.view.number < self._view:
            raise Violation(f"view {core.view.number} follows view {self._view}")
        self._view = core.view.number
        books = len(core.norms._reports) + len(core.norms._decisions)
        if books > NORM_ROUNDS_MAX * max(1, len(core.tables)):
            raise Violation(f"the scheduler keeps norms of {books} rounds")


class Probe(Process):
    """Somebody who asks the scheduler for its status."""

    def __init__(self, scheduler: SchedulerProcess) -> None:
        super().__init__("probe", scheduler.core, scheduler.network)
        self.connection = connect(self, scheduler, SCHEDULER, 0)
        self.answers = 0

    def ask(self, _: object) -> None:
        """Ask once."""
        self.send(self.connection, self.connection.up, StatusRequest(1), None)

    def receive(self, peer: object, header: bytes, payload: Payload | None) -> None:
        """The answer is a document."""
        reply = decode(header)
        if not isinstance(reply, StatusReply) or "members" not in json.loads(reply.body):
            raise Violation(f"{peer} answers a status request with {reply} and {payload}")
        self.answers += 1


@dataclass(frozen=True, slots=True)
class _Open:
    first_block: int
    blocks: int


class ServerProcess(Listener):
    """One server, with symbols for tensors."""

    def __init__(self, name: str, core: ServerCore, network: Network, checks: Checks) -> None:
        super().__init__(name, core, network)
        self.server = core
        self.checks = checks
        self.scheduler: Connection | None = None
        self._view = 0
        self._open: dict[tuple[int, int], _Open] = {}
        self._published: dict[tuple[int, int, int], list[Payload]] = {}
        self.acts |= {
            Send: self._send,
            OpenShard: self._open_shard,
            FoldPayloads: self._fold,
            ReleasePayload: self._release,
            ComputeNorm: self._norm,
            PublishVersion: self._publish,
            ReleaseVersion: self._release_version,
            RecordVersion: checks.on_recorded,
        }

    # ---- effects ---------------------------------------------------------------------------------

    def _send(self, effect: Send) -> Iterable[object]:
        if effect.peer == SCHEDULER:
            assert self.scheduler is not None
            self.send(self.scheduler, self.scheduler.up, effect.message, None)
            return ()
        payload = None
        if isinstance(effect.payload, PartRef):
            ref = effect.payload
            held = self._published.get((ref.table, ref.shard, ref.version))
            if held is None:
                raise Violation(f"{ref} is sent, but that version is not held")
            payload = held[ref.part]
        if self.send_to(effect.peer, effect, payload):
            return ()
        return (PeerLost(effect.peer),)

    def _open_shard(self, effect: OpenShard) -> None:
        key = (effect.table, effect.shard)
        if key in self._open:
            raise Violation(f"shard {key} is opened twice")
        self._open[key] = _Open(effect.span.first_block, effect.span.blocks)

    def _fold(self, effect: FoldPayloads) -> None:
        self.payloads.fold(effect.left, effect.right, fold)

    def _release(self, effect: ReleasePayload) -> None:
        self.payloads.pop(effect.payload)

    def _roots(self, roots: list[int | None]) -> list[object]:
        return [None if root is None else self.payloads.get(root)[0] for root in roots]

    def _norm(self, effect: ComputeNorm) -> Iterable[object]:
        key = (effect.table, effect.shard)
        self.checks.on_roots(self.server.shards[key], effect.round, self._roots(effect.roots))
        place = self._open[key]
        sums = self.checks.reference.sums(
            effect.table, effect.round, place.first_block, place.blocks
        )
        return (NormComputed(effect.table, effect.shard, effect.round, sums),)

    def _publish(self, effect: PublishVersion) -> None:
        shard = self.server.shards[effect.table, effect.shard]
        self.checks.on_published(shard, effect, self._roots(effect.roots))
        for root in effect.roots:
            if root is not None:
                self.payloads.pop(root)
        reference = self.checks.reference
        self._published[effect.table, effect.shard, effect.version] = [
            (reference.version(effect.table, start, effect.version), stop - start)
            for start, stop in shard.parts
        ]

    def _release_version(self, effect: ReleaseVersion) -> None:
        key = (effect.table, effect.shard, effect.version)
        if self._published.pop(key, None) is None:
            raise Violation(f"version {key} is released, but not held")

    # ---- checks ----------------------------------------------------------------------------------

    def handles(self) -> int:
        """Payloads in the folds of open rounds."""
        return sum(
            held.payload is not None
            for shard in self.server.shards.values()
            if shard.round is not None
            for part in shard.round.folds
            for held in part.fold.nodes.values()
        )

    def check(self) -> None:
        """Views grow, and nothing is kept for ever."""
        core = self.server
        if core.view < self._view:
            raise Violation(f"view {core.view} follows view {self._view}")
        self._view = core.view
        if len(self._published) > VERSIONS_HELD_MAX * len(core.shards):
            raise Violation(
                f"{len(self._published)} versions of {len(core.shards)} shards are held"
            )
        for shard in core.shards.values():
            if len(shard.waits) > len(self.network.connections) + self.network.closed:
                raise Violation(f"{len(shard.waits)} pulls wait at a shard")
