"""A server process: sockets, tensors and signals around `treefold.server.core`. Decides nothing."""

import os
import signal
import socket as _socket
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata

import msgspec
import torch

from treefold.common import layout as layouts
from treefold.common.audit import Audit
from treefold.common.config import Settings
from treefold.common.errors import AuthError, DataError, UnsupportedError
from treefold.common.failpoints import arm
from treefold.common.fold import Payload
from treefold.common.log import logger
from treefold.common.optim import spare_compiler
from treefold.common.process import (
    ProcessFigures,
    Spent,
    give_back_freed_memory,
    keep_freed_memory,
    random_number,
)
from treefold.common.spec import Dtype, Rule, TableSpec
from treefold.common.unit_state import UnitState, decode_header, encode_header, flat_elements
from treefold.server.core import ServerCore
from treefold.server.delays import Delays
from treefold.server.digest import checksum
from treefold.server.effects import (
    CloseShard,
    ComputeDigest,
    ComputeNorm,
    ComputeProducts,
    Connect,
    CopyUnit,
    CorrectParts,
    DigestComputed,
    Disconnect,
    Effect,
    Event,
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
    RestoreShard,
    SaveShard,
    ScaleParts,
    ServerDrainAsked,
    ServerFailed,
    ShardRestored,
    ShardStored,
    UnitCopied,
)
from treefold.server.figures import ServerTally
from treefold.server.folding import Folding
from treefold.server.handling import Handling, HandlingWork
from treefold.server.limits import ServerLimits
from treefold.server.points import POINTS
from treefold.server.published import Published
from treefold.server.recording import Recording
from treefold.server.saving import Restored, ShardFiles
from treefold.server.shard import FoldedPart, ShardState, clip_coefficient
from treefold.server.statistics import Statistics
from treefold.transport.body import Body
from treefold.transport.carrier import Carrier, Destination, Held
from treefold.transport.hosts import listening, located, told
from treefold.transport.hubs import hub_of
from treefold.transport.lanes import lane_settings
from treefold.transport.loop import Loop
from treefold.transport.outbox import Outbox
from treefold.transport.pool import BufferPool
from treefold.transport.sockets import CONTROL_FRAME_BYTES_MAX, DATA_FRAME_BYTES_MAX, Context
from treefold.transport.watch import watch_for
from treefold.wire.chain import UnitCopy
from treefold.wire.exchange import SCHEDULER, Halt, Note, Peer, PeerLost, Send
from treefold.wire.membership import MS, Identity, Membership
from treefold.wire.messages import AnyMessage, Pulled, Push, Register
from treefold.wire.permissions import KeyRole
from treefold.wire.words import Frame, Role

