"""The training layer against plain PyTorch, bit for bit, on a reference cluster in one process."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import treefold.torch as ps
from tests.support.reference import ReferenceJob, bits
from tests.support.sessions import (
    BATCH,
    MakeOptimizer,
    adagrad,
    adamw,
    backward,
    bare,
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
    train,
    train_plainly,
)
from treefold.torch import buffers, loop
from treefold.torch.randomness import permutation, seed_all, seed_for_compute

pytestmark = pytest.mark.usefixtures("place")  # with models on the host and on an accelerator

OPTIMIZERS = [sgd, adamw, adagrad]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_one_slot_equals_the_plain_loop_bit_for_bit(make: MakeOptimizer) -> None:
    assert train(ReferenceJob(slots=1), make) == train_plainly(make)


def test_without_a_seed_per_slot_one_slot_differs_from_the_plain_loop() -> None:
    with mock.patch.object(loop, "seed_for_compute"):
        trained = train(ReferenceJob(slots=1), sgd)
    assert trained != train_plainly(sgd)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_two_slots_equal_two_accumulated_halved_losses_bit_for_bit(make: MakeOptimizer) -> None:
    assert train(ReferenceJob(slots=2), make) == _accumulated_halves(make)


def _accumulated_halves(make: MakeOptimizer, epochs: int = 2) -> dict[str, bytes]:
    """Both halves from the same buffers; then the mean of the float ones, the first's counters."""
    model = seeded(network)
    optimizer = make(parameters_of(model))
    data = dataset()
    for epoch in range(epochs):
        order = permutation(len(data), 0, epoch)
        for number, indices in enumerate(torch.split(order, BATCH)):
            before = {name: value.clone() for name, value in model.named_buffers()}
            after: list[dict[str, Tensor]] = []
            optimizer.zero_grad()
            for slot, half in enumerate(torch.chunk(indices, 2)):
                for name, value in model.named_buffers():
                    value.copy_(before[name])
                seed_for_compute(0, epoch * rounds_of() + number, slot)
                batch = [data.tensors[0][half], data.tensors[1][half]]
                (backward(loss_of(model, batch) / 2))
                after.append({name: value.clone() for name, value in model.named_buffers()})
            for name, value in model.named_buffers():
                first, second = after[0][name], after[1][name]
                is_float = value.is_floating_point()
                value.copy_(first * 0.5 + second * 0.5 if is_float else first)
            optimizer.step()
    return state_bits(model)


