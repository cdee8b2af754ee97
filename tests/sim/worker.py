"""A worker's process: its core, and a training thread that runs the script of the scenario."""

import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from tests.sim.checks import Checks
from tests.sim.network import Connection, Network, Payload
from tests.sim.process import Process
from tests.sim.reference import fold
from tests.sim.roles import Listener, connect
from tests.sim.scenario import Scenario
from tests.sim.world import Violation
from treefold.common.errors import TreefoldError
from treefold.common.plan import LoopPlan
from treefold.wire.exchange import Send
from treefold.wire.messages import Outcome
from treefold.worker.core import WorkerCore
from treefold.worker.effects import (
    Complete,
    Connect,
    Contributed,
    DeclareCalled,
    DrainAsked,
    Fail,
    FoldPayloads,
    Initial,
    JoinCalled,
    LeaveCalled,
    LoopCalled,
    LoopEnd,
    ReleasePayload,
    Reported,
    SlotFinished,
    Snapshot,
    Task,
    TaskCalled,
)
from treefold.worker.pulls import PartRange

STANDING_BY = -1
Call = JoinCalled | DeclareCalled | LoopCalled | TaskCalled | LeaveCalled
Script = Generator[int | Call, object, None]


class Drained(Exception):
    """The script was asked to stop while it waited for the cluster."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The answer to a call, with the payloads of its snapshots."""

    value: object
    snapshots: Sequence[tuple[Snapshot, Sequence[PartRange], list[Payload]]]


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
        self._view = 0
        self.acts |= {
            Send: self._send,
            FoldPayloads: self._fold,
            ReleasePayload: self._release,
            Connect: self._connect,
            Complete: self._complete,
            Fail: self._fail,
        }

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
        payload: Payload | None = None
        if isinstance(effect.payload, Initial):
            part = effect.payload
            payload = self.checks.reference.initial(part.table, part.start), part.stop - part.start
        elif isinstance(effect.payload, int):
            payload = self.payloads.get(effect.payload)
            self.payloads.sent[effect.payload] = None
        connection = self.connections.get(effect.peer)
        if connection is None:
            raise Violation(f"{effect} before the connection is made")
        self.send(connection, connection.up, effect.message, payload)

    def _fold(self, effect: FoldPayloads) -> None:
        self.payloads.fold(effect.left, effect.right, fold)

    def _release(self, effect: ReleasePayload) -> None:
        self.payloads.pop(effect.payload)

    def _connect(self, effect: Connect) -> None:
        self.open(effect.server, effect.address)

    def _complete(self, effect: Complete) -> None:
        value = effect.value
        snapshots = value.snapshots if isinstance(value, Task | LoopEnd) else []
        if isinstance(value, Snapshot):
            snapshots = [value]
        loaded = [
            (
                item,
                self.worker.tables[item.table].parts,
                [self.payloads.pop(p) for p in item.payloads],
            )
            for item in snapshots
        ]
        assert self.trainer is not None
        self.trainer.answer(effect.call, Loaded(value, loaded))

    def _fail(self, effect: Fail) -> None:
        if not self.checks.may_fail():
            raise Violation(f"{self.name} is told {effect.error!r} while the job goes on")
        assert self.trainer is not None
        self.trainer.answer(effect.call, effect.error)

    # ---- checks ----------------------------------------------------------------------------------

    def handles(self) -> int:
        """Payloads of the round being computed and of pulls."""
        local = self.worker.local
        held = 0 if local is None else len(local.payloads())
        tables = self.worker.tables.values()
        return held + sum(len(pull.got) for table in tables for pull in table.pulls.values())

    def check(self) -> None:
        """Views grow."""
        view = self.worker.view
        if view is not None:
            if view.number < self._view:
                raise Violation(f"view {view.number} follows view {self._view}")
            self._view = view.number