LISTENER = "listener"
REFUSED_STATUS = 3  # not started, as far as the others are concerned
TensorWork = (
    OpenShard | ComputeNorm | MakeParts | CorrectParts | ScaleParts | ComputeDigest | CopyUnit
    | LoadUnit | HandlingWork
)  # fmt: skip


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
        audit = Audit(settings.audit, "server") if settings.audit else None
        self._hub = hub_of(settings, KeyRole.SERVER, context, audit)
        self._outbox = Outbox(self._hub)
        scheduler = located(settings.scheduler, settings.connect_timeout_s)
        bound = self._hub.listen(
            LISTENER,
            listening(settings.bind),
            insecure=settings.insecure,
            frame_bytes_max=DATA_FRAME_BYTES_MAX,
        )
        self._tell_address = partial(told, bound, settings.advertise, scheduler)
        self.address = self._tell_address()
        self._hub.connect(SCHEDULER, scheduler, CONTROL_FRAME_BYTES_MAX, KeyRole.SCHEDULER)
        who = random_number(), self.address, _socket.gethostname(), os.getpid()
        identity = Identity(Role.SERVER, *who, metadata.version("treefold"), settings.rank)
        patience_ns = int(settings.connect_timeout_s * 1000) * MS
        limits = ServerLimits(patience_ns, check_every=settings.check_every)
        self._core = ServerCore(Membership(identity), limits)
        self._recording = Recording(settings, self._core)
        self._carrier = Carrier(self._outbox, lane_settings(settings))
        self._loop: Loop[Event, Effect] = Loop(
            self._hub, self._outbox, self._core, self._perform, self._carrier
        )
        self._loop.points = POINTS
        self._pool = BufferPool()
        self._widened: list[torch.Tensor] = []
        self._states: dict[tuple[int, int], ShardState] = {}
        self._handling = Handling(self._carrier, self._pool, self._states)
        self._delays: dict[tuple[int, int], Delays] = {}
        self._files = ShardFiles(self._hub.bell.ring)
        self._statistics = Statistics(self._states, self._core.membership, self._hub.bell.ring)
        self._published: dict[tuple[int, int], Published] = {}
        self._halt: Halt | None = None
        self._figures = ProcessFigures()
        self._spent = Spent()
        self._folding = Folding(self._carrier, self._pool, self._handling, self._spent)
        self._log = logger("server")
        self._is_drain_asked = self._is_named = False
        body = Body(self._core.membership, self._carrier, self._spent)
        tally = ServerTally(self._core, body, self._states, self._hub.traffic)
        self._loop.watch = watch_for(settings, Role.SERVER, tally, self._hub.bell.ring)

    @property
    def ending(self) -> str:
        """Why the process ends, once `run` has returned."""
        return "" if self._halt is None else self._halt.text

    def run(self) -> int:
        """Serve until the job ends; returns the exit status."""
        while self._halt is None:
            try:
                self._loop.turn()
            except AuthError as error:
                self._halt = Halt(REFUSED_STATUS, str(error))
                break
            membership = self._core.membership
            if membership.is_member and not self._is_named:
                self._is_named = True
                arm("server", f"server-{membership.rank}")
            vitals = membership.vitals
            if self._figures.sample(time.monotonic_ns()):
                vitals.rss_bytes, vitals.host = self._figures.rss_bytes, self._figures.host
                vitals.cpu_percent = self._figures.cpu_percent
                vitals.spent_ns = self._spent.ns
                self._carrier.lanes.sweep()
            self._statistics.turn(time.monotonic_ns())
            for done in self._files.done():
                self._on_file(done)
            if self._is_drain_asked:
                self._is_drain_asked = False
                self._loop.feed(ServerDrainAsked())
        self._recording.end({} if self._halt.status else self._states)
        self._loop.flush()
        self._files.end()
        self._loop.end_watch()
        self._carrier.lanes.close()
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
            case ReleasePayload(payload):
                events = self._folding.settle([payload])
                self._folding.release(payload)
                return events
            case FoldPayloads():
                self._outbox.flush()  # nobody is to wait for what is ready while this is at work
                return self._folding.fold(effect)
            case CloseShard(table, shard):
                del self._states[table, shard]
                self._delays.pop((table, shard), None)
                self._files.close((table, shard))
                self._folding.forget(table, shard)
                del self._published[table, shard]
            case SaveShard() | RestoreShard():
                return [*self._files.begin(effect, self._states[effect.table, effect.shard])]
            case Connect() | Disconnect():
                self._link(effect)
            case ReleaseVersion(table, shard, version):
                self._published[table, shard].drop(version)
            case RecordVersion():
                self._on_version(effect)
            case Note(level, text):
                self._log.log(level, text)
            case Halt():
                self._halt = self._halt or effect  # what came in the same batch changes nothing
            case _:
                self._outbox.flush()
                return self._guarded(effect)
        return []

    def _on_version(self, effect: RecordVersion) -> None:
        if effect.version == 0:  # the initial values came at once, gradients will come in turn
            give_back_freed_memory()
        self._recording.version(effect)

    def _link(self, effect: Connect | Disconnect) -> None:
        if isinstance(effect, Connect):
            self._hub.connect(effect.server, effect.address, DATA_FRAME_BYTES_MAX)
        else:
            self._hub.disconnect(effect.server)
        self._carrier.lanes.forget(effect.server)

    def _on_file(self, done: ShardStored | Restored) -> None:
        """A file is written or read."""
        event = done.event if isinstance(done, Restored) else done
        if isinstance(done, Restored) and isinstance(event, ShardRestored):
            key = event.table, event.shard
            if self._states.get(key) is not done.state:
                return  # it was closed meanwhile
            self._recording.restored(event, done.state)
            published = self._published[key]
            for part in range(len(done.state.parts)):
                done.state.copy_part(part, published.part(event.version, part))
        self._loop.feed(event)

    def _send(self, effect: Send) -> list[Event]:
        if effect.peer == SCHEDULER:
            message = effect.message
            if isinstance(message, Register):  # this machine may have got another number since
                message = msgspec.structs.replace(message, address=self._tell_address())
            self._outbox.send(SCHEDULER, None, message)
            return []
        if isinstance(effect.payload, PartsRef) and isinstance(effect.message, Pulled):
            is_sent = self._send_parts(effect.peer, effect.message, effect.payload)
            return [] if is_sent else [PeerLost(effect.peer)]
        if isinstance(effect.peer, int):
            self._send_along(effect.peer, effect.message, effect.payload)
            return []
        self._outbox.send(LISTENER, _identity(effect.peer), effect.message)
        return []

    def _send_parts(self, peer: Peer, message: Pulled, ref: PartsRef) -> bool:
        published = self._published[ref.table, ref.shard]
        if ref.version not in published:
            return True  # the step that should have made it failed, and with it the job
        numbers = range(ref.part, ref.part + ref.count)
        payloads = [Payload(published.part(ref.version, number)) for number in numbers]
        buffer = published.key(ref.version)
        to = Destination(LISTENER, peer, published.urgent)
        return self._carrier.send(to, message, payloads, buffer)

    def _send_along(self, server: int, message: AnyMessage, payload: object) -> None:
        """Send to another server of a chain; what does not arrive is asked for again."""
        if isinstance(message, Push | UnitCopy) and isinstance(payload, tuple):
            payloads = [self._carrier.held(number).payload for number in payload]
            self._carrier.send(Destination(server, server), message, payloads)
        else:
            self._outbox.send(server, None, message)

    def _guarded(self, effect: TensorWork) -> list[Event]:
        """Tensor work that may find that what the job asks for cannot be done."""
        try:
            if isinstance(effect, HandlingWork):
                return self._handle(effect)
            if isinstance(effect, OpenShard):
                self._open(effect)
            elif isinstance(effect, ComputeNorm):
                return [self._norm(effect)]
            elif isinstance(effect, CopyUnit):
                return [self._copy(effect)]
            elif isinstance(effect, ComputeDigest):
                digest = checksum(self._states[effect.table, effect.shard])
                return [DigestComputed(effect.table, effect.shard, effect.version, digest)]
            elif isinstance(effect, LoadUnit):
                self._load(effect)
            elif isinstance(effect, CorrectParts | ScaleParts):
                self._revise(effect)
            else:
                events = self._folding.settle(ready.root for ready in effect.parts)
                self._make(effect)
                return events
        except (DataError, UnsupportedError) as error:
            return [ServerFailed(str(error))]
        return []

    def _handle(self, effect: HandlingWork) -> list[Event]:
        if isinstance(effect, ComputeProducts) and self._spec_of(effect).is_watched:
            return self._folding.measure(effect)
        with self._spent.on("health"):
            return self._handling.perform(effect)

    def _spec_of(self, effect: ComputeProducts) -> TableSpec:
        return self._states[effect.table, effect.shard].spec

    def _open(self, effect: OpenShard) -> None:
        key = effect.table, effect.shard
        state = ShardState(effect.spec, effect.span)
        self._carrier.lanes.name = f"treefold-{self._core.membership.job:x}-server"
        self._states[key] = state
        self._recording.opened(effect)
        if effect.spec.is_asynchronous and effect.spec.consistency.compensation.is_delayed:
            self._delays[key] = Delays(state, effect.spec.consistency)
        is_constant, is_shared = effect.spec.rule is Rule.CONSTANT, not effect.spec.is_asynchronous
        self._published[key] = Published(
            self._carrier, state.layout, state.parts, is_constant=is_constant, is_shared=is_shared
        )
        for peer in self._carrier.lanes.local_peers():
            self._carrier.offer(LISTENER, peer)

    def _norm(self, effect: ComputeNorm) -> NormComputed:
        folded = [self._folded(ready) for ready in effect.parts]
        sums = self._states[effect.table, effect.shard].block_sums(folded)
        return NormComputed(effect.table, effect.shard, effect.round, sums)

    def _folded(self, ready: ReadyPart, *, is_kept: bool = False) -> FoldedPart:
        """A root's values in float32, in our own memory; a root that ``is_kept`` stays as it is."""
        if ready.root is None:
            return FoldedPart(ready.part, None, ready.absent)
        held = self._carrier.held(ready.root)
        tensor, scale = held.payload
        if held.owner is None:
            own = self._pool.take(tensor.numel(), tensor.dtype)
            if tensor.dtype == torch.float32:
                torch.mul(tensor, scale, out=own)
            else:
                own.copy_(tensor)  # narrow nodes are scaled before they are rounded, by the worker
            held = Held(Payload(own), own)
            self._carrier.put(ready.root, held)
        tensor = held.payload.tensor
        if tensor.dtype != torch.float32:
            wide = self._pool.take(tensor.numel())
            wide.copy_(tensor)
            tensor = wide
            if is_kept:
                self._widened.append(wide)
            else:
                if held.owner is not None:
                    self._pool.give(held.owner)
                self._carrier.put(ready.root, Held(Payload(wide), wide))
        return FoldedPart(ready.part, tensor, ready.absent)

    def _make(self, effect: MakeParts) -> None:
        key = effect.table, effect.shard
        state, published = self._states[key], self._published[key]
        is_kept = effect.keeps_roots
        with self._spent.on("checkpoint"):
            self._files.keep(key, [state.unit_of(ready.part) for ready in effect.parts])
        with self._spent.on("optimizer"):
            if effect.groups is None:
                self._initialize(state, effect)
            else:
                if key in self._delays:
                    for ready in effect.parts:
                        self._delays[key].keep(ready.part, effect.version - 1)
                folded = [self._folded(ready, is_kept=is_kept) for ready in effect.parts]
                limit = effect.norm_max
                coefficient = clip_coefficient(limit, effect.norm) if limit > 0 else 1.0
                self._recording.step(effect, folded, coefficient)
                self._statistics.see(key, folded)
                state.step(folded, effect.groups, coefficient)
        with self._spent.on("publish"):
            for ready in effect.parts:
                state.copy_part(ready.part, published.part(effect.version, ready.part))
                if ready.root is not None and not is_kept:
                    self._folding.release(ready.root)
        while self._widened:
            self._pool.give(self._widened.pop())

    def _revise(self, effect: CorrectParts | ScaleParts) -> None:
        """Change what is applied, to values of its wire type, which copies get as well."""
        key = effect.table, effect.shard
        is_all = isinstance(effect, CorrectParts) or effect.is_all
        for ready in effect.parts:
            first = 0 if is_all else self._states[key].trained(ready.part)
            if first == self._states[key].values(ready.part).numel():
                continue  # nothing of it is a buffer
            gradient = self._folded(ready, is_kept=True).gradient
            if gradient is None or ready.root is None:
                continue
            if isinstance(effect, ScaleParts):
                gradient[first:].mul_(effect.factor)
            else:
                self._delays[key].correct(ready.part, gradient, effect.base, effect.active)
            self._carrier.held(ready.root).payload.tensor.copy_(gradient)
        while self._widened:
            self._pool.give(self._widened.pop())

    def _copy(self, effect: CopyUnit) -> UnitCopied:
        """The state of a unit, as slices of one buffer."""
        key = effect.table, effect.shard
        header, flat = self._states[key].export_unit(effect.unit)
        if effect.older is not None:
            published = self._published[key]
            older = [published.part(effect.older, part).float() for part in effect.parts]
            flat = torch.cat([flat, *older])
        slices = torch.split(flat, layouts.PART_BLOCKS_MAX * layouts.BLOCK_ELEMENTS)
        payloads = tuple(self._carrier.hold(Held(Payload(one), None)) for one in slices)
        which = effect.table, effect.shard, effect.member, effect.unit
        frame, has_older = Frame(Dtype.FLOAT32, flat.numel()), effect.older is not None
        return UnitCopied(*which, encode_header(header), payloads, frame, has_older)

    def _load(self, effect: LoadUnit) -> None:
        """Take over a unit that another server has copied here."""
        key = effect.table, effect.shard
        held = [self._carrier.drop(payload) for payload in effect.payloads]
        flat = torch.cat([one.payload.tensor for one in held])
        header = decode_header(effect.header)
        state, published = self._states[key], self._published[key]
        own, older = flat[: flat_elements(header)], flat[flat_elements(header) :]
        state.import_unit(effect.unit, UnitState(header, own))
        at = 0
        for part in effect.parts:
            state.copy_part(part, published.part(effect.version, part))
            if effect.is_older_kept:
                start, stop = state.parts[part]
                published.part(effect.version - 1, part).copy_(older[at : at + stop - start])
                at += stop - start

    def _initialize(self, state: ShardState, effect: MakeParts) -> None:
        folded: list[FoldedPart] = []
        for ready in effect.parts:
            if ready.root is not None:
                tensor, scale = self._carrier.held(ready.root).payload
                values = tensor if scale == 1.0 else tensor * scale
                state.initialize(ready.part, values)
                folded.append(FoldedPart(ready.part, values, ready.absent))
        self._recording.step(effect, folded, 1.0)


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
    arm("server")
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


def _identity(peer: Peer) -> bytes:
    return peer if isinstance(peer, bytes) else b""
