"""Learning-rate schedulers: one step per round, whoever computes which slots of it."""

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import msgspec
import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.optim.lr_scheduler import LRScheduler

import treefold.torch as ps
from tests.support.reference import ReferenceJob
from tests.support.sessions import (
    BATCH,
    backward,
    dataset,
    joined,
    loss_of,
    network,
    parameters_of,
    plain_batches,
    rounds_of,
    seeded,
    sgd,
    state_bits,
)
from treefold.common.errors import SpecMismatchError, UnsupportedError
from treefold.common.round_state import RoundState
from treefold.torch.schedules import Schedules
from treefold.worker.handed import LoopEnd, Task

MakeScheduler = Callable[[Optimizer], LRScheduler]
EPOCHS = 2

PER_ROUND: dict[str, MakeScheduler] = {
    "StepLR": lambda o: schedulers.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 2, 7], 0.5),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 4, 2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.5, total_steps=EPOCHS * rounds_of() + 1),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.2, step_size_up=3),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.9**step),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, 1.0, 3), schedulers.CosineAnnealingLR(o, 8)], [3]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 4), schedulers.ExponentialLR(o, 0.9)]
    ),
}


def _run(optimizer: Optimizer, scheduler: LRScheduler, model: nn.Module, plain: bool) -> None:
    """A script that steps its scheduler once per round."""
    for epoch in range(EPOCHS):
        first = epoch * rounds_of()
        for batch in plain_batches(epoch, first) if plain else ps.batches(dataset(), BATCH, epoch):
            optimizer.zero_grad()
            backward(loss_of(model, batch))
            optimizer.step()
            scheduler.step()


def _train(job: ReferenceJob, make: MakeScheduler, is_inner: bool = False) -> dict[str, bytes]:
    with joined(job):
        model = network()
        inner = sgd(parameters_of(model))
        scheduler = make(inner) if is_inner else None
        optimizer = ps.DistributedOptimizer(inner, model)
        _run(optimizer, scheduler or make(optimizer), model, plain=False)
        return state_bits(model)


def _train_plainly(make: MakeScheduler) -> tuple[dict[str, bytes], list[float]]:
    model = seeded(network)
    optimizer = sgd(parameters_of(model))
    rates: list[float] = []
    optimizer.register_step_pre_hook(lambda own, *_: rates.append(own.param_groups[0]["lr"]))
    _run(optimizer, make(optimizer), model, plain=True)
    return state_bits(model), rates


def _rates(job: ReferenceJob) -> list[object]:
    """The learning rate of every round."""
    return [metas[0].groups[0]["lr"] for metas in job.history]


@pytest.mark.parametrize("name", PER_ROUND)
def test_a_scheduler_stepped_per_round_trains_as_in_the_plain_loop(name: str) -> None:
    job = ReferenceJob(slots=1)
    trained = _train(job, PER_ROUND[name])
    plain, rates = _train_plainly(PER_ROUND[name])
    assert _rates(job) == rates
    assert trained == plain
    assert len(set(rates)) > 1, "the schedule must move"


@pytest.mark.parametrize("name", PER_ROUND)
def test_a_scheduler_steps_once_per_round_however_many_slots_it_has(name: str) -> None:
    job = ReferenceJob(slots=3, order=lambda active: [*range(active)][::-1])
    _train(job, PER_ROUND[name])
    assert _rates(job) == _train_plainly(PER_ROUND[name])[1]


def test_without_restoring_a_scheduler_steps_once_per_slot() -> None:
    job = ReferenceJob(slots=3)
    with mock.patch.object(Schedules, "restore"):
        _train(job, PER_ROUND["CosineAnnealingLR"])
    assert _rates(job) != _train_plainly(PER_ROUND["CosineAnnealingLR"])[1]


def test_a_scheduler_may_be_attached_to_the_users_own_optimizer() -> None:
    job = ReferenceJob(slots=2)
    trained = _train(job, PER_ROUND["OneCycleLR"], is_inner=True)
    assert trained == _train(ReferenceJob(slots=2), PER_ROUND["OneCycleLR"])
    assert _rates(job) == _train_plainly(PER_ROUND["OneCycleLR"])[1]


