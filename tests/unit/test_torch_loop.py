"""`ps.batches`: who gets which samples, in which order, under which seed."""

import random
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import treefold.torch as ps
from tests.support.reference import ReferenceJob
from tests.support.sessions import (
    BATCH,
    SAMPLES,
    backward,
    bare,
    dataset,
    joined,
    loss_of,
    parameters_of,
    rounds_of,
    sgd,
)
from treefold.common.errors import ConfigError, LocalProtocolError, UnsupportedError
from treefold.common.plan import LoopPlan, PlanKind
from treefold.torch import samples
from treefold.torch.loop import Batches


class Numbers(Dataset[Tensor]):
    """Sample ``n`` is ``n`` and three random numbers, one of each generator."""

    def __init__(self, count: int = SAMPLES) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        drawn = [torch.rand(()).item(), float(np.random.rand()), random.random()]
        return torch.tensor([float(index), *drawn], dtype=torch.float64)


def _visit(job: ReferenceJob, make: Callable[[], Batches]) -> list[Tensor]:
    """All batches of one loop whose body does nothing."""
    with joined(job):
        model = bare()
        ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        return list(make())


def _ids(batches: list[Tensor]) -> list[int]:
    return [int(value) for batch in batches for value in batch[:, 0]]


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8, 16])
def test_every_sample_of_an_epoch_is_used_once(slots: int) -> None:
    job = ReferenceJob(slots)
    visited = _visit(job, lambda: ps.batches(Numbers(), BATCH))
    assert sorted(_ids(visited)) == list(range(SAMPLES))
    assert sorted(number for ids in job.samples.values() for number in ids) == list(range(SAMPLES))
    assert [len(job.samples[number]) for number in range(rounds_of())] == [8, 8, 8, 6]


def test_a_rounds_samples_do_not_depend_on_the_number_of_slots() -> None:
    few, many = ReferenceJob(slots=2), ReferenceJob(slots=5)
    _visit(few, lambda: ps.batches(Numbers(), BATCH))
    _visit(many, lambda: ps.batches(Numbers(), BATCH))
    assert few.samples == many.samples


def test_epoch_and_seed_change_the_order_and_shuffle_can_be_switched_off() -> None:
    def order(**options: int) -> list[int]:
        epoch, seed = options.get("epoch", 0), options.get("seed")
        return _ids(_visit(ReferenceJob(), lambda: ps.batches(Numbers(), BATCH, epoch, seed=seed)))

    plain = _ids(_visit(ReferenceJob(), lambda: ps.batches(Numbers(), BATCH, shuffle=False)))
    assert plain == list(range(SAMPLES))
    assert order() == order(seed=0)
    assert len({tuple(order()), tuple(order(epoch=1)), tuple(order(seed=1)), tuple(plain)}) == 4


def test_the_jobs_seed_is_the_samplers_by_default() -> None:
    def order(seed: int) -> list[int]:
        with joined(ReferenceJob(), seed):
            model = bare()
            ps.DistributedOptimizer(sgd(parameters_of(model)), model)
            return _ids(list(ps.batches(Numbers(), BATCH)))

    assert order(0) != order(5)


def test_drop_last_leaves_out_the_short_round() -> None:
    visited = _visit(ReferenceJob(slots=2), lambda: ps.batches(Numbers(), BATCH, drop_last=True))
    assert [len(batch) for batch in visited] == [4] * 6


def test_max_rounds_ends_the_loop_early_and_the_next_loop_goes_on() -> None:
    job = ReferenceJob(slots=2)
    with joined(job):
        model = bare()
        ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        assert len(list(ps.batches(Numbers(), BATCH, max_rounds=2))) == 4
        assert ps.round() == 2
        list(ps.batches(Numbers(), BATCH, 1, max_rounds=100))
        assert ps.round() == 2 + rounds_of()
    assert [plan.first_round for plan in job.plans] == [0, 2]


def test_a_batch_larger_than_the_data_is_one_short_round() -> None:
    visited = _visit(ReferenceJob(slots=4), lambda: ps.batches(Numbers(6), 100))
    assert [len(batch) for batch in visited] == [2, 2, 1, 1]


def test_slots_without_samples_are_left_out() -> None:
    job = ReferenceJob(slots=8)
    visited = _visit(job, lambda: ps.batches(Numbers(3), 100))
    assert [len(batch) for batch in visited] == [1, 1, 1]


def test_a_collate_function_makes_the_batch() -> None:
    def collate(items: list[object]) -> object:
        return len(items)

    with joined(ReferenceJob(slots=2)):
        model = bare()
        ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        assert list(ps.batches(Numbers(), BATCH, collate_fn=collate)) == [4] * 6 + [3, 3]


