"""A whole simulated cluster: its start, the faults, and whether it ended as it must."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

from tests.sim.checks import Checks
from tests.sim.clock import draw_clock
from tests.sim.contributions import Contributions
from tests.sim.disk import Disk, File
from tests.sim.gathered import Gathered
from tests.sim.guarded import Guarded
from tests.sim.network import Network
from tests.sim.process import Process
from tests.sim.reference import Reference
from tests.sim.roles import JOURNAL, Listener, Probe, SchedulerProcess, ServerProcess, connect
from tests.sim.scenario import Fault, Kind, Scenario
from tests.sim.trainer import Trainer
from tests.sim.vault import FOLDER, Vault
from tests.sim.worker import WorkerProcess
from tests.sim.world import MS, TOLD_MAX, Violation, World
from treefold.common import layout as layouts
from treefold.common.errors import FormationError, JobFailedError, UnavailableError
from treefold.scheduler import placement, records
from treefold.scheduler.admission import SchedulerLimits
from treefold.scheduler.core import SchedulerCore
from treefold.scheduler.journal import Scan, scan
from treefold.server.core import ServerCore
from treefold.server.limits import ServerLimits
from treefold.wire.exchange import SCHEDULER, Received, Tick
from treefold.wire.membership import Identity, Membership
from treefold.wire.messages import Heartbeat, HeartbeatSeen
from treefold.wire.words import Outcome, Role
from treefold.worker.core import WorkerCore
from treefold.worker.limits import WorkerLimits

FUSE_NS = 500 * MS  # a process that is to die at work is dead by then
RESTART_NS = 300 * MS  # where a worker that died for good is needed for the cluster to form
PROBES = 2
CHECK_EVERY = 3  # rounds between two comparisons of copies


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
    is_traced : bool
        Whether the report is to have a trace.
    """

    scenario: Scenario
    cores: Cores = field(default_factory=Cores)
    is_traced: bool = False
    world: World = field(init=False)
    network: Network = field(init=False)
    checks: Checks = field(init=False)
    disk: Disk = field(init=False)
    vault: Vault = field(init=False)
    scheduler: SchedulerProcess = field(init=False)
    probe: Probe = field(init=False)
    servers: list[ServerProcess] = field(default_factory=list)
    listeners: dict[str, Listener] = field(default_factory=dict)
    workers: dict[str, WorkerProcess] = field(default_factory=dict)
    ended: list[WorkerProcess] = field(default_factory=list)
    pending: int = 0
    struck: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make the processes that are there from the start."""
        scenario = self.scenario
        self.world = World(scenario.seed, is_traced=self.is_traced)
        self.network = Network(self.world, scenario.weather)
        kind = Contributions if scenario.is_asynchronous else Checks
        if scenario.is_quorum:
            kind = Gathered
        if scenario.is_guarded:
            kind = Guarded
        self.checks = kind(Reference(scenario))
        self.disk = Disk()
        core = self.cores.scheduler(self._limits())
        self.vault = Vault()
        self.scheduler = SchedulerProcess(core, self.network, self.disk, self.checks, self.vault)
        self._set_clock(self.scheduler)
        self.checks.may_fail = lambda: (
            scenario.is_doomed or self.scheduler.scheduler.ending is not None
        )
        self.probe = Probe(self.scheduler)
        self.listeners["scheduler"] = self.scheduler
        for number in range(scenario.servers):
            self.servers.append(self._server(f"server-{number}"))

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
            {**self.network.kinds, **self.struck},
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
        for at_ns in scenario.late_ns:
            self.pending += 1
            world.at(at_ns, self._restart_server, "late-server")
        for fault in scenario.faults:
            world.at(fault.at_ns, self._strike, fault)
        if scenario.heal_ns:
            world.at(scenario.heal_ns, lambda _: self.network.heal())
        for _ in range(PROBES):
            world.at(world.rng.randint(0, 3_000) * MS, self.probe.ask)

    def _run(self) -> None:
        self.begin()
        world, scenario = self.world, self.scenario
        last_ns = scenario.deadline_ns
        deadline_ns = scenario.job_deadline_ns
        while (self.scheduler.is_alive or not self.is_over) and world.step():
            if world.now_ns <= deadline_ns:
                continue
            if self.scheduler.scheduler.ending is None or deadline_ns == last_ns:
                raise Violation(f"not over in time: {self._waits()}")
            deadline_ns = last_ns
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

    def _restart_server(self, name: object) -> None:
        """Another process takes the place of a server that died, at another address."""
        assert isinstance(name, str)
        self.pending -= 1
        number = sum(server.name.split(".")[0] == name.split(".")[0] for server in self.servers)
        server = self._server(f"{name.split('.')[0]}.{number}")
        self.servers.append(server)
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
        if fault.kind is Kind.PARTITION:
            self._count(fault)
            self.network.block(fault.target, fault.other, now_ns + fault.for_ns)
            return
        target = self._process(fault.target)
        if target is None or not target.is_alive:
            return
        self._count(fault)
        self.world.note(fault.target, fault, fault.kind.name.encode())
        if fault.kind in (Kind.FREEZE, Kind.SUSPEND):
            target.freeze(now_ns + fault.for_ns, is_clock_stopped=fault.kind is Kind.SUSPEND)
        elif fault.kind is Kind.CRASH:
            self._crash(target, fault.for_ns)
        elif isinstance(target, WorkerProcess):
            if fault.kind is Kind.RECONNECT:
                target.reconnect()
            elif self.scheduler.is_formed and target.trainer is not None:
                target.later(0, target.trainer.drain)

    def _count(self, fault: Fault) -> None:
        self.struck[fault.kind.name] = self.struck.get(fault.kind.name, 0) + 1

    def _restart_scheduler(self, _: object) -> None:
        """Another scheduler takes up the journal, at the same address."""
        self.pending -= 1
        found = scan(self.disk.read(JOURNAL)) if self.disk.read(JOURNAL) else Scan([], 0, "")
        self.disk.files[JOURNAL] = File(
            self.disk.read(JOURNAL)[: found.good_bytes], found.good_bytes
        )
        self.struck["torn journal"] = self.struck.get("torn journal", 0) + bool(found.torn)
        core = self.cores.scheduler(self._limits())
        before = self.scheduler
        self.scheduler = SchedulerProcess(core, self.network, self.disk, self.checks, self.vault)
        self._set_clock(self.scheduler)
        self.scheduler.take_up(
            before, [one for payload in found.payloads for one in records.decode(payload)]
        )
        self.listeners["scheduler"] = self.scheduler
        self.scheduler.start()

    def _crash(self, target: Process, restart_ns: int) -> None:
        if target.fuse is None and self.world.rng.random() < 0.5:
            target.fuse = self.world.rng.randint(0, 6)
            self.world.at(self.world.now_ns + FUSE_NS, lambda _: self._died(target, restart_ns))
            return
        self._died(target, restart_ns)

    def _died(self, target: Process, restart_ns: int) -> None:
        if target.is_replaced:
            return  # it was struck twice, and one that takes its place is enough
        target.is_replaced = True
        target.die()
        if target is self.scheduler and restart_ns:
            self.disk.crash(self.world.rng)
            self.pending += 1
            self.world.at(self.world.now_ns + restart_ns, self._restart_scheduler)
        if isinstance(target, ServerProcess) and restart_ns:
            self.pending += 1
            self.world.at(self.world.now_ns + restart_ns, self._restart_server, target.name)
        if not isinstance(target, WorkerProcess):
            return
        if not restart_ns and not self.scheduler.is_formed:
            restart_ns = RESTART_NS
        if restart_ns:
            self.pending += 1
            self.world.at(self.world.now_ns + restart_ns, self._start_worker, target.name)

    def _begin_anew(self, worker: WorkerProcess) -> None:
        """The job has gone back: the worker's process runs its script from the start."""
        worker.die()
        self.pending += 1
        at_ns = self.world.now_ns + self.world.rng.randint(1, 100) * MS
        self.world.at(at_ns, self._start_worker, worker.name)

    def _process(self, name: str) -> Process | None:
        if name.startswith("server"):
            alike = [server for server in self.servers if server.name.split(".")[0] == name]
            return alike[-1]
        return self.scheduler if name == "scheduler" else self.workers.get(name)

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
            replicas=self.scenario.replicas,
            checkpoint=FOLDER if self.scenario.checkpoint_every else "",
            checkpoint_every=self.scenario.checkpoint_every,
            slots=self.scenario.slots,
        )

    def _membership(self, role: Role, name: str) -> Membership:
        nonce = self.world.rng.getrandbits(61)
        return Membership(Identity(role, nonce, name, name, 1, "0"))

    def _set_clock(self, process: Process) -> None:
        process.clock = draw_clock(self.world.rng, self.scenario.skew_ppm)

    def _server(self, name: str) -> ServerProcess:
        patience = self.scenario.patience
        limits = ServerLimits(
            patience.connect_timeout_ns, patience.orphan_after_ns, check_every=CHECK_EVERY
        )
        core = self.cores.server(self._membership(Role.SERVER, name), limits)
        process = ServerProcess(name, core, self.network, self.checks)
        self._set_clock(process)
        process.scheduler = connect(process, self.scheduler, SCHEDULER, 0)
        process.servers = lambda: self.listeners
        process.files.vault = self.vault
        self.listeners[name] = process
        return process

    def _worker(self, name: str) -> WorkerProcess:
        patience = self.scenario.patience
        limits = WorkerLimits(
            patience.connect_timeout_ns, patience.retry_ns, patience.unreachable_ns
        )
        core = self.cores.worker(self._membership(Role.WORKER, name), limits)
        process = WorkerProcess(name, core, self.network, self.checks)
        self._set_clock(process)
        first = sum(worker.name == name for worker in self.ended) + (name in self.workers)
        process.numbers = iter(range(1 + 100_000 * first, 1 << 60))
        process.listeners = self.listeners
        process.begin_anew = lambda: self._begin_anew(process)
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
        is_saving = bool(self.scenario.checkpoint_every)
        is_lost = "no server is left that holds" in ending.text
        if (self.scenario.replicas > 1 or is_saving) and is_lost:
            if is_saving:
                raise Violation(f"the job could have gone back: {ending.text}")
            self._check_lost()
            self._check_failed()
            return
        if ending.outcome is not Outcome.DONE:
            raise Violation(f"the job ended {ending.outcome.name}: {ending.text}")
        if not any(worker.is_finished for worker in self.everybody):
            raise Violation("the job is done, but no script is")
        for (table, shard), version in self.checks.versions.items():
            is_trained = table in self.checks.reference.trained
            expected = self.checks.last_version(table) if is_trained else 0
            if version != expected:
                raise Violation(f"table {table} shard {shard} ends with version {version}")
        allowed = (Exception,) if self.scenario.is_doomed else (JobFailedError, UnavailableError)
        for worker in self.everybody:
            if worker.error is not None and not isinstance(worker.error, allowed):
                raise Violation(f"the script of {worker.name} ended with {worker.error!r}")
        halts = [process.halt for process in (self.scheduler, *self.servers)]
        if not self.scenario.heal_ns and any(halt is None or halt.status for halt in halts):
            raise Violation(f"a job without faults ends with {halts}")

    def _check_lost(self) -> None:
        """Nobody who could have led a shard that was given up is left."""
        self.struck["lost"] = 1
        roster = self.scheduler.scheduler.roster
        live = {state.member.incarnation for state in roster.live(Role.SERVER)}
        for key in self.scheduler.scheduler.chains.lost:
            for server in self.servers:
                shard = server.server.shards.get(key)
                if shard is None or server.server.membership.incarnation not in live:
                    continue
                is_able = not shard.chain.is_joining and shard.version >= self.checks.versions.get(
                    key, -1
                )
                table, number = key
                place = self.scheduler.scheduler.tables[table].place
                assert place is not None
                if is_able and server.server.membership.incarnation in place.shards[number].backups:
                    raise Violation(f"shard {key} is given up, but {server.name} holds it")

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
        recent = [
            f"{now_ns / MS:12.3f} ms  {who:<14} {str(what)[:240]}"
            for now_ns, who, what in self.world.recent
            if not is_dull(what)
        ][-TOLD_MAX:]
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


def simulate(scenario: Scenario, cores: Cores | None = None, *, is_traced: bool = False) -> Report:
    """Run one scenario to its end."""
    with (
        tiny_layout(scenario.block_elements, scenario.part_blocks_max),
        mock.patch.object(placement, "SHARDS_MIN", scenario.shards_min),
    ):
        return Cluster(scenario, cores or Cores(), is_traced).run()


def is_dull(event: object) -> bool:
    """Whether an event happens all the time and tells a reader of a story nothing."""
    if isinstance(event, Received):
        return isinstance(event.message, Heartbeat | HeartbeatSeen)
    return isinstance(event, Tick)