def test_a_scheduler_attached_after_wrapping_to_the_users_own_optimizer_is_found_too() -> None:
    job = ReferenceJob(slots=2)
    with joined(job):
        model = network()
        inner = sgd(parameters_of(model))
        optimizer = ps.DistributedOptimizer(inner, model)
        _run(optimizer, PER_ROUND["StepLR"](inner), model, plain=False)
    assert _rates(job) == _train_plainly(PER_ROUND["StepLR"])[1]


def test_momentum_that_a_scheduler_cycles_travels_with_the_round() -> None:
    job = ReferenceJob(slots=2)
    _train(job, PER_ROUND["OneCycleLR"])
    assert len({metas[0].groups[0]["momentum"] for metas in job.history}) > 3


@pytest.mark.parametrize("slots", [1, 3])
def test_schedulers_stepped_between_epochs_count_epochs(slots: int) -> None:
    def run(optimizer: Optimizer, model: nn.Module, plain: bool) -> list[float]:
        by_epoch = schedulers.StepLR(optimizer, 1, 0.5)
        plateau = schedulers.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
        rates = []
        for epoch in range(EPOCHS):
            rates += [float(optimizer.param_groups[0]["lr"])] * rounds_of()
            first = epoch * rounds_of()
            loop = plain_batches(epoch, first) if plain else ps.batches(dataset(), BATCH, epoch)
            for batch in loop:
                optimizer.zero_grad()
                backward(loss_of(model, batch))
                optimizer.step()
            by_epoch.step()
            plateau.step(1.0)
        return rates

    job = ReferenceJob(slots)
    with joined(job):
        model = network()
        run(ps.DistributedOptimizer(sgd(parameters_of(model)), model), model, plain=False)
        trained = state_bits(model)
    plain = seeded(network)
    rates = run(sgd(parameters_of(plain)), plain, plain=True)
    assert _rates(job) == rates
    assert len(set(rates)) == EPOCHS
    if slots == 1:
        assert trained == state_bits(plain)


@pytest.mark.parametrize("slots_done", [5, 8])
def test_a_worker_that_joins_goes_on_with_the_right_learning_rate(slots_done: int) -> None:
    job = ReferenceJob(slots=2)
    with joined(job):
        model = network()
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        scheduler = PER_ROUND["OneCycleLR"](optimizer)
        for number, batch in enumerate(ps.batches(dataset(), BATCH, 0)):
            if number == slots_done:
                break
            optimizer.zero_grad()
            backward(loss_of(model, batch))
            optimizer.step()
            scheduler.step()
    trained = _train(job, PER_ROUND["OneCycleLR"])
    assert _rates(job) == _train_plainly(PER_ROUND["OneCycleLR"])[1]
    assert trained == _train(ReferenceJob(slots=2), PER_ROUND["OneCycleLR"])


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("front", [1, 2])
def test_who_leaves_an_asynchronous_pass_behind_others_steps_its_scheduler_once(front: int) -> None:
    with joined(ReferenceJob(slots=2)) as client:
        model = network()
        inner = sgd(parameters_of(model))
        optimizer = ps.DistributedOptimizer(inner, model, consistency="async")
        scheduler, base = schedulers.ExponentialLR(optimizer, 0.5), inner.param_groups[0]["lr"]
        schedule = Schedules(inner, optimizer)
        schedule.scan()
        beginning = schedule.capture()
        if front == 2:  # somebody has begun the next pass, after a step of its own
            scheduler.step()
        state = msgspec.msgpack.encode(RoundState(schedule.capture(), [], {}))
        schedule.restore(beginning)
        version = replace(client._snapshot(optimizer.table.number), state=state, front=front)
        answers = [LoopEnd(2, [version]), Task(2, 1, [])]
        with mock.patch.object(client, "next_task", side_effect=answers):
            for _ in ps.batches(dataset(4), 2, 0):
                pytest.fail("the pass is over")
            scheduler.step()
            next(iter(ps.batches(dataset(4), 2, 1)))
        assert inner.param_groups[0]["lr"] == base * 0.5


