"""One DistributedOptimizer's share of the job: its tensors, its state, and how a slot uses them.

Loads versions into the model, begins and ends slots, and hands contributions to the client. When
which of it happens is the session's business.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import msgspec
from torch import Tensor, nn
from torch.optim import Optimizer, SparseAdam

from treefold.common.errors import CapacityError, LocalProtocolError
from treefold.common.layout import Layout
from treefold.common.optim import hyper_of
from treefold.common.plan import LoopPlan, PlanKind
from treefold.common.process import give_back_freed_memory
from treefold.common.round_state import RoundState, Schedule
from treefold.common.spec import SYNC, UNGUARDED, Consistency, Dtype, Guard
from treefold.torch.awaiting import Awaiting, can_be_awaited
from treefold.torch.binding import (
    BoundModel,
    BoundTensor,
    flat_values,
    frozen_spec,
    table_spec,
)
from treefold.torch.buffers import NO_SLOT, BufferMode, Buffers
from treefold.torch.options import OverlapMode
from treefold.torch.pushing import Lending, Pushing, TablePort
from treefold.torch.record import record_of
from treefold.torch.schedules import Schedules
from treefold.torch.values import ModelValues, Pieces, copy_parameters
from treefold.wire.words import STATE_BYTES_MAX
from treefold.worker.client import Client
from treefold.worker.effects import SlotMeta
from treefold.worker.handed import Snapshot, Task

if TYPE_CHECKING:
    from treefold.common.spec import Hyper


@dataclass(frozen=True, slots=True)
class TableOptions:
    """What the user chose for one DistributedOptimizer; ``model`` is its model's first table."""

    name: str
    model: str
    overlap: OverlapMode
    buffers: BufferMode
    is_lent: bool = True
    wire: Dtype = Dtype.FLOAT32
    consistency: Consistency = SYNC
    guard: Guard = UNGUARDED
    is_in_place: bool = False


@dataclass(frozen=True, slots=True)
class Owned:
    """The user's objects that a table belongs to: optimizer, its wrapper, model."""

    inner: Optimizer
    outer: Optimizer
    model: nn.Module


@dataclass(frozen=True, slots=True)
class _Settled:
    """What a round steps with: hyper-parameters by param group, and the norm limit."""

    groups: "list[Hyper]"
    norm_max: float


