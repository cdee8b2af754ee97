"""A worker's I/O thread: sockets and tensors around `treefold.worker.core`. Decides nothing.

The training thread puts events into a queue and rings a bell; this thread alone touches sockets.
"""

import os
import queue
import socket as _socket
import threading
import time
from collections import deque
from dataclasses import dataclass
from importlib import metadata

import msgspec
import torch

from treefold.common.config import Settings
from treefold.common.errors import AuthError
from treefold.common.failpoints import arm
from treefold.common.fold import Folder, Payload
from treefold.common.log import logger
from treefold.common.process import ProcessFigures, Spent, keep_freed_memory, random_number
from treefold.transport.access import access_of
from treefold.transport.body import Body
from treefold.transport.carrier import Carrier, Destination, Held
from treefold.transport.hosts import located
from treefold.transport.lanes import lane_settings
from treefold.transport.loop import Loop
from treefold.transport.outbox import Outbox
from treefold.transport.segments import Segment
from treefold.transport.sockets import (
    CONTROL_FRAME_BYTES_MAX,
    DATA_FRAME_BYTES_MAX,
    Context,
    Hub,
)
from treefold.transport.watch import watch_for
from treefold.wire.exchange import SCHEDULER, Note, Send
from treefold.wire.membership import MS, Identity, Membership
from treefold.wire.messages import Push
from treefold.wire.permissions import KeyRole
from treefold.wire.words import Role
from treefold.worker import handed
from treefold.worker.arrivals import Arrivals
from treefold.worker.core import WorkerCore
from treefold.worker.effects import (
    Aligned,
    Arrived,
    Complete,
    Connect,
    Contributed,
    Disconnect,
    Effect,
    Event,
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
from treefold.worker.figures import WorkerTally
from treefold.worker.flats import Flats
from treefold.worker.limits import WorkerLimits
from treefold.worker.points import POINTS

FRAMED_VERSIONS = 8  # that came by sockets, before memory is kept for those to come


@dataclass(frozen=True, slots=True)
class Tensors:
    """One version of a table with its tensors: ``(start, stop, values)`` per part.

    ``segments`` are the servers' ones in which some of them lie; a server that has gone on writes
    other versions there. ``arrivals`` brings the parts of a snapshot that has none.
    """

    snapshot: Snapshot
    parts: list[tuple[int, int, torch.Tensor]]
    segments: list[Segment]
    arrivals: Arrivals | None = None


@dataclass(frozen=True, slots=True)
class Values:
    """The tensor of a contribution.

    Attributes
    ----------
    flat : Tensor, of the parts' wire type [parts]
        The values of adjacent parts, not scaled yet.
    scale : float
        What they are multiplied with.
    owner : Tensor or None
        The buffer from `Flats.take` that they lie in. None if it is lent: the script's own gradient
        buffer, which it does not write to while `Settle` says that it is in use.
    """

    flat: torch.Tensor
    scale: float
    owner: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Settle:
    """The script asks whether anything that it lent is in use; everything before it is done."""

    call: int


@dataclass(frozen=True, slots=True)
class GiveBack:
    """The script contributes nothing more from this buffer, which `Flats.take` gave it."""

    flat: torch.Tensor


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call came to: a value with the tensors that go with it, or an error."""

    value: object
    tensors: list[Tensors]
    error: Exception | None = None


class WorkerShell:
    """The I/O thread of one worker.

    Parameters
    ----------
    settings : Settings
        Where the scheduler is.
    context : Context, optional
        Shared with other roles when several live in one process.
    """

    def __init__(self, settings: Settings, context: Context | None = None) -> None:
        self.hub = Hub(context, access_of(settings, KeyRole.WORKER))
        self._outbox = Outbox(self.hub)
        scheduler = located(settings.scheduler, settings.connect_timeout_s)
        self.hub.connect(SCHEDULER, scheduler, CONTROL_FRAME_BYTES_MAX, KeyRole.SCHEDULER)
        identity = Identity(
            Role.WORKER,
            random_number(),
            "",
            _socket.gethostname(),
            os.getpid(),
            metadata.version("treefold"),
            settings.rank,
        )
        limits = WorkerLimits(int(settings.connect_timeout_s * 1000) * MS, settings.retry_ms * MS)
        self.core = WorkerCore(Membership(identity), limits)
        self._carrier = Carrier(self._outbox, lane_settings(settings))
        self._loop: Loop[Event, Effect] = Loop(
            self.hub, self._outbox, self.core, self._perform, self._carrier
        )
        self._loop.points = POINTS
        self.flats = Flats(self._carrier.lanes)
        self._folder = Folder()
        self._events: deque[tuple[Event | Settle | GiveBack, Values | None]] = deque()
        self._answers: dict[int, queue.SimpleQueue[Answer]] = {}
        self._initials: dict[str, torch.Tensor] = {}
        self._lent: dict[int, None] = {}
        self._servers: dict[int, None] = {}
        self._streams: dict[int, Arrivals] = {}
        self._offered = 0
        self._figures = ProcessFigures()
        self.spent = Spent()
        self._log = logger("worker")
        self._is_closing = self._is_rung = self._is_named = False
        self._in_frames: dict[int, None] = {}
        self._crash: Exception | None = None
        body = Body(self.core.membership, self._carrier, self.spent)
        tally = WorkerTally(self.core, body, self._events.__len__, self.hub.traffic)
        self._loop.watch = watch_for(settings, Role.WORKER, tally, self.hub.bell.ring)
        self._thread = threading.Thread(target=self._run, name="treefold-io", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def post(self, event: Event | Settle | GiveBack, values: Values | None = None) -> None:
        """Give the core an event; ``values`` become its payloads. For the training thread."""
        self._events.append((event, values))
        if not self._is_rung:  # it has not looked since the last time: that one counts for this
            self._is_rung = True
            self.hub.bell.ring()

    def call(self, number: int, event: Event | Settle | GiveBack) -> Answer:
        """Give the core a call and wait for its answer. Called from the training thread."""
        answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._answers[number] = answers
        if self._crash is not None:
            return Answer(None, [], self._crash)
        self.post(event)
        return answers.get()

    def keep_initial(self, table: str, values: torch.Tensor) -> None:
        """Hold the initial values of a table until its first version is here."""
        self._initials[table] = values

    def close(self) -> None:
        """End the thread and close the sockets."""
        self._is_closing = True
        self.hub.bell.ring()
        self._thread.join()

    def wait_closed(self) -> None:
        """Wait until the thread has ended and its sockets are closed."""
        self._thread.join()

    # ---- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            arm("worker")
            while not self._is_closing:
                self._take_events()
                if self.core.membership.is_member and not self._is_named:
                    self._is_named = True
                    arm("worker", f"worker-{self.core.membership.rank}")
                if self._figures.sample(time.monotonic_ns()):
                    vitals = self.core.membership.vitals
                    vitals.rss_bytes = self._figures.rss_bytes
                    vitals.cpu_percent = self._figures.cpu_percent
                    vitals.host = self._figures.host
                    vitals.spent_ns = self.spent.ns
                    self._carrier.lanes.sweep()
                    self.flats.sweep()
                self._loop.turn()
            self._take_events()
            self._loop.flush()
        except Exception as error:  # the training thread must hear of whatever it is
            self._crash = error
            if not isinstance(error, AuthError):  # whose text says everything, to the script
                self._log.exception("the I/O thread of this worker failed")
            self._end_streams(error)
            for answers in list(self._answers.values()):
                answers.put(Answer(None, [], error))
        finally:
            self._loop.end_watch()
            self._carrier.lanes.close()
            self.hub.close()

    def _take_events(self) -> None:
        self._is_rung = False
        while self._events:
            self._offer()
            event, values = self._events.popleft()
            if isinstance(event, Settle):
                self._answer(event.call, Answer(bool(self._lent), []))
                continue
            if isinstance(event, GiveBack):
                self.flats.done(event.flat)
                continue
            if values is not None and isinstance(event, Contributed):
                event = msgspec.structs.replace(event, payloads=self._hold(event, values))
            self._loop.feed(event)

    def _hold(self, event: Contributed, values: Values) -> tuple[int, ...]:
        """Hold a contribution's values part by part."""
        parts = self.core.tables[event.table].parts[event.part : event.part + event.count]
        sizes = [part.stop - part.start for part in parts]
        pieces = torch.split(values.flat, sizes) if len(parts) > 1 else (values.flat,)
        held = [Held(Payload(piece, values.scale), values.owner) for piece in pieces]
        numbers = tuple(self._carrier.hold(one) for one in held)
        if values.owner is None:
            self._lent.update(dict.fromkeys(numbers))
        else:
            self.flats.use(values.owner, len(numbers))
        return numbers

    def _offer(self) -> None:
        """Offer servers the memory that was made since the last time.

        Before anything is contributed from it, or it could only travel as bytes.
        """
        if self._offered != self.flats.made:
            self._offered = self.flats.made
            for server in self._servers:
                self._carrier.offer(server, server)

    # ---- effects ------------------------------------------------------------------------------

    def _perform(self, effect: Effect) -> list[Event]:
        match effect:
            case Send():
                self._send(effect)
            case FoldPayloads(left, right):
                self._outbox.flush()
                with self.spent.on("fold"):
                    self._fold(left, right)
            case ReleasePayload(payload):
                self._release(payload)
            case Connect() | Disconnect():
                self._link(effect)
            case Arrived(table, part, payload):
                held = self._carrier.drop(payload)
                arrivals = self._streams[table]
                self._keep_memory(arrivals.version, [held])
                arrivals.put(part, held.payload.tensor, held.segment)
            case StreamBegun(table, version):
                ranges = [(part.start, part.stop) for part in self.core.tables[table].parts]
                self._streams[table] = Arrivals(version, ranges, self.spent)
            case StreamsOver(error):
                self._end_streams(error)
            case Complete(call, value):
                self._answer(call, Answer(value, self._tensors_of(value)))
            case Fail(call, error):
                self._answer(call, Answer(None, [], error))
            case Retire():
                self.flats.retire()
            case Note(level, text):
                self._log.log(level, text)
        return []

    def _link(self, effect: Connect | Disconnect) -> None:
        server = effect.server
        self._carrier.lanes.forget(server)
        if isinstance(effect, Disconnect):
            del self._servers[server]
            self.hub.disconnect(server)
            return
        self._servers[server] = None
        self.hub.connect(server, effect.address, DATA_FRAME_BYTES_MAX)
        self._carrier.offer(server, server)

    def _end_streams(self, error: Exception | None) -> None:
        for arrivals in self._streams.values():
            arrivals.end(error)

    def _send(self, effect: Send) -> None:
        payloads: list[Payload] = []
        if isinstance(effect.payload, Initial):
            values = self._initials[self.core.tables[effect.payload.table].spec.name]
            payloads = [Payload(values[start:stop]) for start, stop in effect.payload.parts]
        elif isinstance(effect.payload, tuple):
            payloads = [self._carrier.held(number).payload for number in effect.payload]
        if payloads and isinstance(effect.message, Push):
            table = self.core.tables[effect.message.table]
            to = Destination(effect.peer, effect.peer, table.urgent(effect.message.shard))
            self._carrier.send(to, effect.message, payloads)
        else:
            self._outbox.send(effect.peer, None, effect.message)

    def _fold(self, left: int, right: int) -> None:
        """Fold into the buffer of either that is not lent; it takes the number of the left one."""
        one, other = self._carrier.held(left), self._carrier.held(right)
        if one.owner is None:
            self._lent.pop(left, None)
            if other.owner is None:  # both are the script's own
                flat = self.flats.take(one.payload.tensor.numel())  # only float32 is lent
                kept = Held(Payload(flat), flat)
            else:
                self.flats.use(other.owner, 1)
                kept = Held(Payload(other.payload.tensor), other.owner)
        else:
            kept = Held(Payload(one.payload.tensor), one.owner)
        self._folder.fold(one.payload, other.payload, kept.payload.tensor)
        self._carrier.put(left, kept)
        self._release(right)

    def _release(self, payload: int) -> None:
        owner = self._carrier.drop(payload).owner
        if owner is not None:
            self.flats.done(owner)
        self._lent.pop(payload, None)

    def _tensors_of(self, value: object) -> list[Tensors]:
        """Hand the tensors of snapshots over to the training thread."""
        snapshots = value.snapshots if isinstance(value, Task | LoopEnd | Aligned) else []
        if isinstance(value, Snapshot):
            snapshots = [value]
            self._initials.pop(self.core.tables[value.table].spec.name, None)
        found = []
        for snapshot in snapshots:
            if snapshot.is_streaming:
                found.append(Tensors(snapshot, [], [], self._streams[snapshot.table]))
                continue
            ranges = self.core.tables[snapshot.table].parts
            held = [self._carrier.drop(payload) for payload in snapshot.payloads]
            self._keep_memory(snapshot.version, held)
            parts = [
                (part.start, part.stop, one.payload.tensor)
                for part, one in zip(ranges, held, strict=True)
            ]
            segments = {one.segment.number: one.segment for one in held if one.segment is not None}
            found.append(Tensors(snapshot, parts, list(segments.values())))
        return found

    def _keep_memory(self, version: int, held: list[Held]) -> None:
        """Keep what versions lie in, where they come by sockets: one comes with every round.

        The first ones may do so where the others lie in shared memory.
        """
        if len(self._in_frames) < FRAMED_VERSIONS and any(one.segment is None for one in held):
            self._in_frames[version] = None
            if len(self._in_frames) == FRAMED_VERSIONS:
                keep_freed_memory(is_received=True)

    def _answer(self, call: int, answer: Answer) -> None:
        answers = self._answers.pop(call, None)
        if answers is not None:
            answers.put(answer)


def snapshot_of(item: Tensors) -> handed.Snapshot:
    """A version as it is handed out."""
    own = item.snapshot
    which = own.table, own.version, own.state, own.norm
    return handed.Snapshot(*which, item.parts, item.segments, item.arrivals, own.front)
