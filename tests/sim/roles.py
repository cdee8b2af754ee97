"""The scheduler's and the servers' processes."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from tests.sim.answers import Answers
from tests.sim.checks import Checks
from tests.sim.disk import Disk
from tests.sim.files import Holdings, Manifests, ShardFiles
from tests.sim.guarded import measured
from tests.sim.memory import NOTHING, Cargo, Memory, Origin, Shelf, pieces_of
from tests.sim.network import Connection, End, Network
from tests.sim.process import Process
from tests.sim.vault import Vault
from tests.sim.world import Violation
from treefold.common.spec import Dtype, Rule
from treefold.scheduler import memory, records
from treefold.scheduler.core import SchedulerCore
from treefold.scheduler.effects import (
    Persist,
    Rewrite,
)
from treefold.scheduler.journal import HEADER, frame
from treefold.server.core import ServerCore
from treefold.server.effects import (
    CloseShard,
    ComputeDigest,
    ComputeNorm,
    ComputeProducts,
    Connect,
    CopyUnit,
    DigestComputed,
    Disconnect,
    FoldPayloads,
    LoadUnit,
    MakeParts,
    NormComputed,
    OpenShard,
    PartsRef,
    ReadyPart,
    RecordVersion,
    ReleasePayload,
    ReleaseVersion,
    ScaleParts,
    UnitCopied,
)
from treefold.wire.chain import UnitCopy
from treefold.wire.codec import decode
from treefold.wire.decisions import QuorumDecision
from treefold.wire.exchange import SCHEDULER, PeerLost, Received, Send
from treefold.wire.messages import (
    AnyMessage,
    Published,
    Pull,
    Pulled,
    Push,
    StatusReply,
    StatusRequest,
    View,
)
from treefold.wire.words import Frame, Phase

JOURNAL = "journal"
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

    def __init__(
        self, core: SchedulerCore, network: Network, disk: Disk, checks: Checks, vault: Vault
    ) -> None:
        super().__init__("scheduler", core, network)
        self.scheduler = core
        self.disk = disk
        self.checks = checks
        self.acts |= {
            Send: self._send,
            Persist: self._persist,
            Rewrite: self._rewrite,
        }
        self.acts |= Manifests(self, core, vault, checks).acts()
        self._view = 0
        self._seen = (-1, -1)
        self.told = 0  # the newest view that anybody was sent
        self.is_formed = False  # whether anybody was told that the cluster has formed

    def _send(self, effect: Send) -> None:
        self._see_era()  # by now it is written down
        if isinstance(effect.message, View):
            self.told = max(self.told, effect.message.number)
            self.is_formed |= effect.message.phase is not Phase.FORMING
        if isinstance(effect.message, QuorumDecision):
            self.network.count("decided")
            self.checks.on_decided(effect.message)
        if self.disk.read(JOURNAL):
            self.disk.sync(JOURNAL)
        self.send_to(effect.peer, effect.message)

    def _see_era(self) -> None:
        era = self.scheduler.view.era
        if era > max(self.checks.rollbacks, default=0):
            self.network.count("rolled back")
            self.checks.roll_back(era)

    def _persist(self, effect: Persist) -> None:
        self.network.count("journaled")
        if not self.disk.read(JOURNAL):
            self.disk.rewrite(JOURNAL, HEADER)
            self.disk.sync(JOURNAL)
        self.disk.append(JOURNAL, frame(records.encode(effect.records)))

    def _rewrite(self, effect: Rewrite) -> None:
        self.network.count("journal rewritten")
        self.disk.rewrite(JOURNAL, HEADER + frame(records.encode(effect.records)))
        self.disk.sync(JOURNAL)

    def take_up(self, before: "SchedulerProcess", found: list[records.Record]) -> None:
        """Go on with what another one wrote down; its connections lead here from now on."""
        if found:  # else nobody was told anything yet
            memory.take_up(self.scheduler, found)
        self._see_era()
        self._view = self.told = before.told
        self.is_formed = before.is_formed
        if self.scheduler.view.number < before.told:
            number = self.scheduler.view.number
            raise Violation(f"the journal ends at view {number}, members have {before.told}")
        for connection in self.network.connections.values():
            if connection.up.target == self.name:
                connection.up.receive = self.receive

    def is_to_be_checked(self, is_busy: bool, is_holding: bool) -> bool:
        """Only views and members can contradict each other."""
        del is_busy, is_holding
        state = (self.scheduler.view.number, self.scheduler.roster.changes)
        is_other, self._seen = state != self._seen, state
        return is_other

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


class Copied(NamedTuple):
    """The symbol of a unit's state, of its values, and of those in the version before."""

    version: int
    value: object
    older: object


