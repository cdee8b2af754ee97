"""A job in one process, simple enough to read: what the cluster must compute, without a cluster.

`ReferenceJob` does what scheduler and servers do: V slots a round, their contributions added pair
by pair along the fixed tree, one plain ``torch.optim`` step per tensor. `ReferenceClient` has the
interface of `treefold.worker.Client` and computes every slot itself, in any order asked for. It
also checks what a client may expect of its caller.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from treefold.common.layout import Layout
from treefold.common.plan import LoopPlan, PlanKind
from treefold.common.process import Spent
from treefold.common.spec import BUFFER_GROUP, Hyper, Rule, TableSpec
from treefold.transport.lanes import Lanes, LaneSettings
from treefold.wire.words import Outcome
from treefold.worker.effects import Said, SlotMeta
from treefold.worker.flats import Flats
from treefold.worker.handed import LoopEnd, PartRun, Snapshot, Task
from treefold.worker.pulls import PartRange
from treefold.worker.shell import Values

Order = Callable[[int], list[int]]


@dataclass
class Leaf:
    """What one slot contributed to one part."""

    values: Tensor
    absent: int


@dataclass
class Lent:
    """What a client lent, and the bits that it had then."""

    values: Tensor
    bits: bytes


def fold(leaves: Sequence[Tensor]) -> Tensor:
    """The sum of all slots along the fixed tree: neighbours first, then neighbours of those."""
    level = list(leaves)
    while len(level) > 1:
        pairs = [level[at : at + 2] for at in range(0, len(level), 2)]
        level = [pair[0] + pair[1] if len(pair) == 2 else pair[0] for pair in pairs]
    return level[0]


class ReferenceTable:
    """One table: float32 values, one parameter per tensor, one optimizer."""

    def __init__(self, spec: TableSpec, initial: Tensor, part_elements: int) -> None:
        self.spec = spec
        self.layout = Layout(spec)
        self.values = initial.clone()
        ends = range(0, max(1, self.layout.elements), part_elements)
        self.parts = [(at, min(at + part_elements, self.layout.elements)) for at in ends]
        self.state = b""
        self.norm = math.nan
        self.parameters = [nn.Parameter(self._tensor(self.values, n)) for n in self._numbers()]
        self.optimizer = self._build()

    def step(self, leaves: list[list[Leaf]], meta: SlotMeta) -> None:
        """One round: fold, clip, step. ``leaves`` has one list per part, in the order of slots."""
        folded = torch.full_like(self.values, -0.0)
        present: set[int] = set()
        for (start, stop), part in zip(self.parts, leaves, strict=True):
            folded[start:stop] = fold([leaf.values for leaf in part])
            for bit, piece in enumerate(self.layout.pieces(start, stop)):
                if not all(leaf.absent >> bit & 1 for leaf in part):
                    present.add(piece.tensor)
        for number, tensor in enumerate(self.spec.tensors):
            gradient = self._tensor(folded, number) if number in present else None
            if tensor.group != BUFFER_GROUP:
                is_sparse = isinstance(self.optimizer, torch.optim.SparseAdam)
                touched = _touched(gradient) if gradient is not None and is_sparse else gradient
                self.parameters[number].grad = touched
            elif gradient is not None:
                self._tensor(self.values, number).copy_(gradient)
        self._clip(meta.norm_max)
        if self.optimizer is not None:
            for group, hyper in zip(self.optimizer.param_groups, meta.groups, strict=True):
                group.update(_torch_values(hyper))
            self.optimizer.step()
        self.state = meta.state

    def _clip(self, norm_max: float) -> None:
        self.norm = math.nan
        if norm_max:
            grads = [p.grad for p in self.parameters if p.grad is not None]
            self.norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
            clip = norm_max / (torch.tensor(self.norm, dtype=torch.float32) + 1e-6)
            for grad in grads:
                grad.mul_(clip.clamp(max=1.0))

    def _numbers(self) -> list[int]:
        return [n for n, tensor in enumerate(self.spec.tensors) if tensor.group != BUFFER_GROUP]

    def _tensor(self, flat: Tensor, number: int) -> Tensor:
        start, size = self.layout.starts[number], self.layout.sizes[number]
        return flat[start : start + size].view(self.spec.tensors[number].shape)

    def _build(self) -> torch.optim.Optimizer | None:
        if self.spec.optimizer is None:
            return None
        members: list[list[nn.Parameter]] = [[] for _ in self.spec.optimizer.groups]
        for number in self._numbers():
            members[self.spec.tensors[number].group].append(self.parameters[number])
        hypers = [_torch_values(hyper) for hyper in self.spec.optimizer.groups]
        groups = [{**hyper, "params": own} for hyper, own in zip(hypers, members, strict=True)]
        optimizer: torch.optim.Optimizer = getattr(torch.optim, self.spec.optimizer.name)(groups)
        return optimizer


def _touched(gradient: Tensor) -> Tensor:
    """The elements that are not -0.0, as a sparse gradient."""
    where = ~((gradient == 0) & torch.signbit(gradient))
    indices, values = where.nonzero().t(), gradient[where]
    return torch.sparse_coo_tensor(indices, values, gradient.shape, check_invariants=True)


def _torch_values(hyper: Hyper) -> dict[str, object]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in hyper.items()}


@dataclass
class ReferenceJob:
    """Scheduler and servers in one object.

    ``order`` says which slots of a round of so many active ones the next client is to compute, in
    which order; slots may repeat, and then both copies must be equal bit for bit. The other
    ``workers`` of an own loader contribute what ``peer`` makes of this one's contributions.
    ``is_kept`` says whether a client keeps the contribution of a slot, when it has so many others
    to compute; what it does not keep may be lent, and must then stay as it is until the version
    that it feeds.
    """

    slots: int = 1
    part_elements: int = 50
    order: Order = lambda active: list(range(active))
    workers: int = 1
    peer: Callable[[Tensor], Tensor] = torch.clone
    is_kept: Callable[[int], bool] = bool
    tables: list[ReferenceTable] = field(default_factory=list)
    plans: list[LoopPlan] = field(default_factory=list)
    version: int = 0
    leaves: dict[tuple[int, int], dict[int, Leaf]] = field(default_factory=dict)
    lent: list[Lent] = field(default_factory=list)
    hypers: dict[int, tuple[list[Hyper], float]] = field(default_factory=dict)
    finished: list[int] = field(default_factory=list)
    metas: dict[int, SlotMeta] = field(default_factory=dict)
    samples: dict[int, list[int]] = field(default_factory=dict)
    seen: list[tuple[int, int]] = field(default_factory=list)
    history: list[dict[int, SlotMeta]] = field(default_factory=list)

    def values(self) -> list[Tensor]:
        """The float32 values of every table."""
        return [table.values for table in self.tables]

    def trained(self) -> list[int]:
        """Numbers of the tables that have rounds."""
        return [n for n, table in enumerate(self.tables) if table.spec.rule is Rule.OPTIMIZER]

    def is_complete(self, plan: LoopPlan) -> bool:
        """Whether every active slot of the round is finished."""
        if plan.kind is PlanKind.SLOTS and self.version >= plan.end_round:
            return False
        return set(self.finished) == set(range(plan.active_slots(self.version)))

    def complete(self, active: int) -> None:
        """Make the next version."""
        self.check_lent()
        for number in self.trained():
            table = self.tables[number]
            parts = range(len(table.parts))
            slots = [[self.leaves[number, part][slot] for slot in range(active)] for part in parts]
            table.step(slots, self.metas[number])
        self.history.append(self.metas)
        self.leaves, self.finished, self.metas = {}, [], {}
        self.lent, self.hypers = [], {}
        self.version += 1

    def check_lent(self) -> None:
        """What was lent may be read by servers at any time until the version is there."""
        for lent in self.lent:
            assert bits(lent.values) == lent.bits, "lent memory was written to"


class PoisonedFlats(Flats):
    """Buffers that show when they are read before they were written."""

    def __init__(self) -> None:
        super().__init__(Lanes(LaneSettings(is_enabled=False, bytes_max=0)))

    def make(self, elements: int) -> Tensor:
        """A buffer full of garbage, for good."""
        return torch.full((elements,), math.nan)


class ReferenceClient:
    """One worker of a `ReferenceJob`, with the methods of `treefold.worker.Client`."""

    rank = 0
    is_chief = True
    is_crowded = False

    def __init__(self, job: ReferenceJob) -> None:
        self.job = job
        self.size = job.workers
        self.plan: LoopPlan | None = None
        self.spent = Spent()
        self.flats = PoisonedFlats()
        self.left: tuple[Outcome, str] | None = None
        self.reports: list[tuple[int, float | None]] = []
        self.logged: list[Said] = []
        self.early: list[tuple[int, int]] = []
        self._held: dict[int, int] = {}
        self._declared = 0
        self._queue: list[int] = []
        self._loops = 0
        self._is_in_slot = False

    def join(self) -> None:
        """The cluster has formed already."""

    def declare(self, spec: TableSpec, initial: Tensor, record: bytes = b"") -> Snapshot:
        """Make a table, or find the one that is there."""
        del record
        number = self._declared
        self._declared += 1
        if number == len(self.job.tables):
            self.job.tables.append(ReferenceTable(spec, initial, self.job.part_elements))
        assert self.job.tables[number].spec == spec, "workers declare different tables"
        self._held[number] = self.job.version
        return self._snapshot(number)

    def parts(self, table: int) -> list[PartRange]:
        """The parts of a table, all in one shard."""
        layout = self.job.tables[table].layout
        return [
            PartRange(0, number, start, stop, len(layout.pieces(start, stop)))
            for number, (start, stop) in enumerate(self.job.tables[table].parts)
        ]

    def enter_loop(self, plan: LoopPlan) -> None:
        """Begin a pass; every worker must begin the same ones."""
        if self._loops == len(self.job.plans):
            self.job.plans.append(plan)
        assert self.job.plans[self._loops] == plan, "workers declare different plans"
        self._loops += 1
        self.plan = plan

    is_void = False

    def next_task(self, is_streaming: bool = False) -> Task | LoopEnd:
        """The next slot in the order asked for; never before all of its version is here."""
        del is_streaming
        plan, job = self.plan, self.job
        assert plan is not None
        assert not self._is_in_slot, "the slot before was not finished"
        if not self._queue and job.is_complete(plan):
            job.complete(plan.active_slots(job.version))
        snapshots = self._new_versions()
        if plan.kind is PlanKind.SLOTS and job.version >= plan.end_round:
            return LoopEnd(job.version, snapshots)
        if not self._queue:
            order = (
                [0] if plan.kind is PlanKind.LOADER else job.order(plan.active_slots(job.version))
            )
            self._queue = [slot for slot in order if slot not in job.finished]
        slot = self._queue.pop(0)
        job.seen.append((job.version, slot))
        self._is_in_slot = True
        return Task(job.version, slot, snapshots, job.is_kept(len(self._queue)), bool(job.lent))

    def next_task_anew(self) -> Task | LoopEnd:
        """Nothing is ever overwritten here."""
        raise AssertionError("every snapshot of a reference job is intact")

    def read_alike(self) -> list[Snapshot]:
        """No table is asynchronous."""
        return []

    def scratch(self, elements: int) -> Tensor:
        """A buffer full of garbage."""
        return torch.full((elements,), math.nan)

    def settle_hyper(self, task: Task, table: int, groups: list[Hyper], norm_max: float) -> None:
        """Hear early what slot 0 steps with."""
        if task.slot == 0:
            settled = copy.deepcopy((groups, norm_max))
            assert self.job.hypers.setdefault(table, settled) == settled
            self.early.append((task.round, len(self.job.leaves)))

    def contribute(self, task: Task, where: PartRun, values: Values | None) -> None:
        """Take in a run of parts of a slot."""
        ranges = self.job.tables[where.table].parts[where.part : where.part + where.count]
        assert len(ranges) == where.count
        assert len(where.absent) in (0, where.count)
        flat = None
        if values is not None:
            assert values.flat.numel() == ranges[-1][1] - ranges[0][0]
            assert task.is_kept <= (values.owner is not None), "what is kept here was lent"
            if values.owner is None:
                self.job.lent.append(Lent(values.flat, bits(values.flat)))
            flat = values.flat * values.scale
        for number, (start, stop) in enumerate(ranges):
            own = None if flat is None else flat[start - ranges[0][0] : stop - ranges[0][0]]
            absent = where.absent[number] if where.absent else None
            self._take(task, (where.table, where.part + number), own, absent)

    def _take(
        self, task: Task, key: tuple[int, int], values: Tensor | None, absent: bytes | None
    ) -> None:
        table, part = key
        start, stop = self.job.tables[table].parts[part]
        pieces = self.job.tables[table].layout.pieces(start, stop)
        marks = 0 if absent is None else int.from_bytes(absent, "little")
        assert absent is None or len(absent) == -(-len(pieces) // 8)
        assert (values is None) == (marks == (1 << len(pieces)) - 1)
        taken = torch.full((stop - start,), -0.0) if values is None else values.clone()
        for bit, piece in enumerate(pieces):
            if marks >> bit & 1:
                stretch = taken[piece.start - start : piece.stop - start]
                assert bits(stretch) == bits(torch.full_like(stretch, -0.0))
        leaf = Leaf(taken, marks)
        held = self.job.leaves.setdefault(key, {})
        if task.slot in held:
            assert bits(held[task.slot].values) == bits(taken), "two copies of a slot differ"
            assert held[task.slot].absent == marks
        held[task.slot] = leaf
        if self.job.workers > 1:
            others = range(1, self.job.workers)
            held.update({slot: Leaf(self.job.peer(taken), marks) for slot in others})

    def finish_slot(self, task: Task, metas: dict[int, SlotMeta]) -> None:
        """The slot's loop body is over."""
        for number in self.job.trained():
            for part in range(len(self.job.tables[number].parts)):
                assert task.slot in self.job.leaves[number, part], "a part is missing"
        if task.slot == 0:
            self.job.metas = self.job.metas or metas
            assert self.job.metas == metas, "two copies of slot 0 leave different states"
            for number, (groups, norm_max) in self.job.hypers.items():
                meta = metas[number]
                assert (meta.groups, meta.norm_max) == (groups, norm_max), (
                    "servers were told others"
                )
        self.job.check_lent()
        self.job.finished += range(self.job.workers) if self.job.workers > 1 else [task.slot]
        self._is_in_slot = False

    def record_samples(self, task: Task, samples: Sequence[int]) -> None:
        """Note the samples that enter a version, once per slot."""
        if task.slot not in self.job.finished:
            self.job.samples.setdefault(task.round, []).extend(samples)

    def report(self, samples: int, loss: float | None, logged: list[Said]) -> None:
        """Note what would be shown."""
        self.reports.append((samples, loss))
        self.logged += logged

    def leave(self, outcome: Outcome, text: str) -> None:
        """Note how the script ended."""
        self.left = (outcome, text)

    def _new_versions(self) -> list[Snapshot]:
        new = [n for n in self.job.trained() if self._held[n] != self.job.version]
        self._held.update(dict.fromkeys(new, self.job.version))
        return [self._snapshot(number) for number in new]

    def _snapshot(self, number: int) -> Snapshot:
        table = self.job.tables[number]
        version = self.job.version if table.spec.rule is Rule.OPTIMIZER else 0
        parts = [(start, stop, table.values[start:stop].clone()) for start, stop in table.parts]
        return Snapshot(number, version, table.state, table.norm, parts)


def bits(tensor: Tensor) -> bytes:
    """Every bit of a tensor, so that 0.0 and -0.0 differ and NaN equals itself."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
