"""Gradients as views of flat buffers, and parts that are sent while backward is still running."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import treefold.torch as ps
from tests.support.reference import ReferenceJob, bits
from tests.support.sessions import (
    BATCH,
    adamw,
    backward,
    bare,
    dataset,
    joined,
    loss_of,
    network,
    parameters_of,
    sgd,
    state_bits,
    train,
    train_plainly,
)
from treefold.common.errors import LocalProtocolError, UnsupportedError
from treefold.torch import gradients
from treefold.torch.optimizer import DistributedOptimizer
from treefold.torch.pushing import Overlap

Script = tuple[ReferenceJob, nn.Module, DistributedOptimizer]


@pytest.fixture
def script() -> Iterator[Script]:
    """A job of two slots whose model has several parts."""
    job = ReferenceJob(slots=2, part_elements=20)
    with joined(job):
        model = bare()
        yield job, model, DistributedOptimizer(sgd(parameters_of(model)), model)


def _sent(job: ReferenceJob) -> int:
    """How many parts of the slot in work are with the client."""
    slot = job.seen[-1][1]
    return sum(slot in held for held in job.leaves.values())


def test_from_the_second_slot_on_parts_are_sent_during_backward(script: Script) -> None:
    job, model, optimizer = script
    sent = []
    for batch in ps.batches(dataset(), BATCH):
        optimizer.zero_grad()
        backward(loss_of(model, batch))
        sent.append(_sent(job))
        optimizer.step()
    assert sent[0] == 0
    assert set(sent[1:]) == {len(job.tables[0].parts)}


def test_without_overlap_nothing_is_sent_before_the_step() -> None:
    job = ReferenceJob(slots=2, part_elements=20)
    with joined(job):
        model = bare()
        optimizer = DistributedOptimizer(sgd(parameters_of(model)), model, overlap=False)
        for batch in ps.batches(dataset(), BATCH):
            optimizer.zero_grad()
            backward(loss_of(model, batch))
            assert _sent(job) == 0
            optimizer.step()


def test_overlap_changes_no_bit() -> None:
    job = ReferenceJob(slots=3, part_elements=20)
    with joined(job):
        model = network()
        optimizer = DistributedOptimizer(adamw(parameters_of(model)), model, overlap=False)
        for epoch in range(2):
            for batch in ps.batches(dataset(), BATCH, epoch):
                optimizer.zero_grad()
                backward(loss_of(model, batch))
                optimizer.step()
        plain = state_bits(model)
    assert train(ReferenceJob(slots=3, part_elements=20), adamw) == plain


def test_gradients_stay_views_of_one_buffer(script: Script) -> None:
    _, model, optimizer = script
    flat = optimizer.table.pushing.gradients.flat
    assert flat is not None
    for batch in ps.batches(dataset(), BATCH):
        optimizer.zero_grad()
        backward(loss_of(model, batch))
        for parameter in model.parameters():
            assert parameter.grad is not None
            storage = parameter.grad.untyped_storage()
            assert storage.data_ptr() == flat.untyped_storage().data_ptr()
        optimizer.step()


def test_a_script_that_clips_with_torch_is_not_overlapped(script: Script) -> None:
    job, model, optimizer = script
    for batch in ps.batches(dataset(), BATCH):
        optimizer.zero_grad()
        backward(loss_of(model, batch))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        assert _sent(job) == 0
        optimizer.step()
    assert optimizer.table.pushing.overlap is Overlap.OFF


def test_a_script_that_clips_past_autograds_sight_is_not_overlapped(script: Script) -> None:
    job, model, optimizer = script
    for batch in ps.batches(dataset(), BATCH):
        optimizer.zero_grad()
        backward(loss_of(model, batch))
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.data.clamp_(-1e-3, 1e-3)
        assert _sent(job) == 0
        optimizer.step()


def test_a_script_with_several_backwards_is_not_overlapped(script: Script) -> None:
    job, model, optimizer = script
    for batch in ps.batches(dataset(), BATCH):
        optimizer.zero_grad()
        for half in range(2):
            backward(loss_of(model, [tensor[half::2] for tensor in batch]) / 2)
        assert _sent(job) == 0
        optimizer.step()


def test_a_gradient_changed_after_it_was_sent_is_an_error(script: Script) -> None:
    _, model, optimizer = script
    loop = ps.batches(dataset(), BATCH)
    _one_slot(next(loop), model, optimizer)
    optimizer.zero_grad()
    backward(loss_of(model, next(loop)))
    parameters_of(model)[1].grad = torch.zeros(8)
    with pytest.raises(LocalProtocolError, match=r"'0\.bias' was changed .* ps\.clip_grad_norm"):
        optimizer.step()


def test_a_gradient_changed_in_place_after_it_was_sent_is_an_error(script: Script) -> None:
    _, model, optimizer = script
    loop = ps.batches(dataset(), BATCH)
    _one_slot(next(loop), model, optimizer)
    optimizer.zero_grad()
    backward(loss_of(model, next(loop)))
    torch.nn.utils.clip_grad_value_(parameters_of(model)[2:3], 1e-3)
    with pytest.raises(LocalProtocolError, match=r"'3\.weight' was changed"):
        optimizer.step()


def test_a_second_backward_after_parts_were_sent_is_an_error(script: Script) -> None:
    _, model, optimizer = script
    loop = ps.batches(dataset(), BATCH)
    _one_slot(next(loop), model, optimizer)
    optimizer.zero_grad()
    batch = next(loop)
    backward(loss_of(model, batch))
    with pytest.raises(LocalProtocolError, match=r"no_sync\(\)"):
        backward(loss_of(model, batch))


def test_no_sync_keeps_gradients_back_until_the_last_backward(script: Script) -> None:
    job, model, optimizer = script
    sent = []
    for number, batch in enumerate(ps.batches(dataset(), BATCH)):
        optimizer.zero_grad()
        if number:
            with optimizer.no_sync():
                backward(loss_of(model, batch) / 2)
            sent.append(_sent(job))
        backward(loss_of(model, batch) / 2)
        sent.append(_sent(job))
        optimizer.step()
    assert sent[:3] == [0, 0, len(job.tables[0].parts)]


def test_backwards_in_no_sync_are_part_of_the_gradient() -> None:
    def run(is_split: bool) -> dict[str, bytes]:
        with joined(ReferenceJob(slots=2, part_elements=20)):
            model = bare().eval()
            optimizer = DistributedOptimizer(sgd(parameters_of(model)), model, overlap=is_split)
            for number, batch in enumerate(ps.batches(dataset(), BATCH)):
                optimizer.zero_grad()
                if is_split and number:
                    with optimizer.no_sync():
                        backward(loss_of(model, batch))
                else:
                    backward(loss_of(model, batch))
                backward(loss_of(model, batch)) if number else None
                optimizer.step()
            return state_bits(model)

    assert run(True) == run(False)


def test_clearing_gradients_that_were_sent_is_an_error(script: Script) -> None:
    _, model, optimizer = script
    loop = ps.batches(dataset(), BATCH)
    _one_slot(next(loop), model, optimizer)
    optimizer.zero_grad()
    backward(loss_of(model, next(loop)))
    with pytest.raises(LocalProtocolError, match="overlap=False"):
        optimizer.zero_grad()


def test_leaving_out_the_step_after_parts_were_sent_is_an_error(script: Script) -> None:
    _, model, optimizer = script
    loop = ps.batches(dataset(), BATCH)
    _one_slot(next(loop), model, optimizer)
    optimizer.zero_grad()
    backward(loss_of(model, next(loop)))
    with pytest.raises(LocalProtocolError, match=r"without optimizer\.step\(\)"):
        next(loop)


def test_a_backward_after_the_step_belongs_to_nobody(script: Script) -> None:
    _, model, optimizer = script
    for batch in ps.batches(dataset(), BATCH):
        optimizer.zero_grad()
        backward(loss_of(model, batch))
        optimizer.step()
        backward(loss_of(model, batch))
    assert optimizer.table.pushing.overlap is Overlap.ON


def test_gradients_left_from_an_earlier_slot_are_an_error(script: Script) -> None:
    _, model, optimizer = script
    loop = ps.batches(dataset(), BATCH)
    _one_slot(next(loop), model, optimizer)
    backward(loss_of(model, next(loop)))
    with pytest.raises(LocalProtocolError, match=r"earlier slot.*zero_grad\(\) in every"):
        optimizer.step()


def test_accumulating_across_bodies_is_an_error() -> None:
    with joined(ReferenceJob(slots=2)):
        model = bare()
        optimizer = DistributedOptimizer(sgd(parameters_of(model)), model)
        loop = ps.batches(dataset(), BATCH)
        for _ in range(2):
            backward(loss_of(model, next(loop)) / 2)
        with pytest.raises(LocalProtocolError, match="not across bodies"):
            optimizer.step()


def test_a_view_filled_with_minus_zero_takes_a_gradient_bit_for_bit() -> None:
    assert bits(_accumulated(-0.0)) == bits(torch.tensor([-0.0, 0.0, 3.0]))


def test_a_view_filled_with_plus_zero_would_lose_a_sign() -> None:
    assert bits(_accumulated(0.0)) != bits(torch.tensor([-0.0, 0.0, 3.0]))


def _accumulated(absent: float) -> Tensor:
    """What backward makes of a gradient in a view that was cleared with ``absent``."""
    parameter = nn.Parameter(torch.ones(3))
    with mock.patch.object(gradients, "ABSENT", absent):
        store = gradients.Gradients([("p", parameter)], False, lambda _: None)
        store.begin_slot()
        for _ in range(2):  # the first gradient is autograd's own tensor, the second is in the view
            store.zero(set_to_none=True)
            backward((parameter * torch.tensor([-0.0, 0.0, 3.0])).sum())
    assert parameter.grad is store.items[0].view
    return parameter.grad


def test_a_sparse_gradient_is_refused_but_for_sparse_adam() -> None:
    with joined(ReferenceJob()):
        model = nn.Sequential(nn.Embedding(10, 3, sparse=True))
        optimizer = DistributedOptimizer(adamw(parameters_of(model)), model)
        next(ps.batches(dataset(), BATCH))
        optimizer.zero_grad()
        with pytest.raises(UnsupportedError, match=r"'0\.weight' is sparse"):
            backward(model(torch.tensor([1, 2])).sum())


def test_manual_gradients_count_without_any_backward() -> None:
    job = ReferenceJob()
    with joined(job):
        model = nn.Linear(6, 3)
        before = model.bias.detach().clone()
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model)
        for _ in ps.batches(dataset(), BATCH, max_rounds=1):
            optimizer.zero_grad()
            model.bias.grad = torch.ones(3)
            optimizer.step()
        assert bits(model.bias) == bits(before - 1.0)


def test_a_gradient_of_a_gradient_is_taken_without_its_graph() -> None:
    def run() -> dict[str, bytes]:
        with joined(ReferenceJob()):
            model = nn.Linear(6, 3)
            optimizer = DistributedOptimizer(sgd(parameters_of(model)), model)
            for batch in ps.batches(dataset(), BATCH):
                optimizer.zero_grad()
                loss = loss_of(model, batch)
                (slope,) = torch.autograd.grad(loss, [model.weight], create_graph=True)
                backward(loss + slope.square().sum())
                optimizer.step()
            return state_bits(model)

    assert run() == run()


def test_parameters_are_ordinary_again_after_shutdown() -> None:
    with joined(ReferenceJob()):
        model = bare()
        DistributedOptimizer(sgd(parameters_of(model)), model)
    backward(loss_of(model, list(dataset().tensors)))
    own = parameters_of(model)[0]
    assert own.grad is not None
    assert own.grad.untyped_storage().nbytes() == own.numel() * 4
    assert train_plainly(sgd) == train(ReferenceJob(), sgd)


def _one_slot(batch: list[Tensor], model: nn.Module, optimizer: DistributedOptimizer) -> None:
    optimizer.zero_grad()
    backward(loss_of(model, batch))
    optimizer.step()
