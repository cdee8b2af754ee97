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
from treefold.common.fold import fold
from treefold.common.ledger import StateRecord, VersionRecord, Writer
from treefold.common.log import logger
from treefold.common.optim import warm_up
from treefold.common.process import ProcessFigures, Spent, random_number
from treefold.server.core import ServerCore, ServerLimits
from treefold.server.digest import block_digests
from treefold.server.effects import (
    ComputeNorm,
    Effect,
    Event,
    FoldPayloads,
    NormComputed,
    OpenShard,
    PartRef,
    PublishVersion,
    RecordVersion,
    ReleasePayload,
    ReleaseVersion,
    ServerDrainAsked,
    ServerFailed,
)
from treefold.server.shard import ShardState, clip_coefficient
from treefold.transport.loop import Loop
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
from treefold.wire.messages import Role

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
        warm_up()
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
        self._loop: Loop[Event, Effect] = Loop(self._hub, self._core, self._perform)
        self._states: dict[tuple[int, int], ShardState] = {}
        self._published: dict[tuple[int, int, int], torch.Tensor] = {}
        self._placed: dict[tuple[int, int], int] = {}
        self._own: dict[int, None] = {}
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
            case FoldPayloads():
                with self._spent.on("fold"):
                    self._fold(effect)
            case ReleasePayload(payload):
                self._release(payload)
            case OpenShard() | ComputeNorm() | PublishVersion():
                return self._guarded(effect)
            case ReleaseVersion(table, shard, version):
                self._hub.pool.give(self._published.pop((table, shard, version)))
            case RecordVersion():
                self._record(effect)
            case Note(level, text):
                self._log.log(level, text)
            case Halt():
                self._halt = self._halt or effect  # what came in the same batch changes nothing
        return []

    def _send(self, effect: Send) -> list[Event]:
        header = encode(effect.message)
        if effect.peer == SCHEDULER:
            self._hub.send(SCHEDULER, None, header)
            return []
        payload = None
        if isinstance(effect.payload, PartRef):
            ref = effect.payload
            if (ref.table, ref.shard, ref.version) not in self._published:
                return []  # the step that should have made it failed, and with it the job
            payload = self._slice(effect.payload)
        key = None if effect.payload is None else (effect.peer, effect.payload)
        if self._hub.send(LISTENER, _identity(effect.peer), header, payload, key):
            return []
        return [PeerLost(effect.peer)]

    def _slice(self, ref: PartRef) -> torch.Tensor:
        parts = self._states[ref.table, ref.shard].parts
        start, stop = parts[ref.part]
        first = parts[0][0]
        return self._published[ref.table, ref.shard, ref.version][start - first : stop - first]

    def _fold(self, effect: FoldPayloads) -> None:
        left, right = self._loop.payloads.get(effect.left), self._loop.payloads.get(effect.right)
        if effect.left in self._own:
            out = left
        else:
            out = self._hub.pool.take(left.numel())
            self._own[effect.left] = None
        fold(left, right, out)
        self._loop.payloads.put(effect.left, out)
        self._release(effect.right)

    def _release(self, payload: int) -> None:
        tensor = self._loop.payloads.pop(payload)
        if payload in self._own:
            del self._own[payload]
            self._hub.pool.give(tensor)

    def _guarded(self, effect: OpenShard | ComputeNorm | PublishVersion) -> list[Event]:
        """Tensor work that may find that what the job asks for cannot be done."""
        try:
            if isinstance(effect, OpenShard):
                self._states[effect.table, effect.shard] = ShardState(effect.spec, effect.span)
            elif isinstance(effect, ComputeNorm):
                return [self._norm(effect)]
            else:
                self._publish(effect)
        except (DataError, UnsupportedError) as error:
            return [ServerFailed(str(error))]
        return []

    def _norm(self, effect: ComputeNorm) -> NormComputed:
        self._place_roots((effect.table, effect.shard), effect.round, effect.roots)
        sums = self._states[effect.table, effect.shard].block_sums()
        return NormComputed(effect.table, effect.shard, effect.round, sums)

    def _place_roots(self, key: tuple[int, int], round_: int, roots: list[int | None]) -> None:
        """Write the roots of a round to the shard's gradient, once."""
        if self._placed.get(key) == round_:
            return
        self._placed[key] = round_
        state = self._states[key]
        with self._spent.on("fold"):
            for part, root in enumerate(roots):
                if root is None:
                    state.clear_gradient(part)
                else:
                    state.gradient_part(part).copy_(self._loop.payloads.get(root))

    def _publish(self, effect: PublishVersion) -> None:
        key = (effect.table, effect.shard)
        state = self._states[key]
        if effect.meta is None:
            state.initialize(
                [self._loop.payloads.get(root) for root in effect.roots if root is not None]
            )
        else:
            self._place_roots(key, effect.meta.round, effect.roots)
            limit = effect.meta.norm_max
            coefficient = clip_coefficient(limit, effect.norm) if limit > 0 else 1.0
            with self._spent.on("optimizer"):
                state.step(effect.meta.groups, effect.absent, coefficient)
        for root in effect.roots:
            if root is not None:
                self._release(root)
        out = self._hub.pool.take(state.parts[-1][1] - state.parts[0][0])
        with self._spent.on("publish"):
            state.copy_to(out)
        self._published[(*key, effect.version)] = out

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
