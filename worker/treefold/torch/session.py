"""The job as this process takes part in it: one connection, its tables, where the script stands.

There is one session at a time, from `init` to `shutdown` or the end of the process. Here it is
decided what the script may call when; tensors and sockets are for others.
"""

import sys
import warnings
from enum import Enum, auto

import torch
from torch import Tensor

from treefold.common.config import Settings, load
from treefold.common.engines import SCRIPT
from treefold.common.errors import (
    AuthError,
    ConfigError,
    FormationError,
    JobFailedError,
    LocalProtocolError,
    SchedulerLostError,
    TreefoldError,
    UnsupportedError,
)
from treefold.common.optim import spare_compiler
from treefold.common.plan import LoopPlan, PlanKind
from treefold.common.spec import Consistency, ConsistencyKind
from treefold.torch.leaving import ExitWatch, end_with
from treefold.torch.progress import Progress, as_number
from treefold.torch.pushing import Overlap
from treefold.torch.randomness import seed_all, seed_between_loops
from treefold.torch.streams import PINS
from treefold.torch.table import Table
from treefold.wire.words import Outcome
from treefold.worker.client import Client
from treefold.worker.handed import LoopEnd, Task

NOT_FORMED_STATUS = 3  # as the treefold command's


class Mode(Enum):
    """How the script reads its data; decided by what it does first."""

    UNDECIDED = auto()
    SLOTS = auto()  # `batches`
    LOADER = auto()  # its own loader: every step is a round, every worker one slot