def test_a_data_set_that_reads_several_samples_at_once_may_do_so() -> None:
    class Several(Numbers):
        def __getitems__(self, indices: list[int]) -> list[Tensor]:
            return [torch.tensor([index, len(indices)]) for index in indices]

    visited = _visit(ReferenceJob(slots=2), lambda: ps.batches(Several(), BATCH))
    assert sorted(_ids(visited)) == list(range(SAMPLES))
    assert visited[0][0, 1] == 4


@pytest.mark.parametrize("processes", [1, 2])
def test_loader_processes_read_the_same_samples_with_the_same_randomness(processes: int) -> None:
    here, there = ReferenceJob(slots=3), ReferenceJob(slots=3)
    plain = _visit(here, lambda: ps.batches(Numbers(), BATCH))
    ahead = _visit(there, lambda: ps.batches(Numbers(), BATCH, num_workers=processes))
    assert len(plain) == len(ahead)
    assert all(torch.equal(left, right) for left, right in zip(plain, ahead, strict=True))


def test_without_a_seed_per_slot_loader_processes_would_read_differently() -> None:
    with mock.patch.object(samples, "seed_for_data"):
        plain = _visit(ReferenceJob(slots=3), lambda: ps.batches(Numbers(), BATCH))
        ahead = _visit(ReferenceJob(slots=3), lambda: ps.batches(Numbers(), BATCH, num_workers=1))
    assert _ids(plain) == _ids(ahead)
    assert not all(torch.equal(left, right) for left, right in zip(plain, ahead, strict=True))


def _sources(
    slots: int, processes: int, wanted: list[tuple[int, int]], rounds: int = 4, again: int = -1
) -> samples.Source:
    """Read these slots of a pass, whatever was foreseen, and return what read them.

    After each of them slot ``again`` of round 0 is read once more, if there is one.
    """
    count = rounds * BATCH - (4 * BATCH - SAMPLES)
    plan = LoopPlan(PlanKind.SLOTS, 0, 0, rounds, slots, count, BATCH, 0, False, 0)
    order = samples.Order(plan, None)
    reader = samples.SlotReader(Numbers(), None, 0)
    source = samples.Source(reader, order, processes, [0, 1])
    for round_, slot in wanted:
        batch = source.take(order.read(round_, slot))
        assert isinstance(batch, Tensor)
        assert batch[:, 0].tolist() == order.read(round_, slot).samples
        if again >= 0:
            late = source.take(order.read(0, again), is_again=True)
            assert isinstance(late, Tensor)
            assert late[:, 0].tolist() == order.read(0, again).samples
    source.close()
    return source


def test_what_was_foreseen_is_read_ahead() -> None:
    wanted = [(round_, slot) for round_ in range(4) for slot in (0, 1)]
    assert _sources(4, 1, wanted).reads_ahead == len(wanted) - 1


def test_slots_that_move_to_and_from_this_worker_are_read_on_the_spot_or_dropped() -> None:
    wanted = [(0, 0), (0, 3), (1, 0), (1, 3), (2, 2), (3, 2), (3, 1)]
    assert 0 < _sources(4, 1, wanted).reads_ahead < len(wanted)


def test_a_worker_that_skips_rounds_reads_on_where_it_is_needed() -> None:
    wanted = [(0, 0), *((round_, 1) for round_ in range(9, 20))]
    for processes in (1, 2):
        assert _sources(4, processes, wanted, rounds=20).reads_ahead > 6


def test_batches_that_are_computed_again_say_nothing_of_those_to_come() -> None:
    wanted = [(round_, slot) for round_ in range(4) for slot in (0, 1)]
    assert _sources(4, 1, wanted, again=1).reads_ahead == len(wanted) - 1


def test_an_error_in_a_loader_process_reaches_the_script() -> None:
    class Broken(Numbers):
        def __getitem__(self, index: int) -> Tensor:
            raise KeyError("no such file")

    with pytest.raises(KeyError, match="no such file"):
        _visit(ReferenceJob(slots=2), lambda: ps.batches(Broken(), BATCH, num_workers=1))


