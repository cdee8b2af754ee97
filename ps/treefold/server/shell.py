"""A server process: sockets, tensors and signals around `treefold.server.core`. Decides nothing."""

import os
import signal
import socket as _socket
import time
from collections.abc import Callable
from importlib import metadata

import torch

from treefold.common.config import Settings
from treefold.common.errors import DataError, UnsupportedError
from treefold.common.fold import Folder, Payload
from treefold.common.ledger import StateRecord, VersionRecord, Writer
from treefold.common.log import logger
from treefold.common.optim import spare_compiler
from treefold.common.process import ProcessFigures, Spent, keep_freed_memory, random_number
from treefold.common.spec import Rule
from treefold.server.core import ServerCore, ServerLimits
from treefold.server.digest import block_digests
from treefold.server.effects import (
    ComputeNorm,
    Effect,
    Event,
    FoldPayloads,
    MakeParts,
    NormComputed,
    OpenShard,
    PartsRef,
    ReadyPart,
    RecordVersion,
    ReleasePayload,
    ReleaseVersion,
    ServerDrainAsked,
    ServerFailed,
)
from treefold.server.published import Published
from treefold.server.shard import FoldedPart, ShardState, clip_coefficient
from treefold.transport.carrier import Carrier, Destination, Held
from treefold.transport.lanes import lane_settings
from treefold.transport.loop import Loop
from treefold.transport.pool import BufferPool
from treefold.transport.sockets import (
    CONTROL_FRAME_BYTES_MAX,
    DATA_FRAME_BYTES_MAX,
    Arrival,
    Context,
    Hub,
    advertised,
)
from treefold.wire.codec import encode
from treefold.wire.exchange import SCHEDULER, Halt, Note, Peer, PeerLost, Send
from treefold.wire.membership import MS, Identity, Membership
from treefold.wire.messages import Pulled, Role

LISTENER = "listener"