class Session:
    """One worker's part in a job.

    Parameters
    ----------
    client : Client
        The connection.
    settings : Settings
        The job's.

    Attributes
    ----------
    tables : list of Table
        In the order in which their optimizers were made.
    plan : LoopPlan or None
        The pass in progress.
    task : Task or None
        The slot whose loop body is running.
    round : int
        The round of that slot; between loops, the next one.
    slots_held : list of int
        The slots that this worker computed in the last round it saw.
    shard_sizes : (list, callable or None, list of int)
        Data shards of the last pass over such, what loads them, and the samples that each has.
    """

    def __init__(self, client: Client, settings: Settings) -> None:
        self.client = client
        self.settings = settings
        self.tables: list[Table] = []
        self.mode = Mode.UNDECIDED
        self.plan: LoopPlan | None = None
        self.task: Task | None = None
        self.round = 0
        self.loops = 0
        self.next_round = 0
        self.slots_held: list[int] = []
        self.progress = Progress()
        self.shard_sizes: tuple[list[object], object, list[int]] = ([], None, [])
        self._taken: dict[int, None] = {}
        client.before_leaving = self.take_back

    # ---- tables ----------------------------------------------------------------------------------

    def check_can_declare(self) -> None:
        """Refuse new tables once training has begun."""
        if self.mode is not Mode.UNDECIDED:
            text = "make every ps.DistributedOptimizer before the first loop or step"
            raise LocalProtocolError(text)

    def check_can_mix(self, consistency: Consistency) -> None:
        """Refuse a table whose slots would be at other rounds than those of another one."""
        for table in self.tables:
            other = table.options.consistency
            if _times(other) != _times(consistency):
                text = (
                    f"table {table.options.name!r} has consistency {other.kind.name.lower()!r} and "
                    f"the next one {consistency.kind.name.lower()!r}; where one optimizer of a job "
                    "has a quorum, all have the same"
                )
                raise UnsupportedError(text)
        rules = [*(table.options.consistency for table in self.tables), consistency]
        is_sync = any(rule.kind is ConsistencyKind.SYNC for rule in rules)
        if is_sync and any(rule.staleness_max for rule in rules):
            text = (
                "staleness_max needs a job without synchronous tables: beside one, a contribution "
                "is never staler than a round has slots"
            )
            raise UnsupportedError(text)

    def take_back(self) -> None:
        """Have parameters in memory of their own, since this worker leaves."""
        used = [table for table in self.tables if table.is_in_place]
        if used and self.client.is_void:
            text = (
                "the job went on without this worker's loop body, so that parameters that were "
                "used in place are of no version; load a checkpoint to go on with the model"
            )
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        for table in used:
            table.take_back()

    def is_taken(self, tensor: Tensor) -> bool:
        """Whether a tensor belongs to a table already."""
        return id(tensor) in self._taken

    def add(self, table: Table) -> None:
        """Take in a declared table."""
        self.tables.append(table)
        bound = table.bound
        for tensor in [*bound.parameters, *bound.buffers, *bound.opaque]:
            self._taken[id(tensor.current)] = None

    # ---- passes over the data --------------------------------------------------------------------

    def check_can_loop(self) -> None:
        """Refuse a new pass while one is running, without an optimizer, or beside an own loader."""
        if not self.tables:
            text = "make a ps.DistributedOptimizer before the first ps.batches()"
            raise LocalProtocolError(text)
        if self.mode is Mode.LOADER:
            text = (
                "optimizer.step() was called outside of ps.batches() before, so this job reads its "
                "data with its own loader; one job cannot do both"
            )
            raise LocalProtocolError(text)
        if self.plan is not None:
            text = (
                f"the loop over ps.batches() number {self.plan.index} has not ended: it is in "
                f"round {self.round} of {self.plan.first_round} to {self.plan.end_round - 1}. A "
                "loop must run to its end, and not inside of another one; to make it shorter, "
                "pass max_rounds= instead of using break"
            )
            raise LocalProtocolError(text)

    def begin_loop(self, plan: LoopPlan) -> None:
        """Enter a pass over the data with every other worker."""
        self.check_can_loop()
        self.mode = Mode.SLOTS
        for table in self.tables:
            table.begin_loop()
        self.client.enter_loop(plan)
        self.plan = plan
        self.loops += 1
        self.next_round = plan.end_round

    def next_slot(self, plan: LoopPlan) -> Task | None:
        """Wait for the next slot and load what it needs; None if the pass is over."""
        is_streaming = all(table.is_streamable for table in self.tables)
        reply = self.client.next_task(is_streaming=is_streaming)
        while not self._load(reply):
            reply = self.client.next_task_anew()
        if isinstance(reply, LoopEnd):
            self._end_loop(plan, reply)
            return None
        self._note_slot(reply)
        self.task = reply
        self.round = reply.round
        for table in self.tables:
            table.begin_slot(reply, plan)
        return reply

    def end_slot(self, samples: int) -> None:
        """Contribute what is left of the slot and finish it.

        Parameters
        ----------
        samples : int
            Samples that it had.
        """
        task, plan = self.task, self.plan
        if task is None or plan is None:
            return
        metas = {table.number: table.end_slot(task, plan) for table in self.tables}
        is_void = self.client.is_void
        self.client.finish_slot(task, metas)
        self.task = None
        if is_void:
            return
        self.progress.samples += samples
        self._report()

    def log(self, name: str, value: float) -> None:
        """Keep a value until the slot is over; between slots, tell it at once."""
        self.progress.log(name, self.round, value)
        if self.task is None:
            self._report()

    def _report(self) -> None:
        progress = self.progress
        self.client.report(progress.samples, progress.watch.read(), progress.take_logged())

    def _load(self, reply: Task | LoopEnd) -> bool:
        """Load new versions; False if the servers overwrote one while it was read."""
        by_number = {table.number: table for table in self.tables}
        is_for_body = isinstance(reply, Task)
        loaded = [
            by_number[snapshot.table].load(snapshot, is_for_body=is_for_body)
            for snapshot in reply.snapshots
        ]
        return all(loaded)

    def _note_slot(self, task: Task) -> None:
        if task.round != self.round:
            self.slots_held = []
        if task.slot not in self.slots_held:
            self.slots_held.append(task.slot)

    def _end_loop(self, plan: LoopPlan, end: LoopEnd) -> None:
        is_exact = end.version == plan.end_round
        for table in self.tables:
            table.end_loop(is_exact and table.front < plan.end_round)
        self.plan = None
        self.round = plan.end_round
        seed_between_loops(self.settings.seed, plan.end_round)

    # ---- steps -----------------------------------------------------------------------------------

    def step(self, table: Table) -> None:
        """Take part in a step: within `batches` with this slot, otherwise as a round of its own."""
        if self.mode is Mode.SLOTS:
            if self.task is None:
                text = (
                    "optimizer.step() was called outside of the body of a loop over ps.batches(), "
                    "where there is no round that it could be part of"
                )
                raise LocalProtocolError(text)
            table.step()
            return
        if self.mode is Mode.UNDECIDED:
            self._begin_loader()
        table.step()
        self.end_slot(samples=0)
        self._next_loader_task()

    def check_can_clip(self, table: Table) -> None:
        """Refuse a norm limit that comes too late for the round."""
        if self.task is not None and table.pushing.is_stepped:
            raise LocalProtocolError("call ps.clip_grad_norm before optimizer.step(), not after it")
        if self.mode is Mode.SLOTS and self.task is None:
            text = "ps.clip_grad_norm belongs into the body of the loop over ps.batches()"
            raise LocalProtocolError(text)

    def _begin_loader(self) -> None:
        if any(t.options.consistency.kind is ConsistencyKind.SSP for t in self.tables):
            text = (
                "consistency='ssp' needs ps.batches(): with own loaders nobody else can compute a "
                "slot whose worker is gone, and all others would wait for it for ever"
            )
            raise UnsupportedError(text)
        if any(table.options.consistency.staleness_max for table in self.tables):
            text = (
                "staleness_max needs ps.batches(): an own loader reads on, so that nobody could "
                "compute again what is too stale"
            )
            raise UnsupportedError(text)
        if any(table.is_quorum for table in self.tables):
            text = (
                "consistency='quorum' needs ps.batches(): an own loader reads on, so that nobody "
                "could compute again what came too late"
            )
            raise UnsupportedError(text)
        limits = [table.norm_max for table in self.tables]
        size = self.client.size
        plan = LoopPlan(PlanKind.LOADER, 0, 0, 0, size, 0, size, 0, False, 0)
        self.client.enter_loop(plan)
        self.mode = Mode.LOADER
        self.plan = plan
        for table in self.tables:
            table.begin_loader()
            if len(self.tables) > 1:  # another one's step ends the round, and with it the slot
                table.pushing.overlap = Overlap.OFF
        self._next_loader_task()
        for table, limit in zip(self.tables, limits, strict=True):
            table.norm_max = limit

    def _next_loader_task(self) -> None:
        if self.plan is None:
            raise LocalProtocolError("no loop of an own loader was begun")
        if self.next_slot(self.plan) is None:
            raise JobFailedError("the job ended while this worker still had data")


