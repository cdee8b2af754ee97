"""A worker's connection, as a training thread uses it: declare, take slots, push, pull, wait.

`treefold.torch` is built on this. Use it directly for models that are not ``torch.nn.Module``
objects.
"""

import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from treefold.common.config import Settings
from treefold.common.errors import ConfigError, LocalProtocolError, UnavailableError
from treefold.common.fold import TORCH_DTYPES
from treefold.common.layout import Layout
from treefold.common.plan import LoopPlan, PlanKind
from treefold.common.process import Spent
from treefold.common.spec import Dtype, Hyper, TableSpec
from treefold.transport.sockets import Context
from treefold.wire.words import Outcome
from treefold.worker import effects, machine
from treefold.worker.checks import check, check_groups, check_run, table_of
from treefold.worker.effects import SlotMeta
from treefold.worker.flats import Flats
from treefold.worker.handed import Borrowed, Direct, LoopEnd, PartRun, Snapshot, Task
from treefold.worker.pulls import PartRange, Table
from treefold.worker.sampled import Sampled
from treefold.worker.shell import Answer, GiveBack, Settle, Values, WorkerShell, snapshot_of

if TYPE_CHECKING:
    from treefold.worker.arrivals import Arrivals

DRAIN_TEXT = "the worker was asked to stop"
DECLARE_TRIES_MAX = 100  # of copying a first version while the servers go on