class Table:
    """One table of the job, as its worker uses it.

    Parameters
    ----------
    client : Client
        The connection.
    owned : Owned
        The user's objects.
    bound : BoundModel
        The tensors.
    options : TableOptions
        What the user chose.

    Attributes
    ----------
    norm : float or None
        Global gradient norm of the last completed round, None if none was asked for.
    norm_max : float
        Limit for that of the round in work, 0 for none.
    is_asynchronous : bool
        Whether slots contribute one by one.
    is_quorum : bool
        Whether rounds go on without the last slots.
    may_leave_out : bool
        Whether a slot may have no part in what its round makes.
    front : int
        The round that left the state that was loaded, of an asynchronous table; otherwise -1.
    """

    def __init__(
        self, client: Client, owned: Owned, bound: BoundModel, options: TableOptions
    ) -> None:
        self.owned = owned
        self.bound = bound
        self.options = options
        self.norm: float | None = None
        self.norm_max = 0.0
        self.front = -1
        self._client = client
        folded = [] if options.buffers is BufferMode.LOCAL else bound.buffers
        self._tensors: list[BoundTensor] = [*bound.parameters, *folded]
        spec = table_spec(
            options.name, owned.inner, self._tensors, options.wire, options.consistency
        )
        spec = msgspec.structs.replace(spec, guard=options.guard)
        self.may_leave_out = spec.is_gathered
        self.is_asynchronous, self.is_quorum = spec.is_asynchronous, spec.is_quorum
        self.layout = Layout(spec)
        self._pieces: Pieces = cache(self.layout.pieces)
        self.buffers = Buffers(folded, bound.opaque, options.buffers)
        self.schedules = Schedules(owned.inner, owned.outer)
        self._groups: list[Hyper] = []
        self._state: RoundState | None = None
        self._loop_start: Schedule | None = None
        self._slot_start: Schedule | None = None
        self._is_exact = True  # the script left the loop before with that loop's state
        self._versions: list[int] = []
        self._task: Task | None = None
        self._is_early: bool | None = None  # None: no slot has shown how the script works
        self._first: _Settled | None = None
        self._early: _Settled | None = None
        self._is_loaded = False  # a version whose buffers the model does not have yet
        starts, elements = self.layout.starts, self.layout.elements
        unfolded = [*bound.opaque, *(bound.buffers if not folded else [])]
        record = record_of(options.model, owned.model, self._tensors, unfolded)
        snapshot = client.declare(spec, flat_values(self._tensors, starts, elements), record)
        self.number = snapshot.table
        self.parameters = [_parameter(tensor) for tensor in bound.parameters]
        self._values = ModelValues(
            self.parameters, self.layout, self._pieces, is_in_place=options.is_in_place
        )
        give_back_freed_memory()  # what the parameters lay in before
        names = [tensor.name for tensor in bound.parameters]
        overlap = options.overlap
        if overlap is OverlapMode.AUTO:
            is_on_cpu = all(parameter.is_cpu for parameter in self.parameters)
            is_useless = is_on_cpu and client.is_crowded
            overlap = OverlapMode.NONE if is_useless else OverlapMode.BOTH
        self.pushing = Pushing(
            TablePort(client, self.number, self.layout),
            list(zip(names, self.parameters, strict=True)),
            overlap is not OverlapMode.NONE,
            isinstance(owned.inner, SparseAdam),
        )
        self.pushing.on_first = self._settle_hyper_early
        if not options.is_lent:
            self.pushing.lending = Lending.OFF
        self._awaiting: Awaiting | None = None
        flat = self._values.flat
        can_wait = overlap is OverlapMode.BOTH and can_be_awaited(owned.model, self.parameters)
        if can_wait and not options.is_in_place and flat is not None:
            self._awaiting = Awaiting(owned.model, self.parameters, self.layout, flat)
        self.load(snapshot)
        self._give_buffers()
        give_back_freed_memory()  # the first version's copy

    # ---- versions --------------------------------------------------------------------------------

    @property
    def is_streamable(self) -> bool:
        """Whether a loop body can begin while parameters are still on their way."""
        return self._awaiting is not None

    def load(self, snapshot: Snapshot, *, is_for_body: bool = False) -> bool:
        """Take in a version: parameters at once, buffers and schedulers when the next slot begins.

        Parameters
        ----------
        snapshot : Snapshot
            Of this table; released afterwards.
        is_for_body : bool
            Whether a loop body follows, for which parameters may stay where they are.

        Returns
        -------
        bool
            False if it was overwritten while it was read: what was loaded is of no use.
        """
        with self._client.spent.on("pull"):
            self._take(snapshot, is_for_body=is_for_body)
        self._versions = [parameter._version for parameter in self.parameters]
        is_torn = snapshot.arrivals is not None and snapshot.arrivals.is_torn
        is_intact = snapshot.is_intact and not is_torn
        snapshot.release()
        return is_intact

    def _take(self, snapshot: Snapshot, *, is_for_body: bool) -> None:
        if self._awaiting is not None and snapshot.arrivals is not None:
            self._awaiting.begin(snapshot.arrivals, self._take_buffers)
        else:
            self.forget()
            if is_for_body and self._values.lend(snapshot):
                self._client.borrow(snapshot)
            else:
                self._values.load(snapshot)
            for start, stop, values in snapshot.parts:
                self._take_buffers(start, stop, values)
        self.norm = None if math.isnan(snapshot.norm) else snapshot.norm
        self.front = snapshot.front
        if snapshot.state:
            self._state = msgspec.msgpack.decode(snapshot.state, type=RoundState)
            self.buffers.moving = self._state.moving
            self.buffers.load_opaque(self._state.opaque)
        self._is_loaded = True

    def _take_buffers(self, start: int, stop: int, values: Tensor) -> None:
        count = len(self.parameters)
        for piece in self._pieces(start, stop):
            if piece.tensor >= count:
                stretch = values[piece.start - start : piece.stop - start]
                self.buffers.load_float(piece.tensor - count, piece.offset, stretch)

    def copies_of(self, snapshot: Snapshot) -> dict[int, Tensor]:
        """Copies of this table's tensors at a version, by the identity of those of the model."""
        own = [tensor.current for tensor in self._tensors]
        copies = [nn.Parameter(one.detach().clone(), requires_grad=False) for one in own]
        copy_parameters(snapshot, self._pieces, copies)
        snapshot.release()
        return {id(one): copy.detach() for one, copy in zip(own, copies, strict=True)}

    def forget(self) -> None:
        """Wait for nothing any more: what is still on its way is not needed."""
        if self._awaiting is not None:
            self._awaiting.forget()

    @property
    def is_in_place(self) -> bool:
        """Whether parameters lie in servers' memory at this moment."""
        return self._values.is_lent

    def take_back(self) -> None:
        """Give the parameters memory of their own."""
        self._values.take_back()

    # ---- loops and slots -------------------------------------------------------------------------

    def begin_loop(self) -> None:
        """Note what the script made of schedulers and hyper-parameters before this loop."""
        self.schedules.scan()
        self._loop_start = self.schedules.capture()

    def begin_loader(self) -> None:
        """Begin with an own loader; a worker that joins takes over the job's learning rates."""
        self.begin_loop()
        if self._state is not None:
            self.schedules.restore(self._state.schedule)

    def begin_slot(self, task: Task, plan: LoopPlan) -> None:
        """Give the script the state that the round started from."""
        is_leased = plan.kind is PlanKind.SLOTS
        if is_leased:
            self._restore_schedule(task, plan)
        if is_leased or self._is_loaded:
            self._give_buffers()
        self.norm_max = 0.0
        self._groups = []
        self._early = None
        self._task = task
        self.pushing.begin(task, share_of(task, plan), is_stale_allowed=not is_leased)

    def step(self) -> None:
        """Contribute the slot's gradients; the round uses the hyper-parameters of this moment."""
        if self.pushing.is_stepped:
            text = (
                "optimizer.step() was called twice in one loop body; a body is one slot of a round "
                "and takes part in one step"
            )
            raise LocalProtocolError(text)
        self._check_unmoved()
        self._groups = hyper_of(self.owned.inner)
        self._settle_hyper()
        self.pushing.step()

    def _settle_hyper(self) -> None:
        """Now nothing of what the round steps with can change any more."""
        known = _Settled(self._groups, self.norm_max)
        if self._early is not None and self._early != known:
            text = (
                "a hyper-parameter or the limit of ps.clip_grad_norm was set between backward and "
                "optimizer.step(), when the servers had begun to step; set it before backward, or "
                "pass overlap=False to ps.DistributedOptimizer"
            )
            raise LocalProtocolError(text)
        if self._first is not None:
            self._is_early = known == self._first
            self._first = None
        if self._early is None and self._task is not None:
            self._client.settle_hyper(self._task, self.number, known.groups, known.norm_max)

    def _settle_hyper_early(self) -> None:
        """Backward has finished a first part: servers can begin to step, if they know with what."""
        if self._is_early is None:
            self._first = _Settled(hyper_of(self.owned.inner), self.norm_max)
        elif self._is_early and self._task is not None:
            self._early = _Settled(hyper_of(self.owned.inner), self.norm_max)
            task, early = self._task, self._early
            self._client.settle_hyper(task, self.number, early.groups, early.norm_max)

    def end_slot(self, task: Task, plan: LoopPlan) -> SlotMeta:
        """Contribute what is left, and say what the next round starts from.

        Returns
        -------
        SlotMeta
            Its state is empty but for those slots whose state counts.
        """
        share = 1.0 if self.is_asynchronous else samples_share_of(task, plan)
        slot = NO_SLOT if self.may_leave_out else task.slot  # 0 may be left out, or be there twice
        self.pushing.end(self.buffers.shares(slot, share))
        groups = self._groups or hyper_of(self.owned.inner)
        counts = task.slot == 0 or self.is_asynchronous or self.is_quorum
        return SlotMeta(groups, self.norm_max, self._next_state(task) if counts else b"")

    def end_loop(self, is_exact: bool) -> None:
        """Leave the loop with the state of the version it ended at.

        Parameters
        ----------
        is_exact : bool
            Whether the model holds the version right after the loop; otherwise the job is further
            on, and a later slot will bring its state.
        """
        self._give_buffers()
        self._is_exact = is_exact
        if is_exact and self._state is not None:
            self.schedules.restore(self._state.schedule)

    def _give_buffers(self) -> None:
        self.buffers.reset()
        self._is_loaded = False

    def _restore_schedule(self, task: Task, plan: LoopPlan) -> None:
        is_first = task.round == plan.first_round and self._is_exact and not task.is_again
        start = self._loop_start if is_first or self._state is None else self._state.schedule
        if task.is_again and self._state is not None:
            start = self._state.before or start
        if start is not None:
            self.schedules.restore(start)
        self._slot_start = start

    def _next_state(self, task: Task) -> bytes:
        opaque, schedule = self.buffers.changed_opaque(), self.schedules.capture()
        if task.is_again and self._state is not None:  # rounds of the plan are what counts
            schedule = self._state.schedule
        before, moving = None, self.buffers.moved()
        if self.is_quorum:
            before = self._slot_start
        if self.may_leave_out:  # no slot's values may travel whole: what has moved once folds on
            moving = sorted({*self.buffers.moving, *moving})
        state = RoundState(schedule, moving, opaque, before)
        packed = msgspec.msgpack.encode(state)
        if len(packed) > STATE_BYTES_MAX:
            text = (
                f"the state beside the tensors of table {self.options.name!r} has {len(packed)} "
                f"bytes, at most {STATE_BYTES_MAX} (STATE_BYTES_MAX) are allowed; "
                f"{sum(map(len, opaque.values()))} of them are buffers that hold no floats: pass "
                "buffers='local' to ps.DistributedOptimizer, or keep them out of the model"
            )
            raise CapacityError(text)
        return packed

    def _check_unmoved(self) -> None:
        for bound, parameter in zip(self.bound.parameters, self.parameters, strict=True):
            if bound.current is not parameter:
                text = (
                    f"parameter {bound.name!r} was replaced in the model after "
                    "ps.DistributedOptimizer was made; a table's tensors are fixed"
                )
                raise LocalProtocolError(text)
        versions = [parameter._version for parameter in self.parameters]
        for bound, now, then in zip(self.bound.parameters, versions, self._versions, strict=True):
            if now != then:
                text = (
                    f"the script wrote to parameter {bound.name!r}, but the servers hold the "
                    "parameters and would overwrite it; load checkpoints before making "
                    "ps.DistributedOptimizer"
                )
                raise LocalProtocolError(text)
        _check_groups(self.owned.inner, self.parameters)