def _times(consistency: Consistency) -> object:
    """What tables that are in one job have to have in common."""
    if consistency.kind is ConsistencyKind.QUORUM:
        return consistency
    return None


class _Current:
    """Holds the session of this process."""

    session: Session | None = None
    exit_watch: ExitWatch | None = None


def init(
    slots: int | None = None,
    seed: int | None = None,
    *,
    scheduler: str | None = None,
    threads: int = 1,
) -> None:
    """Join the cluster, or start one inside this process if no scheduler's address is known.

    Waits until the cluster has formed.

    Seeds torch, numpy and `random` with the job's seed, so that every worker builds the same model.

    Parameters
    ----------
    slots : int, optional
        V, the slots of a round; ``TREEFOLD_SLOTS`` or 8 if not given.
    seed : int, optional
        The job's seed; ``TREEFOLD_SEED`` or 0 if not given.
    scheduler : str, optional
        The scheduler's address; ``TREEFOLD_SCHEDULER`` if not given, and else what the environment
        of an engine says that started several processes (``docs/config.md``).
    threads : int
        Threads that torch may compute with; all workers need the same number, since it can change
        the bits of a sum. 0 leaves torch's own setting alone.

    Raises
    ------
    LocalProtocolError
        It was called before.
    ConfigError
        A setting is wrong.
    AuthError
        This process is refused, or the scheduler has not the key that it has to have.
    FormationError
        The cluster did not form in time; the text names who is missing.
    SchedulerLostError
        No scheduler answered.
    """
    if _Current.session is not None:
        raise LocalProtocolError("ps.init() was called already; a process takes part in one job")
    if threads < 0:
        msg = f"threads is {threads}; it is a number of threads, or 0 for torch's own setting"
        raise ConfigError(msg)
    arguments = {"slots": slots, "seed": seed, "scheduler": scheduler}
    loaded = load(arguments, role=SCRIPT)
    settings = loaded.settings
    if loaded.engine:
        sys.stderr.write(f"treefold: {loaded.engine}\n")  # a script's logging is its own
    spare_compiler()
    try:
        client = _connect(settings)
    except SchedulerLostError as error:
        end_with(error, NOT_FORMED_STATUS)
        raise
    if threads:
        torch.set_num_threads(threads)
    seed_all(settings.seed)
    _Current.session = Session(client, settings)
    _Current.session.progress.watch.install()
    # Alone there is nobody who could go on with this worker's slots: a signal ends the process.
    _Current.exit_watch = ExitWatch(_leave, client.drain if settings.scheduler else None)
    _Current.exit_watch.install()
    try:
        client.join()
    except TreefoldError as error:
        _leave(Outcome.FAILED, str(error))
        if isinstance(error, AuthError | FormationError | SchedulerLostError):
            end_with(error, NOT_FORMED_STATUS)
        raise


