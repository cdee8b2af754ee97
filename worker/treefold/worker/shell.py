"""A worker's I/O thread: sockets and tensors around `treefold.worker.core`. Decides nothing.

The training thread puts events into a queue and rings a bell; this thread alone touches sockets.
"""

import os
import queue
import socket as _socket
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from importlib import metadata

import torch

from treefold.common.config import Settings
from treefold.common.fold import fold
from treefold.common.log import logger
from treefold.common.process import ProcessFigures, Spent, random_number
from treefold.transport.loop import Loop
from treefold.transport.sockets import (
    CONTROL_FRAME_BYTES_MAX,
    DATA_FRAME_BYTES_MAX,
    Arrival,
    Context,
    Hub,
)
from treefold.wire.codec import encode
from treefold.wire.exchange import SCHEDULER, Note, Peer, Send
from treefold.wire.membership import MS, Identity, Membership
from treefold.wire.messages import Push, Role
from treefold.worker.core import WorkerCore
from treefold.worker.effects import (
    Complete,
    Connect,
    Contributed,
    Effect,
    Event,
    Fail,
    FoldPayloads,
    Initial,
    LoopEnd,
    ReleasePayload,
    Snapshot,
    Task,
)
from treefold.worker.limits import WorkerLimits


@dataclass(frozen=True, slots=True)
class Tensors:
    """One version of a table with its tensors: ``(start, stop, values)`` per part."""

    snapshot: Snapshot
    parts: list[tuple[int, int, torch.Tensor]]


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
        self.hub = Hub(context)
        self.hub.connect(SCHEDULER, settings.scheduler, CONTROL_FRAME_BYTES_MAX)
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
        self._loop: Loop[Event, Effect] = Loop(self.hub, self.core, self._perform)
        self._events: deque[tuple[Event, torch.Tensor | None]] = deque()
        self._answers: dict[int, queue.SimpleQueue[Answer]] = {}
        self._initials: dict[str, torch.Tensor] = {}
        self._own: dict[int, None] = {}
        self._figures = ProcessFigures()
        self.spent = Spent()
        self._log = logger("worker")
        self._is_closing = False
        self._crash: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="treefold-io", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def post(self, event: Event, values: torch.Tensor | None = None) -> None:
        """Give the core an event; ``values`` becomes its payload. For the training thread."""
        self._events.append((event, values))
        self.hub.bell.ring()

    def call(self, number: int, event: Event) -> Answer:
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

    # ---- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._is_closing:
                self._take_events()
                if self._figures.sample(time.monotonic_ns()):
                    vitals = self.core.membership.vitals
                    vitals.rss_bytes = self._figures.rss_bytes
                    vitals.cpu_percent = self._figures.cpu_percent
                    vitals.spent_ns = self.spent.ns
                self._loop.turn(_peer_of)
            self._take_events()
        except Exception as error:  # the training thread must hear of whatever it is
            self._crash = error
            self._log.exception("the I/O thread of this worker failed")
            for answers in list(self._answers.values()):
                answers.put(Answer(None, [], error))
        finally:
            self.hub.close()

    def _take_events(self) -> None:
        while self._events:
            event, values = self._events.popleft()
            if values is not None and isinstance(event, Contributed):
                number = self._loop.payloads.add(values)
                self._own[number] = None
                event = replace(event, payload=number)
            self._loop.feed(event)

    # ---- effects ------------------------------------------------------------------------------

    def _perform(self, effect: Effect) -> list[Event]:
        match effect:
            case Send():
                self._send(effect)
            case FoldPayloads(left, right):
                values = self._loop.payloads.get(left)
                with self.spent.on("fold"):
                    fold(values, self._loop.payloads.get(right), values)
                self._release(right)
            case ReleasePayload(payload):
                self._release(payload)
            case Connect(server, address):
                self.hub.connect(server, address, DATA_FRAME_BYTES_MAX)
            case Complete(call, value):
                self._answer(call, Answer(value, self._tensors_of(value)))
            case Fail(call, error):
                self._answer(call, Answer(None, [], error))
            case Note(level, text):
                self._log.log(level, text)
        return []

    def _send(self, effect: Send) -> None:
        payload, key = None, None
        if isinstance(effect.payload, Initial):
            spec = self.core.tables[effect.payload.table].spec
            payload = self._initials[spec.name][effect.payload.start : effect.payload.stop]
        elif isinstance(effect.payload, int):
            payload = self._loop.payloads.get(effect.payload)
        if isinstance(effect.message, Push) and payload is not None:
            push = effect.message
            key = (
                effect.peer,
                push.table,
                push.shard,
                push.part,
                push.round,
                push.level,
                push.index,
            )
        self.hub.send(effect.peer, None, encode(effect.message), payload, key)

    def _release(self, payload: int) -> None:
        tensor = self._loop.payloads.pop(payload)
        if payload in self._own:
            del self._own[payload]
            self.hub.pool.give(tensor)

    def _tensors_of(self, value: object) -> list[Tensors]:
        """Hand the tensors of snapshots over to the training thread."""
        snapshots = value.snapshots if isinstance(value, Task | LoopEnd) else []
        if isinstance(value, Snapshot):
            snapshots = [value]
            self._initials.pop(self.core.tables[value.table].spec.name, None)
        found = []
        for snapshot in snapshots:
            ranges = self.core.tables[snapshot.table].parts
            parts = [
                (part.start, part.stop, self._loop.payloads.pop(payload))
                for part, payload in zip(ranges, snapshot.payloads, strict=True)
            ]
            found.append(Tensors(snapshot, parts))
        return found

    def _answer(self, call: int, answer: Answer) -> None:
        answers = self._answers.pop(call, None)
        if answers is not None:
            answers.put(answer)


def _peer_of(arrival: Arrival) -> Peer:
    return arrival.sender
