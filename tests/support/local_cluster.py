"""A cluster of real cores and real tensors in one thread: no sockets, messages in any order.

Every message waits in one bag, and a seeded random choice says which is delivered next. Workers run
a script that is written as a generator: it yields calls and gets their answers.
"""

import random
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from treefold.common.fold import Folder, Payload
from treefold.scheduler.admission import SchedulerLimits
from treefold.scheduler.core import SchedulerCore
from treefold.server import effects as of_server
from treefold.server.core import ServerCore
from treefold.server.limits import ServerLimits
from treefold.server.shard import FoldedPart, ShardState, clip_coefficient
from treefold.wire import codec
from treefold.wire.exchange import SCHEDULER, Halt, Note, Received, Send, Tick
from treefold.wire.membership import MS, Identity, Membership
from treefold.wire.words import Role
from treefold.worker import effects as of_worker
from treefold.worker.core import WorkerCore
from treefold.worker.limits import WorkerLimits

STEP_NS = 20_000  # virtual time per delivery
DELIVERIES_MAX = 2_000_000

WITHOUT_ANSWER = (of_worker.Contributed, of_worker.HyperKnown, of_worker.SlotFinished)

Script = Generator[object, object, None]
MakeScript = Callable[["LocalWorker"], Script]


@dataclass
class Envelope:
    """One message on its way."""

    sender: str
    target: str
    header: bytes
    payloads: list[Tensor]


class Store:
    """Tensors by number, as a shell holds them."""

    def __init__(self) -> None:
        self.tensors: dict[int, Tensor] = {}
        self._next = 1

    def add(self, tensor: Tensor) -> int:
        """Hold a tensor."""
        self._next += 1
        self.tensors[self._next] = tensor
        return self._next

    def fold(self, left: int, right: int) -> None:
        """Left becomes left + right, in memory of its own."""
        out = torch.empty_like(self.tensors[left])
        one, other = Payload(self.tensors[left]), Payload(self.tensors.pop(right))
        Folder().fold(one, other, out)
        self.tensors[left] = out


@dataclass
class LocalServer:
    """A server core with its shards."""

    name: str
    core: ServerCore
    store: Store = field(default_factory=Store)
    states: dict[tuple[int, int], ShardState] = field(default_factory=dict)
    published: dict[tuple[int, int, int], dict[int, Tensor]] = field(default_factory=dict)

    def perform(self, effect: object, send: Callable[[str, Send, list[Tensor]], None]) -> None:
        """Carry out one effect."""
        match effect:
            case Send(peer, _, of_server.PartsRef() as ref):
                parts = self.published[ref.table, ref.shard, ref.version]
                numbers = range(ref.part, ref.part + ref.count)
                send(str(peer), effect, [parts[number] for number in numbers])
            case Send(peer, _, _):
                send(str(peer), effect, [])
            case of_server.OpenShard(table, shard, spec, span):
                self.states[table, shard] = ShardState(spec, span)
            case of_server.FoldPayloads(left, right):
                self.store.fold(left, right)
            case of_server.ReleasePayload(payload):
                del self.store.tensors[payload]
            case of_server.MakeParts():
                self._make(effect)
            case of_server.ReleaseVersion(table, shard, version):
                del self.published[table, shard, version]

    def folded(self, parts: list[of_server.ReadyPart]) -> list[FoldedPart]:
        """Roots as an optimizer takes them."""
        tensors = self.store.tensors
        return [
            FoldedPart(p.part, None if p.root is None else tensors[p.root], p.absent) for p in parts
        ]

    def _make(self, effect: of_server.MakeParts) -> None:
        state = self.states[effect.table, effect.shard]
        folded = self.folded(effect.parts)
        if effect.groups is None:
            for part in folded:
                if part.gradient is not None:
                    state.initialize(part.part, part.gradient)
        else:
            limit = effect.norm_max
            coefficient = clip_coefficient(limit, effect.norm) if limit > 0 else 1.0
            state.step(folded, effect.groups, coefficient)
        made = self.published.setdefault((effect.table, effect.shard, effect.version), {})
        for ready in effect.parts:
            start, stop = state.parts[ready.part]
            assert ready.part not in made
            made[ready.part] = torch.empty(stop - start)
            state.copy_part(ready.part, made[ready.part])
            if ready.root is not None:
                del self.store.tensors[ready.root]


@dataclass
class LocalWorker:
    """A worker core with the script that calls it."""

    name: str
    core: WorkerCore
    script: Script | None = None
    store: Store = field(default_factory=Store)
    initial: Tensor | None = None
    calls: int = 0
    answers: list[object] = field(default_factory=list)
    is_done: bool = False

    def next_call(self) -> int:
        """A number for the script's next call."""
        self.calls += 1
        return self.calls

    def take(self, snapshot: of_worker.Snapshot, flat: Tensor) -> None:
        """Copy a version into a flat tensor and let go of it."""
        parts = self.core.tables[snapshot.table].parts
        for part, payload in zip(parts, snapshot.payloads, strict=True):
            flat[part.start : part.stop] = self.store.tensors.pop(payload)

    def perform(self, effect: object, send: Callable[[str, Send, list[Tensor]], None]) -> None:
        """Carry out one effect."""
        match effect:
            case Send(peer, _, of_worker.Initial(_, parts)) if self.initial is not None:
                initial = self.initial
                send(f"member-{peer}", effect, [initial[start:stop] for start, stop in parts])
            case Send(peer, _, payload):
                target = SCHEDULER if peer == SCHEDULER else f"member-{peer}"
                numbers = payload if isinstance(payload, tuple) else ()
                send(target, effect, [self.store.tensors[number] for number in numbers])
            case of_worker.FoldPayloads(left, right):
                self.store.fold(left, right)
            case of_worker.ReleasePayload(payload):
                del self.store.tensors[payload]
            case of_worker.Complete(_, value):
                self.answers.append(value)
            case of_worker.Fail(_, error):
                raise error


