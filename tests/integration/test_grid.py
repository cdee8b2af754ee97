"""The same bits for every number of servers and workers: real cores and real tensors, one thread.

Every point of the grid trains a small network with dropout and BatchNorm; parameters, buffers and
optimizer state must equal those of the reference, which is one loop of plain PyTorch.
"""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from tests.support.local_cluster import LocalCluster, LocalWorker, Script
from treefold.common import layout as layouts
from treefold.common import seeds
from treefold.common.layout import Layout
from treefold.common.optim import describe, placement_of
from treefold.common.plan import LoopPlan, PlanKind
from treefold.common.spec import BUFFER_GROUP, Dtype, Rule, TableSpec, TensorSpec
from treefold.common.tree import FoldSet, Merge, Node, root_level, span
from treefold.server import rounds
from treefold.server.shard import ShardState
from treefold.wire.words import Outcome
from treefold.worker import effects

SAMPLES, BATCH, PASSES = 84, 32, 2  # the last round of a pass has 20 samples
FEATURES, HIDDEN, CLASSES = 6, 10, 3
BLOCK, PART_BLOCKS, RUN_PARTS = 32, 1, 3


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """With momentum."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """With every state it can have."""
    return torch.optim.AdamW(parameters, lr=1e-2, amsgrad=True)


def adagrad(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """With a rate that decays by itself."""
    return torch.optim.Adagrad(parameters, lr=5e-2, lr_decay=1e-2)


OPTIMIZERS = {"SGD": sgd, "AdamW": adamw, "Adagrad": adagrad}
State = list[tuple[int, str, object]]
"""``(tensor, key, value)`` of an optimizer's state, in order."""
GRID = [(slots, s, w) for slots in (1, 2, 3, 5, 8) for s in (1, 2, 3) for w in (1, 2, 3, 4)]


class Subject:
    """A network, its data, and its flat space: parameters, then BatchNorm's running statistics."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(
            nn.Linear(FEATURES, HIDDEN),
            nn.BatchNorm1d(HIDDEN),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(HIDDEN, CLASSES),
        )
        self.x = torch.randn(SAMPLES, FEATURES)
        self.y = torch.randint(CLASSES, (SAMPLES,))
        self.parameters = list(self.model.parameters())
        self.buffers = [b for b in self.model.buffers() if b.is_floating_point()]
        self.optimizer = OPTIMIZERS[name](self.parameters)
        described = describe(self.optimizer)
        tensors = [(t, 0) for t in self.parameters] + [(t, BUFFER_GROUP) for t in self.buffers]
        specs = [
            TensorSpec(f"t{n}", list(t.shape), Dtype.FLOAT32, group)
            for n, (t, group) in enumerate(tensors)
        ]
        placement = placement_of(name, described.groups)
        self.spec = TableSpec("net", Rule.OPTIMIZER, placement, specs, described)
        self.layout = Layout(self.spec)

    def flat(self) -> Tensor:
        """Values in the flat space."""
        return torch.cat([t.detach().reshape(-1) for t in (*self.parameters, *self.buffers)])

    def load(self, flat: Tensor) -> None:
        """Take values from the flat space."""
        with torch.no_grad():
            for number, tensor in enumerate((*self.parameters, *self.buffers)):
                start = self.layout.starts[number]
                tensor.copy_(flat[start : start + tensor.numel()].view(tensor.shape))

    def contribution(self, plan: LoopPlan, round_: int, slot: int) -> Tensor:
        """What a slot adds to the fold: scaled gradients, scaled new buffers."""
        low, high = plan.slot_range(round_, slot)
        torch.manual_seed(seeds.derive(plan.seed, seeds.COMPUTE, round_, slot))
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(self.model(self.x[low:high]), self.y[low:high])
        loss.backward()  # type: ignore[no-untyped-call] # torch's own has no types
        share = (high - low) / plan.round_samples(round_)
        found = [p.grad for p in self.parameters if p.grad is not None]
        return torch.cat([t.reshape(-1) for t in (*found, *self.buffers)]) * share


def plans(slots: int) -> Iterator[LoopPlan]:
    """The passes over the data."""
    rounds = -(-SAMPLES // BATCH)
    for index in range(PASSES):
        yield LoopPlan(
            PlanKind.SLOTS, index, index * rounds, rounds, slots, SAMPLES, BATCH, index, False, 0
        )


def reference(name: str, slots: int) -> str:
    """One loop of plain PyTorch: contributions of a round added along the tree, then one step."""
    job = Subject(name)
    for plan in plans(slots):
        for round_ in range(plan.first_round, plan.end_round):
            start = job.flat()
            leaves = []
            for slot in range(plan.active_slots(round_)):
                job.load(start)
                leaves.append(job.contribution(plan, round_, slot))
            total = tree_sum(leaves)
            job.load(
                torch.cat([start[: -sum(b.numel() for b in job.buffers)], buffers_of(job, total)])
            )
            for number, parameter in enumerate(job.parameters):
                at = job.layout.starts[number]
                parameter.grad = total[at : at + parameter.numel()].view(parameter.shape)
            job.optimizer.step()
    return digest(job.flat(), state_of(job))


def state_of(job: Subject) -> State:
    """The optimizer's state, tensor by tensor."""
    return [
        (number, key, value)
        for number, parameter in enumerate(job.parameters)
        for key, value in sorted(job.optimizer.state[parameter].items())
    ]


