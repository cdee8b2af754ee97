"""A whole simulated cluster: its start, the faults, and whether it ended as it must."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.sim.checks import Checks
from tests.sim.network import Network
from tests.sim.process import Process
from tests.sim.reference import Reference
from tests.sim.roles import Listener, Probe, SchedulerProcess, ServerProcess, connect
from tests.sim.scenario import Fault, Kind, Scenario
from tests.sim.trainer import Trainer
from tests.sim.worker import WorkerProcess
from tests.sim.world import MS, Violation, World
from treefold.common import layout as layouts
from treefold.common.errors import FormationError, JobFailedError, UnavailableError
from treefold.scheduler.core import SchedulerCore, SchedulerLimits
from treefold.server.core import ServerCore, ServerLimits
from treefold.wire.exchange import SCHEDULER
from treefold.wire.membership import Identity, Membership
from treefold.wire.messages import Outcome, Phase, Role
from treefold.worker.core import WorkerCore
from treefold.worker.limits import WorkerLimits

RESTART_NS = 300 * MS  # where a worker that died for good is needed for the cluster to form
PROBES = 2


@dataclass(frozen=True, slots=True)
class Cores:
    """Which cores to simulate, and what runs the script."""

    scheduler: Callable[[SchedulerLimits], SchedulerCore] = SchedulerCore
    server: Callable[[Membership, ServerLimits], ServerCore] = ServerCore
    worker: Callable[[Membership, WorkerLimits], WorkerCore] = WorkerCore
    trainer: type[Trainer] = Trainer


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a run.

    Attributes
    ----------
    trace : str
        Hash of everything that happened.
    kinds : dict of str to int
        Messages sent, by kind, and faults that struck, by kind.
    """

    seed: int
    trace: str
    now_ns: int
    events: int
    outcome: Outcome | None
    kinds: dict[str, int]