def test_a_worker_that_joins_with_an_own_loader_takes_over_the_learning_rate() -> None:
    job = ReferenceJob()
    for _ in range(2):
        with joined(job):
            model = network()
            optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
            scheduler = schedulers.ExponentialLR(optimizer, 0.5)
            for batch in plain_batches(0):
                optimizer.zero_grad()
                backward(loss_of(model, batch))
                optimizer.step()
                scheduler.step()
    assert _rates(job)[:4] == [0.1, 0.05, 0.025, 0.0125]
    assert _rates(job)[4] == 0.0125, "what the last round was made with"


def test_a_learning_rate_set_by_hand_in_the_body_counts_once_per_round() -> None:
    job = ReferenceJob(slots=3)
    with joined(job):
        model = network()
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        for batch in ps.batches(dataset(), BATCH):
            optimizer.zero_grad()
            backward(loss_of(model, batch))
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.5
        assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5 ** rounds_of()
    assert _rates(job) == [0.1 * 0.5**number for number in range(rounds_of())]


def test_a_learning_rate_in_a_tensor_stays_the_same_tensor() -> None:
    job = ReferenceJob(slots=3)
    with joined(job):
        model = network()
        rate = torch.tensor(0.125)
        inner = torch.optim.AdamW(parameters_of(model), lr=rate)
        optimizer = ps.DistributedOptimizer(inner, model)
        scheduler = schedulers.ExponentialLR(optimizer, 0.5)
        _run(optimizer, scheduler, model, plain=False)
        assert optimizer.param_groups[0]["lr"] is rate
        assert isinstance(scheduler.get_last_lr()[0], torch.Tensor)
    assert _rates(job)[:3] == [0.125, 0.0625, 0.03125]


def test_state_comes_back_in_the_types_that_the_scheduler_uses() -> None:
    optimizer = sgd([nn.Parameter(torch.zeros(2))])
    scheduler = schedulers.MultiStepLR(optimizer, [1, 1, 4])
    optimizer.param_groups[0]["betas"] = (0.1, 0.2)
    schedules = Schedules(optimizer)
    schedules.scan()
    before = scheduler.state_dict()
    before = {key: type(before[key])(value) for key, value in before.items()}
    captured = schedules.capture()
    optimizer.step()
    scheduler.step()
    optimizer.param_groups[0]["betas"] = (0.3, 0.4)
    schedules.restore(captured)
    after = scheduler.state_dict()
    assert after == before
    assert {key: type(value) for key, value in after.items()} == {
        key: type(value) for key, value in before.items()
    }
    assert optimizer.param_groups[0]["betas"] == (0.1, 0.2)


def test_a_scheduler_that_the_script_dropped_does_not_count() -> None:
    optimizer = sgd([nn.Parameter(torch.zeros(2))])
    kept = schedulers.StepLR(optimizer, 2)
    schedulers.ExponentialLR(optimizer, 0.5)
    schedules = Schedules(optimizer)
    schedules.scan()
    names = [name for name, _ in schedules.capture().schedulers]
    assert names == ["torch.optim.lr_scheduler.StepLR"]
    assert kept.last_epoch == 0


def test_a_schedule_of_other_schedulers_is_refused() -> None:
    optimizer = sgd([nn.Parameter(torch.zeros(2))])
    schedules = Schedules(optimizer)
    captured = schedules.capture()
    kept = schedulers.StepLR(optimizer, 2)
    schedules.scan()
    with pytest.raises(SpecMismatchError, match="StepLR"):
        schedules.restore(captured)
    assert kept.last_epoch == 0


def test_a_state_that_cannot_travel_is_refused_by_name() -> None:
    class Odd(schedulers.StepLR):
        def __init__(self, optimizer: Optimizer) -> None:
            super().__init__(optimizer, 2)
            self.odd = {"inside": slice(3)}

    job = ReferenceJob()
    with joined(job):
        model = network()
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        kept = Odd(optimizer)
        with pytest.raises(UnsupportedError, match=r"Odd\.odd\['inside'\] is a slice"):
            next(ps.batches(dataset(), BATCH))
        assert kept.last_epoch == 0