def tree_sum(leaves: Sequence[Tensor]) -> Tensor:
    """``left + right`` over halves of the next power of two, as the fold tree has them."""
    if len(leaves) == 1:
        return leaves[0]
    half = 1 << (len(leaves) - 1).bit_length() - 1
    return tree_sum(leaves[:half]) + tree_sum(leaves[half:])


def buffers_of(job: Subject, flat: Tensor) -> Tensor:
    """The end of the flat space."""
    return flat[job.layout.starts[len(job.parameters)] :]


def digest(flat: Tensor, state: State) -> str:
    """One hash over values and optimizer state."""
    found = hashlib.sha256(flat.numpy().tobytes())
    for number, key, value in state:
        found.update(f"{number}.{key}".encode())
        if isinstance(value, Tensor) and value.dim() == 0:
            found.update(struct.pack("<d", value.item()))
        elif isinstance(value, Tensor):
            found.update(value.detach().contiguous().numpy().tobytes())
        else:
            found.update(struct.pack("<d", value))
    return found.hexdigest()


def on_cluster(name: str, slots: int, servers: int, workers: int) -> str:
    """The same job on a cluster of cores, messages in an order of its own."""
    return digest(*trained(name, slots, servers, workers))


def trained(name: str, slots: int, servers: int, workers: int) -> tuple[Tensor, State]:
    """Values and optimizer state that a cluster ends with."""
    cluster = LocalCluster(servers, workers, seed=1000 * slots + 10 * servers + workers)
    cluster.run(lambda worker: script(worker, Subject(name), slots))
    job = Subject(name)
    flat = torch.empty(job.layout.elements)
    states = sorted(
        (state for server in cluster.servers for state in server.states.values()),
        key=lambda state: state.parts[0][0],
    )
    for state in states:
        values = torch.empty(state.parts[-1][1] - state.parts[0][0])
        state.copy_to(values)
        flat[state.parts[0][0] : state.parts[-1][1]] = values
    assert all(not worker.store.tensors for worker in cluster.workers)
    return flat, joined(job, states)


def joined(job: Subject, states: Sequence[ShardState]) -> State:
    """Optimizer state tensor by tensor, put together again from the shards."""
    whole: dict[tuple[int, str], object] = {}
    for piece in (piece for state in states for piece in state.state_pieces()):
        shape = job.parameters[piece.tensor].shape
        for key, value in piece.state.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                whole[piece.tensor, key] = value
                continue
            full = whole.setdefault((piece.tensor, key), torch.full([shape.numel()], torch.nan))
            assert isinstance(full, Tensor)
            full[piece.offset : piece.offset + piece.elements] = value.reshape(-1)
    return [
        (number, key, value) for (number, key), value in sorted(whole.items(), key=lambda kv: kv[0])
    ]


def script(worker: LocalWorker, job: Subject, slots: int) -> Script:
    """What every worker runs."""
    worker.initial = job.flat()
    first = yield effects.DeclareCalled(worker.next_call(), job.spec)
    assert isinstance(first, effects.Snapshot)
    flat = torch.empty(job.layout.elements)
    worker.take(first, flat)
    for plan in plans(slots):
        yield effects.LoopCalled(worker.next_call(), plan)
        while True:
            task = yield effects.TaskCalled(worker.next_call())
            assert isinstance(task, effects.Task | effects.LoopEnd)
            for snapshot in task.snapshots:
                worker.take(snapshot, flat)
            if isinstance(task, effects.LoopEnd):
                break
            if task.slot >= 0:
                job.load(flat)
                yield from contribute(worker, job, plan, task)
    yield effects.LeaveCalled(worker.next_call(), Outcome.DONE, "")