def share_of(task: Task, plan: LoopPlan) -> float:
    """What a slot's gradients count with."""
    if plan.is_shared:  # each slot has parameters of its own, the more so the fewer it shares
        return 1.0
    return samples_share_of(task, plan)


def samples_share_of(task: Task, plan: LoopPlan) -> float:
    """A slot's share of its round's samples."""
    if plan.kind is PlanKind.LOADER:
        return 1.0 / plan.slots
    return plan.slot_samples(task.round, task.slot) / plan.round_samples(task.round)


def load_frozen(
    client: Client, options: TableOptions, owned: Owned, tensors: Sequence[BoundTensor]
) -> None:
    """Give every worker the chief's values of the parameters that no optimizer owns.

    Parameters
    ----------
    client : Client
        The connection.
    options : TableOptions
        Of the table with the optimizer.
    owned : Owned
        The user's objects.
    tensors : sequence of BoundTensor
        Its tensors; nothing is declared if there are none.
    """
    if not tensors:
        return
    spec = frozen_spec(f"{options.name}.frozen", tensors)
    layout = Layout(spec)
    record = record_of(options.model, owned.model, tensors, [])
    snapshot = client.declare(spec, flat_values(tensors, layout.starts, layout.elements), record)
    copy_parameters(snapshot, layout.pieces, [_parameter(tensor) for tensor in tensors])
    snapshot.release()


def _parameter(bound: BoundTensor) -> nn.Parameter:
    found = bound.current
    if not isinstance(found, nn.Parameter):
        text = f"{bound.name!r} is a {type(found).__name__}, not a parameter of the model"
        raise LocalProtocolError(text)
    return found


def _check_groups(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    now = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if [id(parameter) for parameter in now] != [id(parameter) for parameter in parameters]:
        text = (
            "the optimizer's param groups were changed after ps.DistributedOptimizer was made; a "
            "table's tensors are fixed: put every parameter into a group at the start (with "
            "requires_grad=False until it is to train)"
        )
        raise LocalProtocolError(text)