def shutdown() -> None:
    """Leave the cluster, as done. The end of the script does it too; twice does no harm."""
    if _Current.session is not None:
        _leave(Outcome.DONE, "")


def current() -> Session:
    """The session of this process.

    Raises
    ------
    LocalProtocolError
        There is none.
    """
    if _Current.session is None:
        raise LocalProtocolError("call ps.init() first")
    return _Current.session


def rank() -> int:
    """This worker's rank: 0 up to the number of workers, and beyond for those that joined later."""
    return current().client.rank


def size() -> int:
    """How many workers form the cluster."""
    return current().client.size


def is_chief() -> bool:
    """Whether this is the live worker of the lowest rank: the one to print and to save."""
    return current().client.is_chief


def round_number() -> int:
    """The current round: in a loop body that of its slot, between loops the one that comes next."""
    return current().round


def log(name: str, value: float | Tensor) -> None:
    """Show a number of the script's own on the live page, as a curve by its name.

    The page has about one value per second: what is logged more often is shown as it was last. If
    several workers log the same name, it shows the mean of those that are furthest. A value that is
    not finite is left out. Training is not changed by it.

    Parameters
    ----------
    name : str
        Such as ``accuracy``, at most 64 characters; 32 names at most.
    value : float or Tensor
        The number, or a tensor with one element (reading one from a GPU waits for it).

    Raises
    ------
    LocalProtocolError
        `init` was not called.
    DataError
        The value is no number, or the name has characters that are not printed.
    CapacityError
        There are too many names, or this one is too long or empty.
    """
    current().log(name, as_number(name, value))


def _connect(settings: Settings) -> Client:
    if settings.scheduler:
        return Client(settings)
    from treefold.torch.embedded import connect_embedded  # noqa: PLC0415 # workers do without it

    return connect_embedded(settings)


def _leave(outcome: Outcome, text: str) -> None:
    """End the session whatever happens on the way out."""
    job, watch = _Current.session, _Current.exit_watch
    _Current.session = _Current.exit_watch = None
    if watch is not None:
        watch.remove()
    if job is None:
        return
    job.progress.watch.remove()
    for table in job.tables:
        table.forget()
        table.pushing.close()
    PINS.release()
    job.client.leave(outcome, text)