@pytest.mark.parametrize(
    ("slots", "build"), [(1, network), (2, network), (3, network), (5, bare), (8, bare)]
)
@pytest.mark.parametrize(
    "order",
    [
        lambda active: list(reversed(range(active))),
        lambda active: [*range(active), *range(active)],
        lambda active: [*range(1, active), 0, active // 2],
    ],
    ids=["backwards", "twice", "rotated with one repeated"],
)
def test_the_order_and_number_of_times_slots_are_computed_in_change_no_bit(
    slots: int, build: Callable[[], nn.Module], order: Callable[[int], list[int]]
) -> None:
    trained = train(ReferenceJob(slots, order=order), adamw, build)
    assert trained == train(ReferenceJob(slots), adamw, build)


def test_slots_that_do_not_start_from_the_rounds_buffers_are_found_out() -> None:
    job = ReferenceJob(slots=3, order=lambda active: [*range(active), *range(active)])
    with (
        mock.patch.object(buffers.Buffers, "reset"),
        pytest.raises(AssertionError, match="two copies of"),
    ):
        train(job, sgd)


@pytest.mark.parametrize("part_elements", [1, 7, 1000])
def test_the_size_of_parts_changes_no_bit(part_elements: int) -> None:
    cut = train(ReferenceJob(slots=3, part_elements=part_elements), adamw)
    assert cut == train(ReferenceJob(slots=3), adamw)


def test_a_worker_that_takes_over_in_mid_round_ends_with_the_same_bits() -> None:
    job = ReferenceJob(slots=3)
    _train_until(job, slots_done=7)
    assert job.version == 2, "the first worker must stop between two slots of a round"
    assert train(job, adamw) == train(ReferenceJob(slots=3), adamw)


def _train_until(job: ReferenceJob, slots_done: int) -> None:
    """Run the script of `train`, and stop like a killed process after so many slots."""
    with joined(job):
        model = network()
        optimizer = ps.DistributedOptimizer(adamw(parameters_of(model)), model)
        for number, batch in enumerate(ps.batches(dataset(), BATCH, 0)):
            if number == slots_done:
                return
            optimizer.zero_grad()
            backward(loss_of(model, batch))
            optimizer.step()


class _Partly(nn.Module):
    """One layer unused, one tied to another, one frozen, one used in every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.first.weight
        self.unused = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.seldom = nn.Linear(6, 3)
        self.head = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.tied(torch.relu(self.first(inputs))) + self.frozen(inputs)
        output: Tensor = self.head(hidden)
        return output + self.seldom(hidden) if bool(inputs[0, 0] > 0) else output


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_unused_frozen_tied_and_seldom_used_parameters_step_as_in_the_plain_loop(
    make: MakeOptimizer,
) -> None:
    trained = train(ReferenceJob(slots=1), make, _Partly)
    assert trained == train_plainly(make, _Partly)
    assert trained["unused.weight"] == bits(seeded(_Partly).state_dict()["unused.weight"])


def test_frozen_parameters_are_the_first_workers_on_every_worker() -> None:
    job = ReferenceJob()
    states = []
    for shift in (0.0, 1.0):
        with joined(job):
            model = _Partly()
            with torch.no_grad():
                model.frozen.weight += shift
            owned = [p for p in model.parameters() if p.requires_grad]
            ps.DistributedOptimizer(sgd(owned), model)
            states.append(state_bits(model))
    assert states[0] == states[1]


def test_a_parameter_that_is_unfrozen_between_epochs_trains_from_then_on() -> None:
    def run(optimizer: torch.optim.Optimizer, model: _Partly, job: ReferenceJob | None) -> None:
        for epoch in range(2):
            model.frozen.requires_grad_(epoch == 1)
            first = epoch * rounds_of()
            for batch in (
                ps.batches(dataset(), BATCH, epoch) if job else plain_batches(epoch, first)
            ):
                optimizer.zero_grad()
                backward(loss_of(model, batch))
                optimizer.step()

    job = ReferenceJob()
    with joined(job):
        model = _Partly()
        run(ps.DistributedOptimizer(adamw(parameters_of(model)), model), model, job)
        trained = state_bits(model)
    seed_all(0)
    plain = _Partly()
    before = bits(plain.frozen.weight)
    run(adamw(parameters_of(plain)), plain, None)
    assert trained == state_bits(plain)
    assert trained["frozen.weight"] != before


def test_param_groups_keep_their_own_hyper_parameters() -> None:
    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [
            {"params": parameters[2:], "lr": 0.2, "momentum": 0.0},
            {"params": parameters[:2], "weight_decay": 0.3},
        ]
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9)

    assert train(ReferenceJob(slots=1), make) == train_plainly(make)


def test_a_gradient_of_zeros_is_not_the_same_as_none() -> None:
    def run(set_to_none: bool) -> tuple[bytes, bytes]:
        job = ReferenceJob()
        with joined(job):
            model = _Partly()
            optimizer = ps.DistributedOptimizer(adamw(parameters_of(model)), model)
            for batch in ps.batches(dataset(), BATCH):
                optimizer.zero_grad(set_to_none)
                backward(loss_of(model, batch))
                optimizer.step()
            trained = bits(model.seldom.weight)
        plain = seeded(_Partly)
        own = adamw(parameters_of(plain))
        for batch in plain_batches(0):
            own.zero_grad(set_to_none)
            backward(loss_of(plain, batch))
            own.step()
        return trained, bits(plain.state_dict()["seldom.weight"])

    as_none, as_zeros = run(True), run(False)
    assert as_none[0] == as_none[1]
    assert as_zeros[0] == as_zeros[1]
    assert as_none[0] != as_zeros[0], "some batch must leave the layer unused"


def test_clearing_gradients_through_the_model_works_as_well() -> None:
    job = ReferenceJob()
    with joined(job):
        model = network()
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        for epoch in range(2):
            for batch in ps.batches(dataset(), BATCH, epoch):
                model.zero_grad()
                backward(loss_of(model, batch))
                optimizer.step()
        assert state_bits(model) == train_plainly(sgd)


def test_gradients_accumulate_within_a_slot() -> None:
    def body(model: nn.Module, optimizer: torch.optim.Optimizer, batch: list[Tensor]) -> None:
        optimizer.zero_grad()
        for half in range(2):
            micro = [tensor[half::2] for tensor in batch]
            (backward(loss_of(model, micro) / 2))
        optimizer.step()

    job = ReferenceJob()
    with joined(job):
        model = network()
        optimizer = ps.DistributedOptimizer(adamw(parameters_of(model)), model)
        for batch in ps.batches(dataset(), BATCH):
            body(model, optimizer, batch)
        trained = state_bits(model)
    plain = seeded(network)
    own = adamw(parameters_of(plain))
    for batch in plain_batches(0):
        body(plain, own, batch)
    assert trained == state_bits(plain)


def test_a_body_without_a_step_leaves_parameters_but_not_buffers_alone() -> None:
    job = ReferenceJob()
    with joined(job):
        model = network()
        ps.DistributedOptimizer(adamw(parameters_of(model)), model)
        for batch in ps.batches(dataset(), BATCH):
            backward(loss_of(model, batch))
        trained = state_bits(model)
    plain = seeded(network)
    for batch in plain_batches(0):
        loss_of(plain, batch)
    assert trained == state_bits(plain)
    assert trained["1.running_mean"] != state_bits(seeded(network))["1.running_mean"]


def test_two_optimizers_share_a_model() -> None:
    job = ReferenceJob()
    with joined(job):
        model = network()
        parameters = parameters_of(model)
        pair = [
            ps.DistributedOptimizer(sgd(parameters[:2]), model),
            ps.DistributedOptimizer(adamw(parameters[2:]), model),
        ]
        for batch in ps.batches(dataset(), BATCH):
            for optimizer in pair:
                optimizer.zero_grad()
            backward(loss_of(model, batch))
            for optimizer in pair:
                optimizer.step()
        trained = state_bits(model)
    plain = seeded(network)
    parameters = parameters_of(plain)
    own = [sgd(parameters[:2]), adamw(parameters[2:])]
    for batch in plain_batches(0):
        plain.zero_grad()
        backward(loss_of(plain, batch))
        for part in own:
            part.step()
    assert trained == state_bits(plain)


def test_a_bfloat16_model_trains_on_a_float32_master() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(torch.bfloat16)

    def cast(batch: list[Tensor]) -> list[Tensor]:
        return [batch[0].to(torch.bfloat16), batch[1]]

    job = ReferenceJob()
    with joined(job):
        model = build()
        optimizer = ps.DistributedOptimizer(adamw(parameters_of(model)), model)
        for batch in ps.batches(dataset(), BATCH):
            optimizer.zero_grad()
            backward(loss_of(model, cast(batch)))
            optimizer.step()
        trained = state_bits(model)
    plain = seeded(build)
    master = [nn.Parameter(parameter.detach().float()) for parameter in plain.parameters()]
    own = adamw(master)
    for batch in plain_batches(0):
        plain.zero_grad()
        backward(loss_of(plain, cast(batch)))
        for wide, narrow in zip(master, plain.parameters(), strict=True):
            wide.grad = None if narrow.grad is None else narrow.grad.float()
        own.step()
        with torch.no_grad():
            for wide, narrow in zip(master, plain.parameters(), strict=True):
                narrow.copy_(wide)
    assert trained == state_bits(plain)


def test_a_scaled_bfloat16_gradient_is_rounded_in_float32_only() -> None:
    job = ReferenceJob(slots=3)
    with joined(job):
        model = nn.Linear(6, 3).to(torch.bfloat16)
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        for batch in ps.batches(dataset(), BATCH, max_rounds=1):
            optimizer.zero_grad()
            backward(loss_of(model, [batch[0].to(torch.bfloat16), batch[1]]))
            optimizer.step()
            if job.seen[-1][1] == 0:
                assert model.bias.grad is not None
                wanted = model.bias.grad.float() * (len(batch[1]) / BATCH)
                part = job.leaves[0, 0][0].values
                assert bits(part[18:21]) == bits(wanted)


def test_a_model_in_channels_last_trains_as_in_the_plain_loop() -> None:
    def build() -> nn.Module:
        layers = nn.Sequential(
            nn.Unflatten(1, (2, 3, 1)), nn.Conv2d(2, 4, (2, 1)), nn.Flatten(), nn.Linear(8, 3)
        )
        with torch.no_grad():
            kernel = parameters_of(layers)[0]
            kernel.data = kernel.to(memory_format=torch.channels_last)
        return layers

    assert not parameters_of(build())[0].is_contiguous()
    assert train(ReferenceJob(), adamw, build) == train_plainly(adamw, build)


class _Bag(nn.Module):
    """An embedding whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(12, 3, sparse=True)

    def forward(self, inputs: Tensor) -> Tensor:
        chosen = (inputs[:, :2].abs() * 4).long().clamp(max=11)
        output: Tensor = self.rows(chosen).sum(dim=1)
        return output


def sparse_adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SparseAdam(parameters, lr=0.1)


def test_sparse_gradients_mark_untouched_elements_with_minus_zero() -> None:
    job = ReferenceJob(slots=3, part_elements=5)
    with joined(job):
        model = _Bag()
        optimizer = ps.DistributedOptimizer(sparse_adam(parameters_of(model)), model)
        for batch in ps.batches(dataset(), BATCH, max_rounds=1):
            optimizer.zero_grad()
            backward(loss_of(model, batch))
            optimizer.step()
            assert model.rows.weight.grad is not None
            grad = model.rows.weight.grad.coalesce()
            slot = job.seen[-1][1]
            sent = torch.cat([job.leaves[0, part][slot].values for part in range(8)])[:36]
            wanted = torch.full((12, 3), -0.0)
            wanted[grad.indices()[0]] = grad.values() * (len(batch[1]) / BATCH) + 0.0
            assert bits(sent) == bits(wanted)


def test_a_touched_element_stays_touched_when_scaling_rounds_it_to_minus_zero() -> None:
    job = ReferenceJob(slots=2)
    with joined(job):
        model = _Bag()
        optimizer = ps.DistributedOptimizer(sparse_adam(parameters_of(model)), model)
        for _ in ps.batches(dataset(), BATCH, max_rounds=1):
            optimizer.zero_grad()
            backward((model.rows(torch.tensor([2])) * torch.tensor(-1e-45)).sum())
            optimizer.step()
            sent = job.leaves[0, 0][job.seen[-1][1]].values
            assert bits(sent[6:9]) == bits(torch.zeros(3)), "touched"
            assert bits(sent[9:12]) == bits(torch.full((3,), -0.0)), "untouched"


def test_sparse_adam_trains_as_in_the_plain_loop() -> None:
    trained = train(ReferenceJob(slots=1, part_elements=5), sparse_adam, _Bag)
    assert trained == train_plainly(sparse_adam, _Bag)


def test_an_own_loader_of_one_worker_equals_the_plain_loop() -> None:
    job = ReferenceJob()
    with joined(job):
        model = network()
        optimizer = ps.DistributedOptimizer(adamw(parameters_of(model)), model)
        for epoch in range(2):
            for batch in plain_batches(epoch, epoch * rounds_of()):
                optimizer.zero_grad()
                backward(loss_of(model, batch))
                optimizer.step()
        assert state_bits(model) == train_plainly(adamw)
        assert ps.round() == 2 * rounds_of()


def test_an_own_loader_scales_by_the_number_of_workers() -> None:
    job = ReferenceJob(workers=2)
    with joined(job):
        model = network()
        optimizer = ps.DistributedOptimizer(adamw(parameters_of(model)), model)
        for batch in plain_batches(0):
            optimizer.zero_grad()
            backward(loss_of(model, batch))
            optimizer.step()
        assert state_bits(model) == train_plainly(adamw, epochs=1)


def test_in_an_own_loader_buffers_are_the_mean_of_the_workers() -> None:
    job = ReferenceJob(workers=2, peer=lambda values: values * 3)
    with joined(job):
        model = network()
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        for batch in plain_batches(0):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            own = model.state_dict()["1.running_mean"].clone()
            backward(loss)
            optimizer.step()
            mean = model.state_dict()["1.running_mean"]
            assert bits(mean) == bits(own * 0.5 + own * 0.5 * 3)


def test_gradients_of_an_own_loader_accumulate_until_they_are_cleared() -> None:
    job = ReferenceJob()
    with joined(job):
        model = network()
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        for batch in plain_batches(0):
            backward(loss_of(model, batch))
            optimizer.step()
        trained = state_bits(model)
    plain = seeded(network)
    own = sgd(parameters_of(plain))
    for batch in plain_batches(0):
        backward(loss_of(plain, batch))
        own.step()
    assert trained == state_bits(plain)


def test_after_the_loop_every_worker_draws_the_same_random_numbers() -> None:
    def draw(order: Callable[[int], list[int]]) -> float:
        with joined(ReferenceJob(slots=3, order=order)):
            model = network()
            optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
            for batch in ps.batches(dataset(), BATCH):
                optimizer.zero_grad()
                backward(loss_of(model, batch))
                optimizer.step()
            return torch.rand(()).item()

    assert draw(lambda active: list(range(active))) == draw(lambda active: [*range(active)][::-1])