class LocalCluster:
    """One scheduler, servers and workers.

    Parameters
    ----------
    servers, workers : int
        How many.
    seed : int
        Says in which order messages arrive.
    """

    def __init__(self, servers: int, workers: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.now_ns = 0
        self.bag: list[Envelope] = []
        day_ns = 86_400_000 * MS
        limits = SchedulerLimits(
            7, servers, workers, 500 * MS, day_ns, day_ns, day_ns, rejoin_grace_ns=day_ns
        )
        self.scheduler = SchedulerCore(limits)
        self.is_over = False
        self.servers = [self._server(number) for number in range(servers)]
        self.workers = [self._worker(number) for number in range(workers)]

    def run(self, make_script: MakeScript) -> None:
        """Let every worker run its script to the end."""
        for worker in self.workers:
            worker.script = make_script(worker)
        self._feed_all(Tick())
        for worker in self.workers:
            self._resume(worker, None)
        for _ in range(DELIVERIES_MAX):
            if self.is_over:
                return
            if self.bag:
                self.now_ns += STEP_NS
                self._deliver(self.bag.pop(self.random.randrange(len(self.bag))))
            else:
                self._wait()
        raise AssertionError("the job does not end")

    # ---- the bag ---------------------------------------------------------------------------------

    def _send(self, sender: str, target: str, effect: Send, payloads: list[Tensor]) -> None:
        """Put a message into the bag. Workers call servers by incarnation."""
        if target.startswith("member-"):
            target = self.scheduler.roster.by_incarnation[int(target[7:])].name
        self.bag.append(Envelope(sender, target, codec.encode(effect.message), payloads))

    def _deliver(self, letter: Envelope) -> None:
        message = codec.decode(letter.header)
        if letter.target == SCHEDULER:
            self._scheduler(Received(letter.sender, message))
            return
        member = next(m for m in self._members() if m.name == letter.target)
        numbers = tuple(member.store.add(payload) for payload in letter.payloads)
        source = SCHEDULER if letter.sender == SCHEDULER else letter.sender
        self._feed(member, Received(source, message, numbers))

    def _wait(self) -> None:
        times = [self.scheduler.next_deadline_ns()]
        times += [member.core.next_deadline_ns() for member in self._members()]
        self.now_ns = max(self.now_ns, min(time for time in times if time is not None))
        self._feed_all(Tick())

    def _members(self) -> list[LocalServer | LocalWorker]:
        return [*self.servers, *self.workers]

    # ---- cores -----------------------------------------------------------------------------------

    def _feed_all(self, event: Tick) -> None:
        self._scheduler(event)
        for member in self._members():
            self._feed(member, event)

    def _scheduler(self, event: Received | Tick) -> None:
        for effect in self.scheduler.handle(self.now_ns, event):
            if isinstance(effect, Send):
                self._send(SCHEDULER, str(effect.peer), effect, [])
            self.is_over |= isinstance(effect, Halt)

    def _feed(self, member: LocalServer | LocalWorker, event: object) -> None:
        handle: Callable[[int, object], list[object]] = member.core.handle  # type: ignore[assignment] # each core has its own events
        pending = [event]
        while pending:
            for effect in handle(self.now_ns, pending.pop(0)):
                if isinstance(effect, Note):
                    continue
                if isinstance(effect, of_server.ComputeNorm) and isinstance(member, LocalServer):
                    pending.append(self._norm(member, effect))
                    continue
                member.perform(effect, partial(self._send, member.name))
        if isinstance(member, LocalWorker):
            while member.answers:
                self._resume(member, member.answers.pop(0))

    def _norm(self, server: LocalServer, effect: of_server.ComputeNorm) -> of_server.NormComputed:
        state = server.states[effect.table, effect.shard]
        sums = state.block_sums(server.folded(effect.parts))
        return of_server.NormComputed(effect.table, effect.shard, effect.round, sums)

    def _resume(self, worker: LocalWorker, answer: object) -> None:
        """Go on with a script: events it yields are fed until it waits for a call's answer."""
        script = worker.script
        if script is None or worker.is_done:
            return
        try:
            event = script.send(answer)
            while isinstance(event, WITHOUT_ANSWER):
                self._feed(worker, event)
                event = next(script)
        except StopIteration:
            worker.is_done = True
            return
        self._feed(worker, event)

    def _server(self, number: int) -> LocalServer:
        identity = Identity(Role.SERVER, 100 + number, f"at-{number}", "here", 1, "0", number)
        core = ServerCore(Membership(identity), ServerLimits(1 << 60, 1 << 60))
        return LocalServer(f"server-{number}", core)

    def _worker(self, number: int) -> LocalWorker:
        identity = Identity(Role.WORKER, 10_000 + number, "", "here", 1, "0", number)
        limits = WorkerLimits(1 << 60, 1_000 * MS, 1 << 60)
        return LocalWorker(f"worker-{number}", WorkerCore(Membership(identity), limits))