def contribute(worker: LocalWorker, job: Subject, plan: LoopPlan, task: effects.Task) -> Script:
    """One slot: its parts, then its end."""
    values = job.contribution(plan, task.round, task.slot)
    groups = describe(job.optimizer).groups
    is_early = (task.round + len(worker.name)) % 2 == 0  # hyper-parameters ahead, or at the end
    if is_early:
        yield effects.HyperKnown(0, task.round, task.slot, groups, 0.0)
    parts = worker.core.tables[0].parts
    for first in range(0, len(parts), RUN_PARTS):
        run = parts[first : first + RUN_PARTS]
        payloads = tuple(worker.store.add(values[p.start : p.stop].clone()) for p in run)
        yield effects.Contributed(0, first, len(run), task.round, task.slot, payloads, [])
    yield effects.SlotFinished(task.round, task.slot, {0: effects.SlotMeta(groups, 0.0, b"")})


@pytest.fixture(autouse=True)
def _small_blocks() -> Iterator[None]:
    with (
        mock.patch.object(layouts, "BLOCK_ELEMENTS", BLOCK),
        mock.patch.object(layouts, "PART_BLOCKS_MAX", PART_BLOCKS),
    ):
        yield


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_cluster_ends_with_the_bits_of_the_one_process_reference(name: str) -> None:
    wanted = {slots: reference(name, slots) for slots in (1, 2, 3, 5, 8)}
    found = {point: on_cluster(name, *point) for point in GRID}
    assert found == {point: wanted[point[0]] for point in GRID}
    assert len(set(wanted.values())) == len(wanted), "V is part of the job: its bits must differ"


def plain_loop(name: str, parts: int) -> tuple[Tensor, State]:
    """PyTorch as everybody writes it: ``parts`` backwards of ``loss / parts``, then a step."""
    job = Subject(name)
    for plan in plans(parts):
        for round_ in range(plan.first_round, plan.end_round):
            job.optimizer.zero_grad()
            for part in range(parts):
                low, high = plan.slot_range(round_, part)
                torch.manual_seed(seeds.derive(plan.seed, seeds.COMPUTE, round_, part))
                loss = nn.functional.cross_entropy(job.model(job.x[low:high]), job.y[low:high])
                (loss / parts).backward()  # type: ignore[no-untyped-call] # torch has no types
            job.optimizer.step()
    return job.flat(), state_of(job)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_slot_is_the_plain_loop_and_two_are_accumulated_halves(name: str) -> None:
    count = sum(parameter.numel() for parameter in Subject(name).parameters)
    assert digest(*trained(name, 1, 2, 2)) == digest(*plain_loop(name, 1))
    halves, accumulated = trained(name, 2, 2, 2), plain_loop(name, 2)
    # A plain loop runs its second half on the running statistics of the first: parameters only.
    assert digest(halves[0][:count], halves[1]) == digest(accumulated[0][:count], accumulated[1])
    assert digest(*plain_loop(name, 1)) != digest(*accumulated)


class ArrivalFold(FoldSet[object]):
    """Adds whatever comes to what is there already, whichever slots it stands for."""

    def __init__(self, active: int) -> None:
        super().__init__(active)
        self.slots: dict[int, None] = {}

    def add(self, node: Node, handle: object) -> tuple[list[Merge[object]], list[object]] | None:
        low, high = span(node, self.active)
        if any(slot in self.slots for slot in range(low, high)):
            return None
        self.slots |= dict.fromkeys(range(low, high))
        merges = [Merge(held, handle, node) for held in self.nodes.values()]
        kept = merges[0].left if merges else handle
        level = root_level(self.active) if len(self.slots) == self.active else 0
        self.nodes = {Node(level, 0): kept}
        return merges, []


def test_a_fold_in_arrival_order_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "FoldSet", ArrivalFold)
    found = {on_cluster("AdamW", 8, 2, workers) for workers in (2, 3, 4)}
    assert found != {reference("AdamW", 8)}