@dataclass(slots=True)
class Cluster:
    """All processes of one scenario. To be made and run within its `tiny_layout`.

    Parameters
    ----------
    scenario : Scenario
        What to simulate.
    cores : Cores
        Of what.
    """

    scenario: Scenario
    cores: Cores = field(default_factory=Cores)
    world: World = field(init=False)
    network: Network = field(init=False)
    checks: Checks = field(init=False)
    scheduler: SchedulerProcess = field(init=False)
    probe: Probe = field(init=False)
    servers: list[ServerProcess] = field(default_factory=list)
    workers: dict[str, WorkerProcess] = field(default_factory=dict)
    ended: list[WorkerProcess] = field(default_factory=list)
    pending: int = 0
    struck: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make the processes that are there from the start."""
        scenario = self.scenario
        self.world = World(scenario.seed)
        self.network = Network(self.world, scenario.weather)
        self.checks = Checks(Reference(scenario))
        self.scheduler = SchedulerProcess(self.cores.scheduler(self._limits()), self.network)
        self.checks.may_fail = lambda: (
            scenario.is_doomed or self.scheduler.scheduler.ending is not None
        )
        self.probe = Probe(self.scheduler)
        for number in range(scenario.servers):
            self.servers.append(self._server(number))

    def run(self) -> Report:
        """Let it all happen.

        Raises
        ------
        Violation
            A promise was broken. The text tells the seed, the time and the last events.
        """
        try:
            self._run()
        except Violation as violation:
            raise Violation(self._story(violation)) from violation
        return self.report()

    def report(self) -> Report:
        """What has happened so far."""
        ending = self.scheduler.scheduler.ending
        return Report(
            self.scenario.seed,
            self.world.trace,
            self.world.now_ns,
            self.world.events,
            None if ending is None else ending.outcome,
            {**self.network.kinds, **self.struck, "network": self.network.faults},
        )

    # ---- what happens ----------------------------------------------------------------------------

    def begin(self) -> None:
        """Plan the start of every process and every fault."""
        world, scenario = self.world, self.scenario
        self.scheduler.start()
        for server in self.servers:
            world.at(world.rng.randint(0, 200) * MS, self._start_server, server)
        for number, at_ns in enumerate(scenario.starts_ns):
            self.pending += 1
            world.at(at_ns, self._start_worker, f"worker-{number}")
        for fault in scenario.faults:
            world.at(fault.at_ns, self._strike, fault)
        if scenario.heal_ns:
            world.at(scenario.heal_ns, lambda _: self.network.heal())
        for _ in range(PROBES):
            world.at(world.rng.randint(0, 3_000) * MS, self.probe.ask)

    def _run(self) -> None:
        self.begin()
        world, core, scenario = self.world, self.scheduler.scheduler, self.scenario
        deadline_ns = scenario.job_deadline_ns
        while not self.is_over and world.step():
            if world.now_ns <= deadline_ns:
                continue
            if core.ending is None or deadline_ns == scenario.deadline_ns:
                raise Violation(f"not over in time: {self._waits()}")
            deadline_ns = scenario.deadline_ns
        if not self.is_over:
            raise Violation(f"nothing happens any more: {self._waits()}")
        self._check_end()

    @property
    def is_over(self) -> bool:
        """Whether every process has ended, and none is to be started."""
        return (
            not self.pending
            and not self.scheduler.is_alive
            and not any(worker.is_alive for worker in self.workers.values())
            and not any(server.is_alive for server in self.servers)
        )

    def _start_server(self, server: object) -> None:
        assert isinstance(server, ServerProcess)
        server.start()

    def _start_worker(self, name: object) -> None:
        assert isinstance(name, str)
        self.pending -= 1
        process = self._worker(name)
        if name in self.workers:
            self.ended.append(self.workers[name])
        self.workers[name] = process
        process.start()
        assert process.trainer is not None
        process.trainer.start()

    def _strike(self, argument: object) -> None:
        """Let one fault happen, if its target is there."""
        assert isinstance(argument, Fault)
        fault, now_ns = argument, self.world.now_ns
        self.struck[fault.kind.name] = self.struck.get(fault.kind.name, 0) + 1
        if fault.kind is Kind.PARTITION:
            self.network.block(fault.target, fault.other, now_ns + fault.for_ns)
            return
        target = self._process(fault.target)
        if target is None or not target.is_alive:
            return
        self.world.note(fault.target, fault, fault.kind.name.encode())
        if fault.kind is Kind.FREEZE:
            target.frozen_until_ns = max(target.frozen_until_ns, now_ns + fault.for_ns)
        elif fault.kind is Kind.CRASH:
            self._crash(target, fault.for_ns)
        elif isinstance(target, WorkerProcess):
            if fault.kind is Kind.RECONNECT:
                target.reconnect()
            elif self.scheduler.scheduler.phase is not Phase.FORMING and target.trainer is not None:
                target.later(0, target.trainer.drain)

    def _crash(self, target: Process, restart_ns: int) -> None:
        target.die()
        if not isinstance(target, WorkerProcess):
            return
        if not restart_ns and self.scheduler.scheduler.phase is Phase.FORMING:
            restart_ns = RESTART_NS
        if restart_ns:
            self.pending += 1
            self.world.at(self.world.now_ns + restart_ns, self._start_worker, target.name)

    def _process(self, name: str) -> Process | None:
        found: list[Process] = [self.scheduler, *self.servers]
        return next((p for p in found if p.name == name), self.workers.get(name))

    # ---- processes -------------------------------------------------------------------------------

    def _limits(self) -> SchedulerLimits:
        patience = self.scenario.patience
        return SchedulerLimits(
            job=self.world.rng.getrandbits(62) or 1,
            servers=self.scenario.servers,
            workers=self.scenario.workers,
            heartbeat_ns=patience.heartbeat_ns,
            dead_after_ns=patience.dead_after_ns,
            server_dead_after_ns=patience.server_dead_after_ns,
            form_timeout_ns=patience.form_timeout_ns,
            rejoin_grace_ns=patience.rejoin_grace_ns,
            is_restarting=True,
        )

    def _membership(self, role: Role, name: str) -> Membership:
        nonce = self.world.rng.getrandbits(61)
        return Membership(Identity(role, nonce, name, name, 1, "0"))

    def _server(self, number: int) -> ServerProcess:
        name, patience = f"server-{number}", self.scenario.patience
        limits = ServerLimits(patience.connect_timeout_ns, patience.orphan_after_ns)
        core = self.cores.server(self._membership(Role.SERVER, name), limits)
        process = ServerProcess(name, core, self.network, self.checks)
        process.scheduler = connect(process, self.scheduler, SCHEDULER, 0)
        return process

    def _worker(self, name: str) -> WorkerProcess:
        patience = self.scenario.patience
        limits = WorkerLimits(
            patience.connect_timeout_ns, patience.retry_ns, patience.unreachable_ns
        )
        core = self.cores.worker(self._membership(Role.WORKER, name), limits)
        process = WorkerProcess(name, core, self.network, self.checks)
        first = sum(worker.name == name for worker in self.ended) + (name in self.workers)
        process.numbers = iter(range(1 + 100_000 * first, 1 << 60))
        listeners: list[Listener] = [self.scheduler, *self.servers]
        process.listeners = {listener.name: listener for listener in listeners}
        process.open(SCHEDULER, "scheduler")
        number = int(name.rsplit("-", 1)[1])
        process.trainer = self.cores.trainer(process, self.scenario, self.scenario.factors[number])
        return process

    # ---- how it must end -------------------------------------------------------------------------

    def _check_end(self) -> None:
        ending = self.scheduler.scheduler.ending
        if ending is None:
            raise Violation("the scheduler is gone, the job has not ended")
        if self.scenario.is_doomed and ending.outcome is not Outcome.DONE:
            self._check_failed()
            return
        if ending.outcome is not Outcome.DONE:
            raise Violation(f"the job ended {ending.outcome.name}: {ending.text}")
        if not any(worker.is_finished for worker in self.everybody):
            raise Violation("the job is done, but no script is")
        for (table, shard), version in self.checks.versions.items():
            expected = self.scenario.rounds if table in self.checks.reference.trained else 0
            if version != expected:
                raise Violation(f"table {table} shard {shard} ends with version {version}")
        allowed = (Exception,) if self.scenario.is_doomed else (JobFailedError, UnavailableError)
        for worker in self.everybody:
            if worker.error is not None and not isinstance(worker.error, allowed):
                raise Violation(f"the script of {worker.name} ended with {worker.error!r}")
        halts = [process.halt for process in (self.scheduler, *self.servers)]
        if not self.scenario.heal_ns and any(halt is None or halt.status for halt in halts):
            raise Violation(f"a job without faults ends with {halts}")

    def _check_failed(self) -> None:
        for worker in self.workers.values():
            error = worker.error
            is_told = isinstance(error, JobFailedError | FormationError | UnavailableError)
            if worker.outcome is Outcome.FAILED and not is_told:
                raise Violation(f"the script of {worker.name} ended with {error!r}")

    @property
    def everybody(self) -> Iterator[WorkerProcess]:
        """Every worker process that ever was."""
        yield from self.ended
        yield from self.workers.values()

    # ---- what to tell of a failure ---------------------------------------------------------------

    def _waits(self) -> str:
        lines = [f"scheduler {'up' if self.scheduler.is_alive else 'gone'}"]
        lines += [
            f"{s.name} {'up' if s.is_alive else f'gone ({s.halt})'} versions "
            f"{[shard.version for shard in s.server.shards.values()]}"
            for s in self.servers
        ]
        for worker in self.workers.values():
            state = "up" if worker.is_alive else f"gone ({worker.outcome}, {worker.error!r})"
            waits = worker.trainer.waits_for if worker.trainer else None
            core = worker.worker
            lines.append(
                f"{worker.name} {state} {core.membership.standing.name} at {core.position}, calls "
                f"{waits}, waits for {core._waiting_for()!r}"
            )
        return "\n  ".join(lines)

    def _story(self, violation: Violation) -> str:
        recent = [happened.line() for happened in self.world.recent]
        return "\n".join(
            [
                f"seed {self.scenario.seed} at {self.world.now_ns / MS:.3f} ms: {violation}",
                "last events:",
                *recent,
                f"scenario: {self.scenario}",
                "now:",
                f"  {self._waits()}",
                f"seed {self.scenario.seed} at {self.world.now_ns / MS:.3f} ms: {violation}",
            ]
        )


@contextmanager
def tiny_layout(block_elements: int, part_blocks_max: int) -> Iterator[None]:
    """Within this context tables are cut much finer, so that small ones have many parts."""
    before = layouts.BLOCK_ELEMENTS, layouts.PART_BLOCKS_MAX
    layouts.BLOCK_ELEMENTS, layouts.PART_BLOCKS_MAX = block_elements, part_blocks_max
    try:
        yield
    finally:
        layouts.BLOCK_ELEMENTS, layouts.PART_BLOCKS_MAX = before


def simulate(scenario: Scenario, cores: Cores | None = None) -> Report:
    """Run one scenario to its end."""
    with tiny_layout(scenario.block_elements, scenario.part_blocks_max):
        return Cluster(scenario, cores or Cores()).run()