def test_the_randomness_of_the_body_does_not_depend_on_where_samples_are_read() -> None:
    def draw(processes: int) -> list[float]:
        with joined(ReferenceJob(slots=2)):
            model = bare()
            ps.DistributedOptimizer(sgd(parameters_of(model)), model)
            loop = ps.batches(Numbers(), BATCH, num_workers=processes)
            return [torch.rand(()).item() + random.random() + np.random.rand() for _ in loop]

    assert draw(0) == draw(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ps.batches(Numbers(), 0), "batch_size is 0"),
        (lambda: ps.batches(Numbers(), 2.5), r"batch_size is 2\.5"),  # type: ignore[arg-type] # wrong
        (lambda: ps.batches(Numbers(0), 4), "data set is empty"),
        (lambda: ps.batches(Numbers(3), 4, drop_last=True), "drop_last leaves nothing"),
        (lambda: ps.batches(Numbers(), 4, max_rounds=0), "max_rounds is 0"),
        (lambda: ps.batches(Numbers(), 4, num_workers=-1), "num_workers is -1"),
        (lambda: ps.batches(Numbers(), 4, workers=1), "no argument 'workers'"),  # type: ignore[call-arg] # wrong
    ],
)
def test_a_wrong_argument_is_refused(make: Callable[[], Batches], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _visit(ReferenceJob(), make)


class _Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield torch.zeros(1)


@pytest.mark.parametrize("data", [_Stream(), iter([1, 2])], ids=["IterableDataset", "iterator"])
def test_data_without_numbered_samples_is_refused_with_advice(data: Dataset[Tensor]) -> None:
    with pytest.raises(UnsupportedError, match="DataLoader of your own"):
        _visit(ReferenceJob(), lambda: ps.batches(data, 4))  # type: ignore[arg-type] # wrong


def test_a_loop_left_by_break_is_noticed_by_the_next_one() -> None:
    with joined(ReferenceJob()):
        model = bare()
        ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        for _ in ps.batches(Numbers(), BATCH):
            break
        with pytest.raises(LocalProtocolError, match=r"max_rounds= instead of using break"):
            ps.batches(Numbers(), BATCH, 1)


def test_a_loop_within_a_loop_is_refused() -> None:
    with joined(ReferenceJob()):
        model = bare()
        ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        next(ps.batches(Numbers(), BATCH))
        with pytest.raises(LocalProtocolError, match="not inside of another one"):
            ps.batches(Numbers(), BATCH)


def test_a_loop_is_iterated_once() -> None:
    with joined(ReferenceJob()):
        model = bare()
        ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        loop = ps.batches(Numbers(), BATCH)
        list(loop)
        with pytest.raises(LocalProtocolError, match="make a new one for every epoch"):
            iter(loop)
        assert next(loop, None) is None


def test_a_loop_is_iterated_where_it_is_made() -> None:
    with joined(ReferenceJob()):
        model = bare()
        ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        early, late = ps.batches(Numbers(), BATCH), ps.batches(Numbers(), BATCH, 1)
        list(early)
        with pytest.raises(LocalProtocolError, match="iterate it where it is made"):
            next(late)


def test_a_loop_needs_an_optimizer() -> None:
    with joined(ReferenceJob()), pytest.raises(LocalProtocolError, match="DistributedOptimizer"):
        ps.batches(Numbers(), BATCH)


def test_what_a_script_says_is_told_with_its_round_and_between_loops_at_once() -> None:
    with joined(ReferenceJob(slots=2)) as client:
        model = bare()
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        for number, batch in enumerate(ps.batches(dataset(), BATCH)):
            assert len(client.logged) == number  # with the slot that is over
            optimizer.zero_grad()
            backward(loss_of(model, batch))
            ps.log("number", -1)  # the newest one counts
            ps.log("number", torch.tensor(number))
            optimizer.step()
        slots = len(client.logged)
        assert client.logged == [("number", number // 2, number) for number in range(slots)]
        ps.log("after", 0.5)
        assert client.logged[slots:] == [("after", ps.round(), 0.5)]
    with pytest.raises(LocalProtocolError, match=r"ps\.init"):
        ps.log("later", 1.0)


def test_samples_and_the_last_loss_are_reported() -> None:
    with joined(ReferenceJob(slots=2)) as client:
        model = bare()
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        losses = []
        for batch in ps.batches(dataset(), BATCH):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            losses.append(loss.item())
            backward(loss)
            optimizer.step()
    assert [count for count, _ in client.reports] == [4, 8, 12, 16, 20, 24, 27, 30]
    assert client.reports[0][1] == losses[0]
    assert client.reports[-1][1] in losses


def test_torchs_backward_is_as_it_was_after_shutdown() -> None:
    original = torch.Tensor.backward
    with joined(ReferenceJob()):
        assert torch.Tensor.backward is not original
    assert torch.Tensor.backward is original


def test_tensors_of_a_tensor_data_set_come_as_lists_like_torchs() -> None:
    data = TensorDataset(torch.arange(6.0).view(3, 2), torch.arange(3))
    with joined(ReferenceJob()):
        model = nn.Linear(2, 1)
        ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        (batch,) = list(ps.batches(data, 3, shuffle=False))
    assert torch.equal(batch[0], data.tensors[0])
    assert torch.equal(batch[1], data.tensors[1])
