"""A worker's training thread: a script that makes calls and waits, one at a time.

It stands for everything above the worker's core: the client, the session, the user's script.
"""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

from tests.sim.alike import check_alike, is_read
from tests.sim.checks import is_intact, is_part_intact
from tests.sim.contributions import Contributions
from tests.sim.gathered import Gathered
from tests.sim.memory import Gradients, Memory, Origin
from tests.sim.scenario import Early, Scenario
from tests.sim.worker import Found, Loaded, WorkerProcess
from tests.sim.world import Violation
from treefold.common.errors import RolledBackError, TreefoldError
from treefold.common.plan import LoopPlan
from treefold.wire.words import Outcome
from treefold.worker.effects import (
    AlignedCalled,
    Contributed,
    DeclareCalled,
    DrainAsked,
    HyperKnown,
    JoinCalled,
    LeaveCalled,
    LoopCalled,
    LoopEnd,
    Reported,
    SlotFinished,
    Task,
    TaskCalled,
)
from treefold.worker.pulls import PartRange

STANDING_BY = -1
WAIT = -2  # in the place of a time: until something comes
UNUSED_SHARE = 0.1  # of the parts, which no forward needs
DECLARE_TRIES_MAX = 100
Call = JoinCalled | DeclareCalled | LoopCalled | TaskCalled | AlignedCalled | LeaveCalled
Script = Generator[int | Call, object, None]
Step = Generator[int | Call, object, object]