@dataclass(frozen=True, slots=True, eq=False)
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
        self._shelves: dict[tuple[int, int], Shelf] = {}
        self._answers = Answers()
        self._links: dict[int, Connection] = {}
        self._states: dict[tuple[int, int], dict[int, int]] = {}
        self._names: dict[tuple[int, int], dict[int, object]] = {}
        self._led = (0, 0, 0)
        self.servers: Callable[[], Mapping[str, Listener]] = dict
        self.acts |= {
            Send: self._send,
            OpenShard: self._open_shard,
            FoldPayloads: self._fold,
            ReleasePayload: self._release,
            ComputeNorm: self._norm,
            MakeParts: self._make,
            ScaleParts: self._scale,
            ComputeProducts: partial(measured, self),
            ComputeDigest: self._digest,
            CopyUnit: self._copy,
            LoadUnit: self._load,
            CloseShard: self._close_shard,
            Connect: self._connect,
            Disconnect: self._disconnect,
            ReleaseVersion: self._release_version,
            RecordVersion: self._record,
        }
        held = Holdings(self._open, self._shelves, self._states, self._names)
        self.files = ShardFiles(self, core, checks, held)
        self.acts |= self.files.acts()

    def feed(self, event: object, mark: bytes) -> None:
        """Give the core an event; keep who asks for what."""
        if isinstance(event, Received) and isinstance(event.message, Pull):
            pull = event.message
            shard = self.server.shards.get((pull.table, pull.shard))
            if shard is not None and shard.chain.is_primary and pull.view >= shard.view:
                self._answers.ask(event.peer, pull, shard)
        super().feed(event, mark)
        led = (self.server.view, self.server.membership.incarnation, len(self.server.shards))
        if led != self._led:
            self._led = led
            if self.server.membership.incarnation:
                self.checks.servers[self.server.membership.incarnation] = None
            shards = self.server.shards.items()
            self._answers.keep({key for key, one in shards if one.chain.is_primary})

    # ---- effects ---------------------------------------------------------------------------------

    def _send(self, effect: Send) -> Iterable[object]:
        message = effect.message
        if effect.peer == SCHEDULER:
            assert self.scheduler is not None
            self.send(self.scheduler, self.scheduler.up, message)
            return ()
        if isinstance(effect.peer, int):
            self._send_along(effect.peer, message, effect.payload)
            return ()
        if isinstance(effect.payload, PartsRef) and isinstance(message, Pulled):
            is_sent = self._send_parts(effect.peer, message, effect.payload)
        else:
            if isinstance(message, Published):
                self.checks.on_word(self.server.view, message)
                if message.is_whole:
                    self._shelves[message.table, message.shard].check_whole(message.version)
                    self._answers.finish(effect.peer, message)
            is_sent = self.send_to(effect.peer, message)
        return () if is_sent else (PeerLost(effect.peer),)

    def _send_along(self, server: int, message: AnyMessage, payload: object) -> None:
        """Send to another server of a chain."""
        link = self._links[server]
        if not isinstance(payload, tuple):
            self.send(link, link.up, message)
            return
        assert isinstance(message, Push | UnitCopy)
        self.network.count("relayed" if isinstance(message, Push) else "copied")
        parts = [self.payloads.send(handle) for handle in payload]
        for piece, cargo in pieces_of(self.world.rng, message, parts, 0.0):
            self.send(link, link.up, piece, cargo.arrived())

    def _connect(self, effect: Connect) -> None:
        target = self.servers().get(effect.address)
        if effect.server in self._links:
            raise Violation(f"a second link to server {effect.server}")
        if target is None:
            raise Violation(f"no server at {effect.address}")
        number = len(self._links) + 1_000 * self.network.opened()
        self._links[effect.server] = connect(self, target, effect.server, number)

    def _disconnect(self, effect: Disconnect) -> None:
        self.network.close(self._links.pop(effect.server))

    def die(self) -> None:
        """Stop at once, without a word."""
        super().die()
        self._hang_up()

    def _hang_up(self) -> None:
        for link in self._links.values():
            self.network.close(link)
        if self.scheduler is not None:
            self.network.close(self.scheduler)

    def _send_parts(self, peer: object, message: Pulled, ref: PartsRef) -> bool:
        """Send parts in as many messages as it pleases. Bytes are safe from now on."""
        shard = self.server.shards[ref.table, ref.shard]
        self._answers.send(peer, message, shard.parts_count)
        if ref.version > shard.version:
            self.network.count("part before its version")
        parts = self._shelves[ref.table, ref.shard].get(ref.version, ref.part, ref.count)
        scenario, rng = self.checks.reference.scenario, self.world.rng
        is_shared = parts[0].buffer is not None and parts[0].buffer.is_shared
        is_shared &= not shard.spec.is_asynchronous
        shared = scenario.shared if is_shared else 0.0
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
        self._states[key] = dict.fromkeys(range(len(sizes)), -1)
        self._names[key] = {}
        self.checks.on_opened(self.server.shards[key])

    def _close_shard(self, effect: CloseShard) -> None:
        key = (effect.table, effect.shard)
        del self._open[key], self._shelves[key], self._states[key], self._names[key]

    def _digest(self, effect: ComputeDigest) -> Iterable[object]:
        """The versions of all parts stand for what a checksum is made of."""
        self.network.count("digest")
        states = self._states[effect.table, effect.shard]
        if any(version != effect.version for version in states.values()):
            raise Violation(f"{effect} of parts at {states}")
        names = self._names[effect.table, effect.shard]
        digest = hashlib.sha256(repr([names[part] for part in states]).encode()).digest()
        return (DigestComputed(effect.table, effect.shard, effect.version, digest),)

    def _copy(self, effect: CopyUnit) -> Iterable[object]:
        """What an optimizer keeps of a part is a symbol of the version that it is at."""
        key = (effect.table, effect.shard)
        shard = self.server.shards[key]
        memories = []
        for part in effect.parts:
            start, stop = shard.parts[part]
            version = self._states[key][part]
            older = None
            if effect.older is not None:
                older = self._shelves[key].get(effect.older, part, 1)[0].value
            value = Copied(version, self._names[key][part], older)
            memories.append(Memory(value, stop - start))
        frame = Frame(Dtype.FLOAT32, sum(memory.elements for memory in memories))
        handles = tuple(self.payloads.add(memory, Origin.OWN) for memory in memories)
        has_older = effect.older is not None
        which = effect.table, effect.shard, effect.member, effect.unit
        return (UnitCopied(*which, b"", handles, frame, has_older),)

    def _load(self, effect: LoadUnit) -> None:
        key, is_version = (effect.table, effect.shard), self.checks.is_version
        self.checks.enter(self.server.view)
        shard, shelf = self.server.shards[key], self._shelves[key]
        self.network.count("loaded")
        for part, payload in zip(effect.parts, effect.payloads, strict=True):
            copied = self.payloads.pop(payload).value
            assert isinstance(copied, Copied)
            version, value, older = copied
            start, _ = shard.parts[part]
            where = f"part {part} of table {effect.table} shard {effect.shard}"
            if version != effect.version or (older is not None) != effect.has_older:
                raise Violation(f"{where} is copied at version {version}, and said to be {effect}")
            if not is_version((*key, start), part, version, value):
                raise Violation(f"{where} is copied as {value}")
            self._states[key][part], self._names[key][part] = version, value
            shelf.put(version, part, value, is_busy=False)
            if effect.is_older_kept:
                if not is_version((*key, start), part, version - 1, older):
                    raise Violation(f"{where} was {older} in the version before {version}")
                shelf.put(version - 1, part, older, is_busy=False)

    def _fold(self, effect: FoldPayloads) -> None:
        self.payloads.fold(effect.left, effect.right)

    def _release(self, effect: ReleasePayload) -> None:
        self.payloads.pop(effect.payload)

    def _scale(self, effect: ScaleParts) -> None:
        self.network.count("left out")
        parts = self.server.shards[effect.table, effect.shard].parts
        for ready in effect.parts:
            has_buffers = self.checks.reference.has_buffers(effect.table, *parts[ready.part])
            if ready.root is not None and (effect.is_all or has_buffers):
                self.payloads.keep(ready.root)
                memory = self.payloads.get(ready.root)
                memory.value = ("scaled", memory.value, effect.factor)

    def _values(self, parts: list[ReadyPart]) -> list[object]:
        return [None if p.root is None else self.payloads.get(p.root).value for p in parts]

    def _norm(self, effect: ComputeNorm) -> Iterable[object]:
        key = (effect.table, effect.shard)
        shard = self.server.shards[key]
        self.checks.enter(self.server.view)
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
        self.checks.on_made(self.server.view, shard, effect, self._values(effect.parts))
        is_busy = self.world.rng.random() < reference.scenario.busy
        if is_busy:
            self.network.count("busy")
        roots = self._values(effect.parts)
        for ready, root in zip(effect.parts, roots, strict=True):
            before = self._names[key].get(ready.part)
            value = self.checks.name(shard, ready.part, effect, before, root)
            self._names[key][ready.part] = value
            shelf.put(effect.version, ready.part, value, is_busy)
            if self._states[key][ready.part] != effect.version - 1:
                raise Violation(f"{effect} steps from version {self._states[key][ready.part]}")
            self._states[key][ready.part] = effect.version
            if ready.root is not None and not effect.keeps_roots:
                self.payloads.pop(ready.root)
            elif ready.root is not None:
                self.payloads.keep(ready.root)

    def _release_version(self, effect: ReleaseVersion) -> None:
        self._shelves[effect.table, effect.shard].drop(effect.version)
        self.checks.on_released(self.server.view, effect)

    def _record(self, effect: RecordVersion) -> None:
        key = (effect.table, effect.shard)
        if not self.server.shards[key].chain.is_joining:
            self._shelves[key].check_whole(effect.version)
        if effect.is_primary:
            self.checks.on_recorded(self.server.view, effect, self.server.shards[key])

    # ---- checks ----------------------------------------------------------------------------------

    def handles(self) -> int:
        """Payloads in the folds of open rounds, roots that are kept, and copies on their way."""
        count = 0
        for shard in self.server.shards.values():
            rounds = [one for one in (shard.round, shard.last) if one is not None]
            count += len(shard.round.payloads()) if shard.round is not None else 0
            staged = [held for one in shard.staged.values() for held in one.parts.values()]
            count += sum(held.payload is not None for held in staged)
            count += sum(r.root is not None for one in rounds for r in one.roots.values())
            copies = shard.chain.copies.values()
            count += sum(len(one.payloads) for c in copies for one in c.flying.values())
            count += sum(len(incoming.slices) for incoming in shard.incoming.values())
        return count

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