class ServerShell:
    """One server, in a process or a thread of its own.

    Parameters
    ----------
    settings : Settings
        Where to listen, where the scheduler is.
    context : Context, optional
        Shared with other roles when several live in one process.
    """

    def __init__(self, settings: Settings, context: Context | None = None) -> None:
        self._settings = settings
        spare_compiler()
        self._hub = Hub(context)
        bound = self._hub.listen(
            LISTENER,
            settings.bind,
            insecure=settings.insecure,
            frame_bytes_max=DATA_FRAME_BYTES_MAX,
        )
        self.address = advertised(bound, settings.advertise)
        self._hub.connect(SCHEDULER, settings.scheduler, CONTROL_FRAME_BYTES_MAX)
        identity = Identity(
            Role.SERVER,
            random_number(),
            self.address,
            _socket.gethostname(),
            os.getpid(),
            metadata.version("treefold"),
            settings.rank,
        )
        limits = ServerLimits(int(settings.connect_timeout_s * 1000) * MS)
        self._core = ServerCore(Membership(identity), limits)
        self._carrier = Carrier(self._hub, lane_settings(settings))
        self._loop: Loop[Event, Effect] = Loop(self._hub, self._core, self._perform, self._carrier)
        self._pool = BufferPool()
        self._folder = Folder()
        self._states: dict[tuple[int, int], ShardState] = {}
        self._published: dict[tuple[int, int], Published] = {}
        self._halt: Halt | None = None
        self._figures = ProcessFigures()
        self._spent = Spent()
        self._log = logger("server")
        self._ledger: Writer | None = None
        self._is_drain_asked = False

    @property
    def ending(self) -> str:
        """Why the process ends, once `run` has returned."""
        return "" if self._halt is None else self._halt.text

    def run(self) -> int:
        """Serve until the job ends; returns the exit status."""
        while self._halt is None:
            self._loop.turn(_peer_of)
            vitals = self._core.membership.vitals
            if self._figures.sample(time.monotonic_ns()):
                vitals.rss_bytes = self._figures.rss_bytes
                vitals.cpu_percent = self._figures.cpu_percent
                vitals.spent_ns = self._spent.ns
            if self._is_drain_asked:
                self._is_drain_asked = False
                self._loop.feed(ServerDrainAsked())
        if self._ledger is not None:
            if not self._halt.status:
                self._record_states(self._ledger)
            self._ledger.close()
        self._hub.close()
        return self._halt.status

    def drain(self) -> None:
        """Ask the server to stop; may be called from a signal handler or another thread."""
        self._is_drain_asked = True
        self._hub.bell.ring()

    # ---- effects ------------------------------------------------------------------------------

    def _perform(self, effect: Effect) -> list[Event]:
        match effect:
            case Send():
                return self._send(effect)
            case FoldPayloads(left, right):
                with self._spent.on("fold"):
                    self._fold(left, right)
            case ReleasePayload(payload):
                self._release(payload)
            case OpenShard() | ComputeNorm() | MakeParts():
                return self._guarded(effect)
            case ReleaseVersion(table, shard, version):
                self._published[table, shard].drop(version)
            case RecordVersion():
                self._record(effect)
            case Note(level, text):
                self._log.log(level, text)
            case Halt():
                self._halt = self._halt or effect  # what came in the same batch changes nothing
        return []

    def _send(self, effect: Send) -> list[Event]:
        if effect.peer == SCHEDULER:
            self._hub.send(SCHEDULER, None, encode(effect.message))
            return []
        if isinstance(effect.payload, PartsRef) and isinstance(effect.message, Pulled):
            is_sent = self._send_parts(effect.peer, effect.message, effect.payload)
        else:
            is_sent = self._hub.send(LISTENER, _identity(effect.peer), encode(effect.message))
        return [] if is_sent else [PeerLost(effect.peer)]

    def _send_parts(self, peer: Peer, message: Pulled, ref: PartsRef) -> bool:
        published = self._published[ref.table, ref.shard]
        if ref.version not in published:
            return True  # the step that should have made it failed, and with it the job
        numbers = range(ref.part, ref.part + ref.count)
        payloads = [Payload(published.part(ref.version, number)) for number in numbers]
        buffer = published.buffer(ref.version).data_ptr()
        return self._carrier.send(Destination(LISTENER, peer), message, payloads, buffer)

    def _fold(self, left: int, right: int) -> None:
        one, other = self._carrier.held(left), self._carrier.held(right)
        out = one.owner
        if out is None:
            tensor = one.payload.tensor
            out = self._pool.take(tensor.numel(), tensor.dtype)
        self._folder.fold(one.payload, other.payload, out)
        self._carrier.put(left, Held(Payload(out), out))
        self._release(right)

    def _release(self, payload: int) -> None:
        owner = self._carrier.drop(payload).owner
        if owner is not None:
            self._pool.give(owner)

    def _guarded(self, effect: OpenShard | ComputeNorm | MakeParts) -> list[Event]:
        """Tensor work that may find that what the job asks for cannot be done."""
        try:
            if isinstance(effect, OpenShard):
                self._open(effect)
            elif isinstance(effect, ComputeNorm):
                return [self._norm(effect)]
            else:
                self._make(effect)
        except (DataError, UnsupportedError) as error:
            return [ServerFailed(str(error))]
        return []

    def _open(self, effect: OpenShard) -> None:
        key = effect.table, effect.shard
        state = ShardState(effect.spec, effect.span)
        self._carrier.lanes.name = f"treefold-{self._core.membership.job:x}-server"
        is_constant = effect.spec.rule is Rule.CONSTANT
        self._states[key] = state
        self._published[key] = Published(
            self._carrier, state.layout, state.parts, is_constant=is_constant
        )
        for peer in self._carrier.lanes.local_peers():
            self._carrier.offer(LISTENER, peer)

    def _norm(self, effect: ComputeNorm) -> NormComputed:
        folded = [self._folded(ready) for ready in effect.parts]
        sums = self._states[effect.table, effect.shard].block_sums(folded)
        return NormComputed(effect.table, effect.shard, effect.round, sums)

    def _folded(self, ready: ReadyPart) -> FoldedPart:
        """A root's values, in memory of our own."""
        if ready.root is None:
            return FoldedPart(ready.part, None, ready.absent)
        held = self._carrier.held(ready.root)
        tensor, scale = held.payload
        if held.owner is None or tensor.dtype != torch.float32:
            out = self._pool.take(tensor.numel())
            if tensor.dtype == torch.float32:
                torch.mul(tensor, scale, out=out)
            else:
                out.copy_(tensor)  # narrow nodes are scaled before they are rounded, by the worker
            if held.owner is not None:
                self._pool.give(held.owner)
            held = Held(Payload(out), out)
            self._carrier.put(ready.root, held)
        return FoldedPart(ready.part, held.payload.tensor, ready.absent)

    def _make(self, effect: MakeParts) -> None:
        key = effect.table, effect.shard
        state, published = self._states[key], self._published[key]
        with self._spent.on("optimizer"):
            folded = [self._folded(ready) for ready in effect.parts]
            if effect.groups is None:
                for part in folded:
                    if part.gradient is not None:
                        state.initialize(part.part, part.gradient)
            else:
                limit = effect.norm_max
                coefficient = clip_coefficient(limit, effect.norm) if limit > 0 else 1.0
                state.step(folded, effect.groups, coefficient)
        with self._spent.on("publish"):
            for ready in effect.parts:
                state.copy_part(ready.part, published.part(effect.version, ready.part))
                if ready.root is not None:
                    self._release(ready.root)

    def _record(self, effect: RecordVersion) -> None:
        if not self._settings.ledger:
            return
        if self._ledger is None:
            name = f"server-{self._core.membership.incarnation}"
            self._ledger = Writer(self._settings.ledger, name)
        self._ledger.add(
            VersionRecord(effect.table, effect.shard, effect.version, effect.contributors)
        )

    def _record_states(self, ledger: Writer) -> None:
        """What this server holds at the end of the job."""
        for (table, shard), state in self._states.items():
            version = self._core.shards[table, shard].version
            first = self._core.places[table, shard].first_block
            ledger.add(StateRecord(table, shard, version, first, block_digests(state)))


def main(settings: Settings, announce: Callable[[str], None]) -> int:
    """Run a server in this process until the job ends.

    Parameters
    ----------
    settings : Settings
        Where to listen, where the scheduler is.
    announce : callable
        Told the bound address before anything else happens.

    Returns
    -------
    int
        Exit status.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    shell = ServerShell(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _drain_once(shell))
    announce(shell.address)
    status = shell.run()
    if status:
        logger("server").error(shell.ending)
    return status


def _drain_once(shell: ServerShell) -> None:
    """First signal: drain. Second: the default, which ends the process at once."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    shell.drain()


def _peer_of(arrival: Arrival) -> Peer:
    return arrival.sender


def _identity(peer: Peer) -> bytes:
    return peer if isinstance(peer, bytes) else b""