class Drained(Exception):
    """The script was asked to stop while it waited for the cluster."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One part of a slot's contribution; ``memory`` is None if no tensor has a gradient."""

    table: int
    number: int
    part: PartRange
    absent: int
    memory: Memory | None
    is_lent: bool

    @property
    def marks(self) -> bytes:
        """Absent marks as they travel."""
        return self.absent.to_bytes(-(-self.part.pieces // 8), "little")

    def is_before(self, other: "Leaf") -> bool:
        """Whether the other one can follow in a run."""
        return (other.table, other.number) == (self.table, self.number + 1) and (
            self.memory is None,
            self.is_lent,
        ) == (other.memory is None, other.is_lent)


class Trainer:
    """The training thread.

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
        self.versions: dict[int, dict[int, int]] = {}
        self.done: dict[tuple[int, int, int], None] = {}
        self.begun = 0
        self.tasks = 0
        self.waits_for: Call | None = None
        self._gradients: dict[int, Gradients] = {}
        self._lent_in = -1
        self._drain_asked = self._is_waiting = False
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
        if wish == WAIT:
            self._is_waiting = True
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
        except RolledBackError:
            self.process.network.count("begun anew")
            yield LeaveCalled(self._number(), Outcome.DRAINED, "begin anew")
            self.process.begin_anew()
            return
        except TreefoldError as error:
            self.process.error = error
            outcome, text = Outcome.FAILED, str(error)
        self.process.is_finished = outcome is Outcome.DONE
        yield LeaveCalled(self._number(), outcome, text)
        self.process.outcome = outcome

    def _declare(self) -> Step:
        if self.scenario.is_joining:
            yield JoinCalled(self._number())
        for spec in self.scenario.tables:
            for _ in range(DECLARE_TRIES_MAX):
                answer = yield DeclareCalled(self._number(), spec)
                assert isinstance(answer, Loaded)
                if (yield from self._load_all(answer.found)):
                    break
            else:
                raise Violation(f"table {spec.name} is torn in {DECLARE_TRIES_MAX} tries")
        return None

    def _passes(self) -> Script:
        for plan in self.scenario.plans:
            yield from self._pass(plan)

    def _pass(self, plan: LoopPlan) -> Script:
        yield LoopCalled(self._number(), plan)
        while True:
            answer = yield from self._next_task()
            if isinstance(answer, LoopEnd):
                self._check_end(answer, plan.end_round)
                yield from self._read_alike(plan.end_round, is_between=True)
                return
            assert isinstance(answer, Task)
            yield from self._read_alike(answer.round, is_between=False)
            yield from self._compute(answer)

    def _read_alike(self, round_: int, *, is_between: bool) -> Script:
        """Read all shards with the same in them, now and then."""
        if not is_read(self.scenario, self.process.name, round_, is_between=is_between):
            return
        answer = yield AlignedCalled(self._number())
        assert isinstance(answer, Loaded)
        assert isinstance(self.process.checks, Contributions)
        check_alike(self.process.checks, self.process.view, answer.found)
        self.process.network.count("alike")

    def _loader(self) -> Script:
        yield LoopCalled(self._number(), self.scenario.plans[0])
        for round_ in range(self.scenario.loader_rounds + 1):
            task = yield from self._next_task()
            if not isinstance(task, Task) or task.round != round_:
                raise Violation(f"{task} where round {round_} is due")
            if round_ < self.scenario.loader_rounds:
                yield from self._compute(task)

    # ---- versions --------------------------------------------------------------------------------

    def _next_task(self) -> Step:
        """Wait for a slot or the end; load the newest versions, again if they were overwritten."""
        newest: dict[int, Found] = {}
        is_torn = False
        while True:
            streams = self.process.streams.values()
            is_torn |= any(stream.is_torn for stream in streams)
            answer = yield TaskCalled(self._number(), is_torn, self.scenario.is_streaming)
            assert isinstance(answer, Loaded)
            is_torn = False
            self._forget_void()
            newest |= {one.snapshot.table: one for one in answer.found}
            if answer.found and not any(one.snapshot.is_streaming for one in answer.found):
                self.process.streams.clear()
            value = answer.value
            if isinstance(value, LoopEnd) and value.is_draining:
                raise Drained
            if isinstance(value, Task) and value.slot == STANDING_BY:
                continue
            if (yield from self._load_all(list(newest.values()))):
                return value
            is_torn = True
            newest.clear()

    def _load_all(self, found: Sequence[Found]) -> Generator[int, object, bool]:
        """Load what came with an answer, as the script's model would; False if it was torn."""
        is_intact_all = True
        for one in found:
            is_whole = yield from self._load(one)
            is_intact_all = is_intact_all and is_whole
        return is_intact_all

    def _load(self, found: Found) -> Generator[int, object, bool]:
        """Copy one version, which takes a while, and see afterwards whether it was that version."""
        snapshot, rng = found.snapshot, self.process.world.rng
        if snapshot.is_streaming:
            self._check_buffers(found)
            self.held[snapshot.table] = snapshot.version
            return True
        half = len(found.memories) // 2
        if self.scenario.copy_ns:
            yield int(self.scenario.copy_ns * self.factor * rng.random())
        values = [memory.value for memory in found.memories[:half]]
        if self.scenario.copy_ns:
            yield int(self.scenario.copy_ns * self.factor * rng.random())
        values += [memory.value for memory in found.memories[half:]]
        if not self.is_intact(found):
            self.process.network.count("torn")
            return False
        view, checks = self.process.view, self.process.checks
        self.versions[snapshot.table] = checks.on_snapshot(view, snapshot, found.parts, values)
        if snapshot.version < self.begun and snapshot.table not in self.reference.apart:
            raise Violation(f"{snapshot} after round {self.begun} was begun")
        self.held[snapshot.table] = snapshot.version
        return True

    def is_intact(self, found: Found) -> bool:
        """Whether everything read so far was of one version."""
        return is_intact(found.snapshot, found.memories)

    # ---- slots -----------------------------------------------------------------------------------

    def _compute(self, task: object) -> Script:
        """One loop body: forward and backward, contributions as they are ready, the step."""
        assert isinstance(task, Task)
        self._check_task(task)
        may_be_lent = self._lent_in == self._base_of(task) or bool(self.process.streams)
        is_in_use = may_be_lent and self.process.payloads.is_lending
        for table in self.reference.trained:
            self._gradients_of(table).begin_slot(is_in_use)
        spread = self.process.world.rng.uniform(0.9, 1.1)
        time_ns = int(self.scenario.compute_ns * self.factor * spread)
        parts = [
            (table, number)
            for table in self.reference.trained
            for number in range(len(self.process.worker.tables[table].parts))
        ]
        yield from self._forward()
        self._settle_hyper(task, Early.BACKWARD)
        if self.scenario.is_overlapped:
            yield time_ns // 2
            for which in reversed(parts[1::2]):  # backward finishes the last layers first
                self._contribute(task, self._leaves(task, [which], is_in_use))
            parts = parts[::2]
            time_ns -= time_ns // 2
        yield time_ns
        self._settle_hyper(task, Early.STEP)
        self._contribute(task, self._leaves(task, parts, is_in_use))
        metas = {
            table: self.reference.meta(table, task.round, task.slot)
            for table in self.reference.trained
        }
        if self._linger(task):
            yield self._linger(task)
        self.tasks += 1
        if self.is_void:
            return
        self._post(Reported(self.tasks, 0.5))
        self._post(SlotFinished(task.round, task.slot, metas))

    @property
    def is_void(self) -> bool:
        """Whether the loop body does not count, since its version did not come to its end."""
        return any(stream.is_void for stream in self.process.streams.values())

    def _forget_void(self) -> None:
        """What was computed with a version that did not come to its end was not done."""
        for stream in self.process.streams.values():
            if stream.is_void:
                self.begun = min(self.begun, stream.version - 1)
                self.done = {key: None for key in self.done if key[0] != stream.version}

    def _check_buffers(self, found: Found) -> None:
        """Buffers are here before the body."""
        table = found.snapshot.table
        here = self.process.streams[table].parts
        for number, part in enumerate(found.parts):
            is_buffer = self.reference.has_buffers(table, part.start, part.stop)
            if is_buffer and number not in here and not self.is_void:
                raise Violation(f"{found.snapshot} begins without the buffers in {part}")

    def _forward(self) -> Script:
        """Wait for parts layer by layer, and read them; some are never needed."""
        rng = self.process.world.rng
        for table, stream in list(self.process.streams.items()):
            for number, part in enumerate(self.process.worker.tables[table].parts):
                if number in stream.read or rng.random() < UNUSED_SHARE:
                    continue
                while number not in stream.parts and not stream.is_void:
                    yield WAIT
                if stream.error is not None:
                    raise stream.error
                if stream.is_void:
                    return
                memory = stream.parts[number]
                if self.scenario.copy_ns:
                    yield int(self.scenario.copy_ns * self.factor * rng.random())
                value = memory.value
                if not self.is_part_intact(stream.version, memory):
                    self.process.network.count("torn streams")
                    stream.is_void = stream.is_torn = True
                    return
                self.process.checks.on_part(table, stream.version, part, value)
                stream.read[number] = None

    def is_part_intact(self, version: int, memory: Memory) -> bool:
        """Whether what was read of a part was of this version."""
        return is_part_intact(version, memory)

    def wake(self) -> None:
        """Something came that the script may wait for."""
        if self._is_waiting:
            self._is_waiting = False
            self.process.later(0, self._resume, None)

    def _linger(self, task: Task) -> int:
        """How long a loop body goes on after the step, in nanoseconds."""
        del task
        return 0

    def _settle_hyper(self, task: Task, when: Early) -> None:
        """Say what the slot steps with, if the script says it now; only slot 0 counts."""
        if self.scenario.early is not when:
            return
        for table in self.reference.trained:
            meta = self.reference.meta(table, task.round, task.slot)
            self._post(HyperKnown(table, task.round, task.slot, meta.groups, meta.norm_max))

    def is_lendable(self, task: Task, is_in_use: bool) -> bool:
        """Whether this slot's gradients can stay where they are until the next version."""
        return self.scenario.is_lending and not task.is_kept and not is_in_use

    def _leaves(self, task: Task, parts: Iterable[tuple[int, int]], is_in_use: bool) -> list[Leaf]:
        """Write the values of parts where they are contributed from."""
        found: list[Leaf] = []
        is_lendable = self.is_lendable(task, is_in_use)
        for table, number in parts:
            part = self.process.worker.tables[table].parts[number]
            key = (table, part.start, part.stop)
            value, absent = self.reference.leaf(key, task.round, task.slot)
            if value is not None and self.scenario.is_quorum:  # with another version it is another
                assert isinstance(value, tuple)
                value = (*value, task.base)
            if value is not None and table in self.reference.apart:  # another one makes another
                which = (task.round, task.slot, self.process.worker.membership.origin)
                checks = self.process.checks
                assert isinstance(checks, Contributions)
                value = (*key, *which, len(checks.begun[which]) - 1)
            if value is None:
                if not (task.slot + number) % 2:  # otherwise the end of the slot says so
                    found.append(Leaf(table, number, part, absent, None, is_lent=False))
                continue
            is_lent = is_lendable and not self.reference.has_buffers(*key)
            memory = Memory(value, part.stop - part.start)
            if is_lent:
                memory = self._gradients_of(table).flat[number]
                memory.value = value
            found.append(Leaf(table, number, part, absent, memory, is_lent))
        return found

    def _contribute(self, task: Task, leaves: Sequence[Leaf]) -> None:
        """Hand parts over in runs, some of which are cut by chance."""
        run: list[Leaf] = []
        for leaf in leaves:
            if run and (not run[-1].is_before(leaf) or self.process.world.rng.random() < 0.2):
                self._contribute_run(task, run)
                run = []
            run.append(leaf)
        if run:
            self._contribute_run(task, run)

    def _contribute_run(self, task: Task, run: Sequence[Leaf]) -> None:
        payloads = self.process.payloads
        handles: list[int] = []
        for leaf in run:
            if leaf.memory is None:
                continue
            origin = Origin.LENT if leaf.is_lent else Origin.OWN
            handles.append(payloads.add(leaf.memory, origin))
            if leaf.is_lent:
                self._lent_in = self._base_of(task)
                self._gradients_of(leaf.table).is_lent = True
                self.process.network.count("lent")
        absent = [leaf.marks for leaf in run] if any(leaf.absent for leaf in run) else []
        table, number = run[0].table, run[0].number
        self._post(
            Contributed(table, number, len(run), task.round, task.slot, tuple(handles), absent)
        )

    def retire(self) -> None:
        """Never write again to what was lent so far."""
        for gradients in self._gradients.values():
            gradients.is_retired = True

    def _gradients_of(self, table: int) -> Gradients:
        known = self._gradients.get(table)
        if known is None:
            parts = self.process.worker.tables[table].parts
            known = self._gradients[table] = Gradients([part.stop - part.start for part in parts])
        return known

    def _post(self, event: object) -> None:
        self.process.feed(event, type(event).__name__.encode())

    def _number(self) -> int:
        return next(self.process.numbers)

    # ---- checks ----------------------------------------------------------------------------------

    def _check_task(self, task: Task) -> None:
        versions = [self.held.get(table) for table in self.reference.trained]
        checks = self.process.checks
        if isinstance(checks, Contributions):
            origin = self.process.worker.membership.origin
            checks.enter(self.process.view)
            checks.check_begun(self.versions, (task.round, task.slot, origin))
        elif any(version != self._base_of(task) for version in versions):
            raise Violation(f"{task} with versions {versions} loaded")
        which = self._base_of(task), task.round, task.slot
        if which in self.done and not self.scenario.may_be_too_stale:
            raise Violation(f"{task} is given to a worker that has done it")
        if task.slot >= self.scenario.plan_of(task.round).active_slots(task.round):
            raise Violation(f"{task} has no samples")
        self.done[which] = None
        self.begun = self._base_of(task)
        self.process.checks.enter(self.process.view)
        self.process.checks.on_computed(self.process.worker.membership.origin, task)

    def _base_of(self, task: Task) -> int:
        """The round that a task is computed in, whatever its batch is called."""
        return task.round if task.base < 0 else task.base

    def _check_end(self, end: LoopEnd, end_round: int) -> None:
        checks = self.process.checks
        if isinstance(checks, Contributions):
            checks.enter(self.process.view)
            checks.check_over(self.versions, end_round)
            return
        versions = [self.held.get(table) for table in self.reference.trained]
        if isinstance(checks, Gathered):
            checks.enter(self.process.view)
            for version in versions:
                checks.check_over(end, version or 0, end_round)
            return
        if any(version != end.version for version in versions) or end.version < end_round:
            raise Violation(f"{end} of a pass to {end_round} with versions {versions} loaded")