class Client:
    """One worker. All methods are called from one thread, the training thread.

    Parameters
    ----------
    settings : Settings
        ``scheduler`` says where the cluster is.
    context : Context, optional
        Shared with other roles when several live in one process.

    Raises
    ------
    ConfigError
        There is no scheduler address.
    """

    def __init__(self, settings: Settings, context: Context | None = None) -> None:
        if not settings.scheduler:
            msg = "a client needs the scheduler's address: set scheduler, or TREEFOLD_SCHEDULER"
            raise ConfigError(msg)
        self._shell = WorkerShell(settings, context)
        self._calls, self._pid, self._direct = itertools.count(1), os.getpid(), Direct()
        self._plan: LoopPlan | None = None
        self._sampled = Sampled(settings.ledger)
        self._is_closed = self._is_joined = False
        self._waits_for, self._task_ns, self._pushed_ns, self._lent_in, self._base = "", 0, 0, -1, 0
        self._scratches: list[torch.Tensor] = []
        self._streams: list[Arrivals] = []
        self._borrowed = Borrowed()
        self.before_leaving: Callable[[], None] = lambda: None  # called first by `leave`
        self._shell.start()

    def join(self) -> None:
        """Wait until the cluster has formed; `rank` and `is_chief` are known from then on.

        Raises
        ------
        FormationError
            The cluster did not form in time; the text names who is missing.
        SchedulerLostError
            No scheduler answered.
        RemoteProtocolError
            The cluster speaks another version of the protocol.
        """
        if not self._is_joined:
            call = next(self._calls)
            self._call(call, effects.JoinCalled(call), "join")
            self._is_joined = True

    @property
    def rank(self) -> int:
        """This worker's rank, as the scheduler gave it."""
        self.join()
        return self._shell.core.membership.rank

    @property
    def size(self) -> int:
        """How many workers form the cluster."""
        self.join()
        return self._shell.core.membership.workers

    @property
    def is_chief(self) -> bool:
        """Whether this is the live worker of the lowest rank, or was when its job was done."""
        self.join()
        view, membership = self._shell.core.view, self._shell.core.membership
        return view is not None and view.chief == membership.incarnation

    @property
    def is_crowded(self) -> bool:
        """Whether work beside the computation costs it time; see `machine.is_crowded`."""
        core = self._shell.core
        return machine.is_crowded(core.view, core.membership.identity.host)

    # ---- tables and passes --------------------------------------------------------------------

    def declare(self, spec: TableSpec, initial: torch.Tensor, record: bytes = b"") -> Snapshot:
        """Declare a table and wait for its newest version.

        Parameters
        ----------
        spec : TableSpec
            Equal in every worker.
        initial : Tensor, float32 [elements of the table]
            Used if the table is new and this worker is the one to initialise it.
        record : bytes
            A `ModelRecord`, for those who export checkpoints.

        Returns
        -------
        Snapshot
            Version 0 in a new job, a later one if training goes on already.

        Raises
        ------
        DataError
            The initial values are not what the spec says.
        SpecMismatchError
            Another worker declared the table otherwise.
        FormationError
            The cluster did not form in time.
        SchedulerLostError
            No scheduler answered.
        """
        check(f"initial values for table {spec.name!r}", initial, Layout(spec).elements)
        self._shell.keep_initial(spec.name, initial.detach().contiguous())
        del initial  # as large as the model, and not needed beside the first version
        for _ in range(DECLARE_TRIES_MAX):
            call = next(self._calls)
            answer = self._call(call, effects.DeclareCalled(call, spec, record), "declare")
            snapshot = snapshot_of(answer.tensors[0])
            own = snapshot.copies() if snapshot.segments else snapshot.parts
            if snapshot.is_intact:
                snapshot = replace(snapshot, parts=own, segments=[])
                self._direct.declared[snapshot.table] = snapshot
                return snapshot
        text = f"table {spec.name!r} changed {DECLARE_TRIES_MAX} times while it was copied"
        raise UnavailableError(text)

    def parts(self, table: int) -> Sequence[PartRange]:
        """The parts of a table, all shards, in the order of the flat space.

        Raises
        ------
        DataError
            There is no such table.
        """
        return self._table(table).parts

    def enter_loop(self, plan: LoopPlan) -> None:
        """Begin a pass over the data.

        Raises
        ------
        SpecMismatchError
            Another worker's pass differs.
        """
        call = next(self._calls)
        self._plan = plan
        self._call(call, effects.LoopCalled(call, plan), "enter_loop")

    # ---- slots --------------------------------------------------------------------------------

    def next_task(self, is_streaming: bool = False) -> Task | LoopEnd:
        """Wait for this worker's next slot.

        Parameters
        ----------
        is_streaming : bool
            Whether it may begin while parts of its version are still on their way; a snapshot has
            ``arrivals`` then. If `is_void` at its end, the slot is begun anew, or left to others.

        Raises
        ------
        JobFailedError
            The job has ended for everybody.
        UnavailableError
            No server has answered for a minute.
        SystemExit
            The process was asked to stop and has left the cluster.
        """
        is_torn = self._borrowed.is_torn or any(one.is_torn for one in self._streams)
        return self._next_task(is_torn, is_streaming)

    def next_task_anew(self) -> Task | LoopEnd:
        """Do as `next_task` after a snapshot was not intact: begin with the newest version."""
        return self._next_task(is_torn=True)

    @property
    def is_void(self) -> bool:
        """Whether the slot in hand does not count: its version did not come, or stay, whole."""
        return self._is_given_up or self._borrowed.is_torn

    @property
    def _is_given_up(self) -> bool:
        return any(arrivals.is_void for arrivals in self._streams)

    def borrow(self, snapshot: Snapshot) -> None:
        """Say that the slot in hand, void if it changes, computes with a version where it lies."""
        self._borrowed.add(snapshot)

    def _next_task(self, is_torn: bool, is_streaming: bool = False) -> Task | LoopEnd:
        newest: dict[int, Snapshot] = {}
        while True:
            call = next(self._calls)
            with self.spent.on("wait"):
                event = effects.TaskCalled(call, is_torn, is_streaming)
                answer = self._call(call, event, "next_task")
            is_torn = False
            newest |= {item.snapshot.table: snapshot_of(item) for item in answer.tensors}
            snapshots = list(newest.values())
            if snapshots or is_torn:
                self._borrowed.give_back(newest)
                self._streams = [one.arrivals for one in snapshots if one.arrivals is not None]
            if isinstance(answer.value, effects.LoopEnd):
                if answer.value.is_draining:
                    self.leave(Outcome.DRAINED, DRAIN_TEXT)
                    raise SystemExit(0)
                return LoopEnd(answer.value.version, snapshots)
            if isinstance(answer.value, effects.Task) and answer.value.slot != effects.STANDING_BY:
                self._task_ns, self._pushed_ns = time.monotonic_ns(), self._not_computing_ns()
                task = answer.value
                self._base = task.round if task.base < 0 else task.base
                which = task.round, task.slot, snapshots, task.is_kept, self._is_lent(self._base)
                return Task(*which, task.is_again)

    def _is_lent(self, round_: int) -> bool:
        """Whether memory lent in this round is in use. With the next version it is free."""
        if self._lent_in != round_ and not self._streams:  # of streams, the round before may go on
            return False
        call = next(self._calls)
        return bool(self._call(call, Settle(call), "next_task").value)

    def scratch(self, elements: int) -> torch.Tensor:
        """An uninitialised buffer for the contributions of one slot, float32 [elements]."""
        flat = self._shell.flats.take(elements)
        self._scratches.append(flat)
        return flat

    @property
    def flats(self) -> Flats:
        """Buffers that can be lent."""
        return self._shell.flats

    def contribute(self, task: Task, where: PartRun, values: Values | None) -> None:
        """Hand over adjacent parts of a slot's contribution; does not wait.

        Parameters
        ----------
        task : Task
            The slot.
        where : PartRun
            Which parts of which table, and which tensors have no gradient.
        values : Values, or None
            Of those parts one after the other; a buffer from `scratch` belongs to the client from
            now on. Tensors without a gradient must be -0.0. None if none has one.

        Raises
        ------
        DataError
            There is no such table or part, or the values are not what it holds.
        """
        if self._is_given_up:
            return
        check_run(where, self.parts(where.table), None if values is None else values.flat)
        if values is not None and values.owner is None:
            self._lent_in = self._base
        event = effects.Contributed(
            where.table, where.part, where.count, task.round, task.slot, (), where.absent
        )
        self._shell.post(event, values)

    def settle_hyper(self, task: Task, table: int, groups: list[Hyper], norm_max: float) -> None:
        """Say what the slot steps with, as soon as that does not change any more.

        Parameters
        ----------
        task : Task
            The slot; only slot 0 counts.
        table : int
            The table.
        groups : list of dict
            Hyper-parameters per param group.
        norm_max : float
            Limit of the global gradient norm, 0 for none.
        """
        if task.slot == 0 and not self._is_given_up:
            self._shell.post(effects.HyperKnown(table, task.round, task.slot, groups, norm_max))

    def finish_slot(self, task: Task, metas: dict[int, SlotMeta]) -> None:
        """Say that the slot's work is over; what it did not contribute counts as absent.

        Parameters
        ----------
        task : Task
            The slot.
        metas : dict of int to SlotMeta
            For every table with an optimizer; used if this is slot 0.
        """
        for flat in self._scratches:
            self._shell.post(GiveBack(flat))
        self._scratches.clear()
        if not self.is_void:
            self._shell.post(effects.SlotFinished(task.round, task.slot, metas))
        self.spent.mark("compute", self._task_ns, round=task.round, slot=task.slot)
        took_ns = time.monotonic_ns() - self._task_ns + self._pushed_ns
        self.spent.add("compute", took_ns - self._not_computing_ns())

    def record_samples(self, task: Task, samples: Sequence[int]) -> None:
        """Write down which samples a slot has, if the job keeps a ledger."""
        self._sampled.write(self._shell.core.membership.origin, task, samples)

    def report(self, samples: int, loss: float | None, logged: list[effects.Said]) -> None:
        """Figures for displays: samples so far, the last loss, what the script has said."""
        finite = loss if loss is not None and math.isfinite(loss) else None
        self._shell.post(effects.Reported(samples, finite, logged))

    @property
    def spent(self) -> Spent:
        """What this worker's time went into: compute, push, fold, pull, wait."""
        return self._shell.spent

    def _not_computing_ns(self) -> int:
        return sum(self.spent.ns.get(what, 0) for what in ("push", "pull", "await"))

    # ---- push, pull, wait ---------------------------------------------------------------------

    def push(self, table: int, gradient: torch.Tensor, groups: list[Hyper]) -> int:
        """Push this worker's gradient of the current round; every worker is one slot.

        Parameters
        ----------
        table : int
            Number from the `Snapshot` of `declare`.
        gradient : Tensor, float32 [elements of the table]
            Counts with weight ``1 / size``.
        groups : list of dict
            Hyper-parameters per param group; those of rank 0 count.

        Returns
        -------
        int
            The round, for `wait`.

        Raises
        ------
        DataError
            There is no such table, or the gradient or the groups are not what it takes.
        """
        known = self._table(table)
        check(f"a gradient for table {known.spec.name!r}", gradient, known.layout.elements)
        check_groups(known.spec, groups)
        task = self._take_direct()
        self.settle_hyper(task, table, groups, 0.0)
        flat = self.scratch(known.layout.elements)
        torch.mul(gradient, 1.0 / self.size, out=flat)
        if known.spec.wire is Dtype.FLOAT32:
            where = PartRun(table, 0, len(known.parts), [])
            self.contribute(task, where, Values(flat, 1.0, flat))
        else:
            self._contribute_narrow(task, table, flat)
        self._direct.metas[table] = SlotMeta(groups, 0.0, b"")
        return task.round

    def _contribute_narrow(self, task: Task, table: int, flat: torch.Tensor) -> None:
        """Contribute every part as its wire type."""
        narrow = self.scratch(flat.numel())
        for number, part in enumerate(self.parts(table)):
            values = narrow.view(TORCH_DTYPES[part.wire])[part.start : part.stop]
            values.copy_(flat[part.start : part.stop])
            self.contribute(task, PartRun(table, number, 1, []), Values(values, 1.0, narrow))

    def wait(self, round_: int) -> None:
        """Wait until the round that `push` returned is a version on every server."""
        task = self._direct.task
        if task is None or task.round != round_:
            msg = f"wait({round_}) does not belong to the last push"
            raise LocalProtocolError(msg)
        self.finish_slot(task, self._direct.metas)
        self._direct.metas, self._direct.task = {}, None
        self._take_direct()

    def pull(self, table: int, *, consistent: bool = False) -> torch.Tensor:
        """The newest version that this worker has waited for, float32 [elements of the table].

        With ``consistent`` the newest in which all shards of an asynchronous table have the same.

        Raises
        ------
        DataError
            There is no such table.
        LocalProtocolError
            Its first snapshot was released before.
        """
        self._table(table)
        self._take_direct()
        for snapshot in self.read_alike() if consistent else ():
            self._direct.hold(snapshot)
        declared = self._direct.declared.pop(table, None)
        if table not in self._direct.values:
            if declared is None or not declared.parts:
                msg = f"table {table} is not declared, or its first snapshot was released"
                raise LocalProtocolError(msg)
            self._direct.hold(declared)
        return self._direct.values[table].clone()

    def read_alike(self) -> list[Snapshot]:
        """Versions of asynchronous tables with the same contributions in all shards.

        Raises
        ------
        LocalProtocolError
            A contribution of this worker is on its way.
        UnavailableError
            Shards differed whenever they were read.
        """
        call = next(self._calls)
        answer = self._call(call, effects.AlignedCalled(call), "read_alike")
        return [snapshot_of(item) for item in answer.tensors]

    def _table(self, number: int) -> Table:
        return table_of(self._shell.core.tables, number)

    def _take_direct(self) -> Task:
        if self._direct.task is not None:
            return self._direct.task
        if self._plan is None:
            size = self.size
            self.enter_loop(LoopPlan(PlanKind.LOADER, 0, 0, 0, size, 0, size, 0, False, 0))
        task = self.next_task()
        if isinstance(task, LoopEnd):
            msg = "push, pull and wait cannot be used in a pass over data that is over"
            raise LocalProtocolError(msg)
        while [snapshot for snapshot in task.snapshots if not self._direct.hold(snapshot)]:
            task = self.next_task_anew()
            if isinstance(task, LoopEnd):
                raise LocalProtocolError("the pass over the data ended without this worker")
        self._direct.task = task
        return task

    def drain(self) -> None:
        """Stop after the current slot. May be called from a signal handler."""
        if self._waits_for in ("join", "declare", "enter_loop"):
            self.leave(Outcome.DRAINED, DRAIN_TEXT)
            raise SystemExit(0)
        self._shell.post(effects.DrainAsked())

    def leave(self, outcome: Outcome, text: str) -> None:
        """Leave the cluster and close; waits a bounded time. Does nothing if repeated."""
        if self._is_closed or os.getpid() != self._pid:
            return
        self._is_closed = True
        self.before_leaving()
        call = next(self._calls)
        self._shell.call(call, effects.LeaveCalled(call, outcome, text))
        self._shell.close()
        self._sampled.close()

    def wait_closed(self) -> None:
        """Wait until `leave` has closed every socket. May be called from any thread."""
        self._shell.wait_closed()

    def _call(self, number: int, event: effects.Event | Settle, name: str) -> Answer:
        if self._is_closed:
            msg = "this worker has left the cluster"
            raise LocalProtocolError(msg)
        if os.getpid() != self._pid:
            msg = "this process was forked from a worker; it has no connection of its own"
            raise LocalProtocolError(msg)
        self._waits_for = name
        try:
            answer = self._shell.call(number, event)
        finally:
            self._waits_for = ""
        if answer.error is not None:
            raise answer.error
        return answer