class Trainer:
    """The training thread: a script that makes calls and waits, one at a time.

    Parameters
    ----------
    process : WorkerProcess
        Where it runs.
    scenario : Scenario
        What it runs.
    factor : float
        How slow it is.
    """

    def __init__(self, process: WorkerProcess, scenario: Scenario, factor: float) -> None:
        self.process = process
        self.scenario = scenario
        self.factor = factor
        self.reference = process.checks.reference
        self.held: dict[int, int] = {}
        self.done: dict[tuple[int, int], None] = {}
        self.begun = 0
        self.tasks = 0
        self.waits_for: Call | None = None
        self._drain_asked = False
        self._script = self._run()

    def start(self) -> None:
        """Begin the script."""
        self.process.later(0, self._resume)

    def drain(self, _: object = None) -> None:
        """Ask the script to stop, as a signal does."""
        self._drain_asked = True
        if isinstance(self.waits_for, JoinCalled | DeclareCalled | LoopCalled):
            self.waits_for = None
            self.process.later(0, self._resume, Drained())
        else:
            self.process.feed(DrainAsked(), b"drain")

    def answer(self, call: int, value: object) -> None:
        """A call was answered; the script goes on in its own thread."""
        if self.waits_for is None or self.waits_for.call != call:
            if not self._drain_asked:
                raise Violation(f"call {call} is answered, the script waits for {self.waits_for}")
            return
        self.waits_for = None
        self.process.later(0, self._resume, value)

    def _resume(self, value: object) -> None:
        try:
            if isinstance(value, Exception):
                wish = self._script.throw(value)
            else:
                wish = self._script.send(value)
        except StopIteration:
            self.process.die()
            return
        if isinstance(wish, int):
            self.process.later(wish, self._resume)
            return
        self.waits_for = wish
        self.process.feed(wish, type(wish).__name__.encode())

    # ---- the script ------------------------------------------------------------------------------

    def _run(self) -> Script:
        outcome, text = Outcome.DONE, ""
        try:
            yield from self._declare()
            yield from self._loader() if self.scenario.loader_rounds else self._passes()
        except Drained:
            outcome, text = Outcome.DRAINED, "asked to stop"
        except TreefoldError as error:
            self.process.error = error
            outcome, text = Outcome.FAILED, str(error)
        self.process.is_finished = outcome is Outcome.DONE
        yield LeaveCalled(self._number(), outcome, text)
        self.process.outcome = outcome

    def _declare(self) -> Script:
        if self.scenario.is_joining:
            yield JoinCalled(self._number())
        for spec in self.scenario.tables:
            self._load((yield DeclareCalled(self._number(), spec)))

    def _passes(self) -> Script:
        for plan in self.scenario.plans:
            yield from self._pass(plan)

    def _pass(self, plan: LoopPlan) -> Script:
        yield LoopCalled(self._number(), plan)
        while True:
            answer = self._load((yield TaskCalled(self._number())))
            if isinstance(answer, LoopEnd):
                self._check_end(answer, plan.end_round)
                return
            yield from self._compute(answer)

    def _loader(self) -> Script:
        yield LoopCalled(self._number(), self.scenario.plans[0])
        for round_ in range(self.scenario.loader_rounds + 1):
            task: object = None
            while not (isinstance(task, Task) and task.slot != STANDING_BY):
                task = self._load((yield TaskCalled(self._number())))
            if task.round != round_:
                raise Violation(f"{task} where round {round_} is due")
            if round_ < self.scenario.loader_rounds:
                yield from self._compute(task)

    def _compute(self, task: object) -> Script:
        """One loop body: forward and backward, contributions as they are ready, the step."""
        if not isinstance(task, Task) or task.slot == STANDING_BY:
            return
        self._check_task(task)
        spread = self.process.world.rng.uniform(0.9, 1.1)
        time_ns = int(self.scenario.compute_ns * self.factor * spread)
        parts = [
            (table, number, part)
            for table in self.reference.trained
            for number, part in enumerate(self.process.worker.tables[table].parts)
        ]
        parts.reverse()  # backward finishes the last layers first
        if self.scenario.is_overlapped:
            yield time_ns // 2
            self._contribute(task, parts[::2])
            parts = parts[1::2]
            time_ns -= time_ns // 2
        yield time_ns
        self._contribute(task, parts)
        metas = {
            table: self.reference.meta(table, task.round, task.slot)
            for table in self.reference.trained
        }
        self.tasks += 1
        self._post(Reported(self.tasks, 0.5))
        self._post(SlotFinished(task.round, task.slot, metas))

    def _contribute(self, task: Task, parts: Iterable[tuple[int, int, PartRange]]) -> None:
        for table, number, part in parts:
            key = (table, part.start, part.stop)
            value, absent = self.reference.leaf(key, task.round, task.slot)
            if value is None and (task.slot + number) % 2:
                continue  # the end of the slot says so as well
            marks = absent.to_bytes(-(-part.pieces // 8), "little")
            event = Contributed(table, number, task.round, task.slot, None, marks)
            if value is not None:
                handle = self.process.payloads.add((value, part.stop - part.start))
                event = replace(event, payload=handle)
            self._post(event)

    def _post(self, event: object) -> None:
        self.process.feed(event, type(event).__name__.encode())

    def _number(self) -> int:
        return next(self.process.numbers)

    # ---- checks ----------------------------------------------------------------------------------

    def _load(self, answer: object) -> object:
        """Load what came with an answer, as the script's model would."""
        assert isinstance(answer, Loaded)
        for snapshot, parts, payloads in answer.snapshots:
            self.process.checks.on_snapshot(snapshot, parts, payloads)
            if snapshot.version < self.begun:
                raise Violation(f"{snapshot} after round {self.begun} was begun")
            self.held[snapshot.table] = snapshot.version
        if isinstance(answer.value, LoopEnd) and answer.value.is_draining:
            raise Drained
        return answer.value

    def _check_task(self, task: Task) -> None:
        versions = [self.held[table] for table in self.reference.trained]
        if any(version != task.round for version in versions):
            raise Violation(f"{task} with versions {versions} loaded")
        if (task.round, task.slot) in self.done:
            raise Violation(f"{task} is given to a worker that has done it")
        if task.slot >= self.scenario.plan_of(task.round).active_slots(task.round):
            raise Violation(f"{task} has no samples")
        self.done[task.round, task.slot] = None
        self.begun = task.round
        who = self.process.worker.membership.origin
        self.process.checks.computed[who, task.round, task.slot] = None

    def _check_end(self, end: LoopEnd, end_round: int) -> None:
        versions = [self.held[table] for table in self.reference.trained]
        if any(version != end.version for version in versions) or end.version < end_round:
            raise Violation(f"{end} of a pass to {end_round} with versions {versions} loaded")
