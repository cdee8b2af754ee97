"""The scheduler's and the servers' processes."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from tests.sim.checks import Checks
from tests.sim.memory import NOTHING, Cargo, Shelf, pieces_of
from tests.sim.network import Connection, End, Network
from tests.sim.process import Process
from tests.sim.world import Violation
from treefold.common.spec import Rule
from treefold.scheduler.core import SchedulerCore
from treefold.server.core import ServerCore
from treefold.server.effects import (
    ComputeNorm,
    FoldPayloads,
    MakeParts,
    NormComputed,
    OpenShard,
    PartsRef,
    ReadyPart,
    RecordVersion,
    ReleasePayload,
    ReleaseVersion,
)
from treefold.server.rounds import Shard
from treefold.wire.codec import decode
from treefold.wire.exchange import SCHEDULER, PeerLost, Received, Send
from treefold.wire.messages import (
    AnyMessage,
    Published,
    Pull,
    Pulled,
    StatusReply,
    StatusRequest,
)

VERSIONS_HELD_MAX = 2
NORM_ROUNDS_MAX = 6


class Listener(Process):
    """A process that others connect to."""

    def send_to(self, identity: object, message: AnyMessage, cargo: Cargo = NOTHING) -> bool:
        """Send to a routing identity; False if nobody has it any more."""
        connection = self.network.connections.get(identity) if isinstance(identity, bytes) else None
        if connection is None:
            return False
        self.send(connection, connection.down, message, cargo)
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
        self.send_to(effect.peer, effect.message)

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
        self.send(self.connection, self.connection.up, StatusRequest(1))

    def receive(self, peer: object, header: bytes, cargo: Cargo) -> None:
        """The answer is a document."""
        reply = decode(header)
        if not isinstance(reply, StatusReply) or "members" not in json.loads(reply.body):
            raise Violation(f"{peer} answers a status request with {reply} and {cargo}")
        self.answers += 1


@dataclass(frozen=True, slots=True)
class _Open:
    first_block: int
    blocks: int


@dataclass(slots=True)
class _Asked:
    """A pull, and the parts of it that were not sent yet."""

    version: int
    parts: dict[int, None]


class Answers:
    """What every peer has asked a server for: each part is sent once, before word of the whole.

    A pull that is late may ask for a version that is there, while a newer one waits.
    """

    def __init__(self) -> None:
        self._waiting: dict[tuple[object, int, int], _Asked] = {}
        self._due: dict[tuple[object, int, int], _Asked] = {}

    def ask(self, peer: object, pull: Pull, shard: Shard) -> None:
        """A pull is taken in."""
        parts = dict.fromkeys(pull.parts or range(shard.parts_count))
        asked = self._due if pull.version <= shard.version else self._waiting
        asked[peer, pull.table, pull.shard] = _Asked(pull.version, parts)

    def send(self, peer: object, pulled: Pulled, parts_count: int) -> None:
        """A run of parts is sent."""
        key = (peer, pulled.table, pulled.shard)
        asked = self._due.get(key) or self._waiting.get(key)
        if asked is None or pulled.version < asked.version:
            raise Violation(f"{peer!r} is sent {pulled}, but asked for {asked}")
        if pulled.version > asked.version:  # what was asked for is not kept any more
            asked.version, asked.parts = pulled.version, dict.fromkeys(range(parts_count))
        for part in range(pulled.part, pulled.part + pulled.count):
            if part not in asked.parts:
                raise Violation(f"{peer!r} is sent part {part} again: {pulled}")
            del asked.parts[part]

    def finish(self, peer: object, published: Published) -> None:
        """Word is sent that a version is whole."""
        key = (peer, published.table, published.shard)
        asked = self._due.pop(key, None) or self._waiting.pop(key, None)
        if asked is None or asked.version != published.version or asked.parts:
            raise Violation(f"{peer!r} is told {published}, but has not got {asked}")


class ServerProcess(Listener):
    """One server, with symbols for tensors."""

    def __init__(self, name: str, core: ServerCore, network: Network, checks: Checks) -> None:
        super().__init__(name, core, network)
        self.server = core
        self.checks = checks
        self.scheduler: Connection | None = None
        self._view = 0
        self._open: dict[tuple[int, int], _Open] = {}
        self._shelves: dict[tuple[int, int], Shelf] = {}
        self._answers = Answers()
        self.acts |= {
            Send: self._send,
            OpenShard: self._open_shard,
            FoldPayloads: self._fold,
            ReleasePayload: self._release,
            ComputeNorm: self._norm,
            MakeParts: self._make,
            ReleaseVersion: self._release_version,
            RecordVersion: self._record,
        }

    def feed(self, event: object, mark: bytes) -> None:
        """Give the core an event; keep who asks for what."""
        if isinstance(event, Received) and isinstance(event.message, Pull):
            pull = event.message
            shard = self.server.shards.get((pull.table, pull.shard))
            if shard is not None:
                self._answers.ask(event.peer, pull, shard)
        super().feed(event, mark)

    # ---- effects ---------------------------------------------------------------------------------

    def _send(self, effect: Send) -> Iterable[object]:
        message = effect.message
        if effect.peer == SCHEDULER:
            assert self.scheduler is not None
            self.send(self.scheduler, self.scheduler.up, message)
            return ()
        if isinstance(effect.payload, PartsRef) and isinstance(message, Pulled):
            is_sent = self._send_parts(effect.peer, message, effect.payload)
        else:
            if isinstance(message, Published):
                self._shelves[message.table, message.shard].check_whole(message.version)
                self.checks.on_word(message)
                self._answers.finish(effect.peer, message)
            is_sent = self.send_to(effect.peer, message)
        return () if is_sent else (PeerLost(effect.peer),)

    def _send_parts(self, peer: object, message: Pulled, ref: PartsRef) -> bool:
        """Send parts in as many messages as it pleases. Bytes are safe from now on."""
        shard = self.server.shards[ref.table, ref.shard]
        self._answers.send(peer, message, shard.parts_count)
        if ref.version > shard.version:
            self.network.count("part before its version")
        parts = self._shelves[ref.table, ref.shard].get(ref.version, ref.part, ref.count)
        scenario, rng = self.checks.reference.scenario, self.world.rng
        shared = scenario.shared if parts[0].buffer and parts[0].buffer.is_shared else 0.0
        for piece, cargo in pieces_of(rng, message, parts, shared):
            if not self.send_to(peer, piece, cargo.arrived()):
                return False
        return True

    def _open_shard(self, effect: OpenShard) -> None:
        key = (effect.table, effect.shard)
        if key in self._open:
            raise Violation(f"shard {key} is opened twice")
        self._open[key] = _Open(effect.span.first_block, effect.span.blocks)
        sizes = [stop - start for start, stop in self.server.shards[key].parts]
        name = f"table {effect.table} shard {effect.shard}"
        self._shelves[key] = Shelf(name, sizes, effect.spec.rule is Rule.CONSTANT)

    def _fold(self, effect: FoldPayloads) -> None:
        self.payloads.fold(effect.left, effect.right)

    def _release(self, effect: ReleasePayload) -> None:
        self.payloads.pop(effect.payload)

    def _values(self, parts: list[ReadyPart]) -> list[object]:
        return [None if p.root is None else self.payloads.get(p.root).value for p in parts]

    def _norm(self, effect: ComputeNorm) -> Iterable[object]:
        key = (effect.table, effect.shard)
        shard = self.server.shards[key]
        self.checks.on_roots(shard, effect.round, effect.parts, self._values(effect.parts))
        if [part.part for part in effect.parts] != list(range(shard.parts_count)):
            raise Violation(f"a norm of parts {[part.part for part in effect.parts]}")
        place = self._open[key]
        sums = self.checks.reference.sums(
            effect.table, effect.round, place.first_block, place.blocks
        )
        return (NormComputed(effect.table, effect.shard, effect.round, sums),)

    def _make(self, effect: MakeParts) -> None:
        key = (effect.table, effect.shard)
        shard, shelf, reference = self.server.shards[key], self._shelves[key], self.checks.reference
        self.checks.on_made(shard, effect, self._values(effect.parts))
        is_busy = self.world.rng.random() < reference.scenario.busy
        if is_busy:
            self.network.count("busy")
        for ready in effect.parts:
            value = reference.version(effect.table, shard.parts[ready.part][0], effect.version)
            shelf.put(effect.version, ready.part, value, is_busy)
            if ready.root is not None:
                self.payloads.pop(ready.root)

    def _release_version(self, effect: ReleaseVersion) -> None:
        self._shelves[effect.table, effect.shard].drop(effect.version)
        self.checks.on_released(effect)

    def _record(self, effect: RecordVersion) -> None:
        self._shelves[effect.table, effect.shard].check_whole(effect.version)
        self.checks.on_recorded(effect)

    # ---- checks ----------------------------------------------------------------------------------

    def handles(self) -> int:
        """Payloads in the folds of open rounds; what was made of a part took its root over."""
        return sum(
            held.payload is not None
            for shard in self.server.shards.values()
            if shard.round is not None
            for number, part in enumerate(shard.round.folds)
            if number not in shard.round.made
            for held in part.fold.nodes.values()
        )

    def check(self) -> None:
        """Views grow, and nothing is kept for ever."""
        core = self.server
        if core.view < self._view:
            raise Violation(f"view {core.view} follows view {self._view}")
        self._view = core.view
        for key, shelf in self._shelves.items():
            if len(shelf.versions) > VERSIONS_HELD_MAX:
                raise Violation(f"versions {list(shelf.versions)} of shard {key} are held")
        for shard in core.shards.values():
            if len(shard.waits) > len(self.network.connections) + self.network.closed:
                raise Violation(f"{len(shard.waits)} pulls wait at a shard")
