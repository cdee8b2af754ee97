"""Shards: however a table is cut, the optimizer's step has the bits of one plain `torch.optim`."""

import math
from dataclasses import replace
from unittest import mock

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.unit.shard_jobs import (
    Cluster,
    Job,
    Round,
    blocks_of,
    differences,
    is_same,
    jobs,
    make_job,
    make_spec,
)
from treefold.common.errors import DataError, UnsupportedError
from treefold.common.layout import BLOCK_ELEMENTS, Layout, ShardSpan
from treefold.common.optim import hyper_of
from treefold.common.spec import BUFFER_GROUP, Dtype, Hyper, Placement, Rule
from treefold.server import shard as shard_module
from treefold.server import unit as unit_module
from treefold.server.shard import FoldedPart, ShardState, clip_coefficient
from treefold.server.unit import Unit

CASES: list[tuple[str, Hyper]] = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "maximize": True}),
    ("Adam", {}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1, "maximize": True}),
    ("Adam", {"betas": [0.7, 0.8], "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("AdamW", {}),
    ("AdamW", {"amsgrad": True, "eps": 1e-3}),
    ("Adagrad", {}),
    ("Adagrad", {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5}),
    ("RMSprop", {}),
    ("RMSprop", {"centered": True, "momentum": 0.9, "weight_decay": 0.1}),
    ("Adadelta", {}),
    ("Adadelta", {"rho": 0.7, "weight_decay": 0.1, "maximize": True}),
    ("Adamax", {}),
    ("Adamax", {"weight_decay": 0.1, "maximize": True}),
    ("Rprop", {}),
    ("Rprop", {"etas": [0.4, 1.5], "step_sizes": [1e-3, 0.5]}),
    ("NAdam", {}),
    ("NAdam", {"momentum_decay": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("RAdam", {}),
    ("RAdam", {"betas": [0.5, 0.6], "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("ASGD", {}),
    ("ASGD", {"t0": 2.0, "lambd": 0.1, "weight_decay": 0.1, "maximize": True}),
    ("SparseAdam", {}),
    ("SparseAdam", {"betas": [0.5, 0.6], "maximize": True}),
]
FOREACH: list[tuple[str, Hyper]] = [
    (name, {**hyper, "foreach": True}) for name, hyper in CASES if name != "SparseAdam"
]
FUSED: list[tuple[str, Hyper]] = [
    (name, {**hyper, "fused": True})
    for name, hyper in CASES
    if name in {"SGD", "Adam", "AdamW", "Adagrad"}
]
TENSORWISE: list[tuple[str, Hyper]] = [
    ("Adafactor", {}),
    ("Adafactor", {"eps": [1e-6, 1e-2], "d": 2.0, "weight_decay": 0.1, "maximize": True}),
    ("Adafactor", {"foreach": True}),
    ("Muon", {}),
    ("Muon", {"nesterov": False, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0}),
]


THREE = [([3, 5], 0), ([40], 0), ([7], 0)]
MIXED = [*THREE, ([20], 1), ([9], BUFFER_GROUP), ([30], BUFFER_GROUP)]
ALL = [1] * len(MIXED)


def _ids(case: object) -> str:
    return case if isinstance(case, str) else ",".join(case) if isinstance(case, dict) else "?"


def _slice(tensor: Tensor, start: int, stop: int) -> Tensor:
    return tensor[start:stop]


def _parameters(cluster: Cluster) -> list[int]:
    """How many parameters torch steps, shard by shard."""
    found = []
    for shard in cluster.shards:
        optimizers = [unit._optimizer for unit in shard._units if unit._optimizer is not None]
        found.append(sum(len(g["params"]) for o in optimizers for g in o.param_groups))
    return found


# ---- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "hyper"), [*CASES, *FOREACH, *FUSED, *TENSORWISE], ids=_ids)
def test_a_table_cut_anywhere_steps_to_the_bits_of_plain_torch(name: str, hyper: Hyper) -> None:
    @settings(max_examples=12)
    @given(jobs(name, hyper))
    def check(job: Job) -> None:
        assert job.differences() == []

    check()


@pytest.mark.parametrize("name", ["SGD", "AdamW", "SparseAdam"])
def test_blocks_of_the_real_size_step_to_the_same_bits(name: str) -> None:
    tensors = [([301, 257], 0), ([13], 0), ([99, 801], 1), ([70_001], BUFFER_GROUP)]
    job = make_job(name, {}, tensors, [[1, 1, 1, 1], [1, 0, 1, 1]], 0)
    job = replace(job, block=BLOCK_ELEMENTS)
    assert len(job.run()[1].shards) == 3
    assert job.differences() == []


def test_what_a_class_sees_of_a_whole_tensor_would_change_if_it_were_cut() -> None:
    """The negative control: the comparison notices what may not be cut."""
    job = make_job("Adafactor", {}, THREE, [[1, 1, 1]] * 3, 0)
    assert job.differences() == []
    job.spec = msgspec.structs.replace(job.spec, placement=Placement.ELEMENTWISE)
    with mock.patch.object(shard_module, "placement_of", return_value=Placement.ELEMENTWISE):
        assert job.differences() != []


def test_fused_kernels_of_a_whole_tensor_would_change_if_it_were_cut() -> None:
    job = make_job("AdamW", {"fused": True}, THREE, [[1, 1, 1]] * 3, 0)
    assert job.differences() == []
    job.spec = msgspec.structs.replace(job.spec, placement=Placement.ELEMENTWISE)
    with pytest.raises(DataError, match=r"AdamW with .*'fused': True.* needs tensorwise placement"):
        job.run()


@pytest.mark.parametrize(("name", "flag"), [("NAdam", "foreach"), ("AdamW", "fused")])
def test_the_kernel_that_is_pinned_is_the_one_that_runs(name: str, flag: str) -> None:
    job = make_job(name, {flag: True}, THREE, [[1, 1, 1]] * 4, 0)
    plain = job.run()[0]
    loop = make_job(name, {}, THREE, [[1, 1, 1]] * 4, 0)
    cluster = loop.run()[1]
    assert job.differences() == loop.differences() == []
    assert differences(plain, cluster) != []


def test_sparse_sums_would_go_astray_in_a_view_that_does_not_begin_its_storage() -> None:
    """Once this fails, torch has mended it and `rebased_view` can go."""
    tensors = [([4], 0), ([1], 1), ([8], BUFFER_GROUP)]  # what goes astray hits the buffer
    job = make_job("SparseAdam", {}, tensors, [[1, 1, 1]], 0)
    job.rounds[0].gradients[1] = torch.ones(1)
    assert job.differences() == []
    job.block = 64  # all in one part: what goes astray is in the same memory
    with (
        mock.patch.object(shard_module, "rebased_view", _slice),
        mock.patch.object(unit_module, "rebased_view", _slice),
    ):
        assert job.differences() == ["t1"]


# ---- tensors without a gradient ------------------------------------------------------------------


def test_a_tensor_without_gradient_is_left_alone_and_not_stepped_with_zeros() -> None:
    """The negative control: with the marks ignored, weight decay and counters go on."""
    job = make_job("AdamW", {}, THREE, [[1, 1, 1], [1, 0, 1], [1, 1, 1]], 0)
    assert job.differences() == []
    with mock.patch.object(Unit, "_mark_absent"):
        assert job.differences() != []


def test_tensors_that_always_come_together_are_stepped_as_one() -> None:
    tensors = [([3], n // 50) for n in range(100)]
    job = make_job("Adam", {}, tensors, [[1] * 100] * 3, 0)
    job.shards, job.block = 1, 256
    assert _parameters(job.run()[1]) == [2]


def test_a_parameter_is_cut_where_presence_differs_and_not_again() -> None:
    tensors = [([3], 0) for _ in range(10)]
    once = [[1] * 10, [1] * 4 + [0] * 2 + [1] * 4]
    again = [*once, once[1], [1] * 10, once[1]]
    further = [*again, [0] * 5 + [1] * 5]
    for patterns, wanted in [(once, 3), (again, 3), (further, 4)]:
        job = make_job("Adam", {}, tensors, patterns, 0)
        job.shards = 1
        assert _parameters(job.run()[1]) == [wanted]
        assert job.differences() == []


def test_a_round_without_any_gradient_changes_nothing() -> None:
    job = make_job("AdamW", {}, MIXED, [ALL, [0] * len(MIXED)], 0)
    first = make_job("AdamW", {}, MIXED, [ALL], 0)
    assert differences(job.run()[0], first.run()[1]) == []
    assert job.differences() == []


def test_marks_that_do_not_fit_change_nothing() -> None:
    job = make_job("SGD", {}, [([40], 0), ([5], 0)], [[1, 1]], 0)
    job.shards = 1
    cluster = job.run()[1]
    before = cluster.values()
    with pytest.raises(DataError, match=r"absent marks of \[2\] bytes, expected \[1\]"):
        cluster.shards[0].step([FoldedPart(0, None, b"\0\0")], job.rounds[0].groups)
    assert all(map(is_same, cluster.values(), before))


def test_marks_of_a_whole_tensor_that_contradict_each_other_change_nothing() -> None:
    job = make_job("Adafactor", {}, [([40], 0), ([5], 0)], [[1, 1]], 0)
    job.shards = 1
    cluster = job.run()[1]
    before = cluster.values()
    shard, round_ = cluster.shards[0], job.rounds[0]
    first, *others = cluster.folded(shard, round_)
    with pytest.raises(DataError, match="'t0' is marked absent in some of its parts"):
        shard.step([msgspec.structs.replace(first, absent=b"\1"), *others], round_.groups)
    assert all(map(is_same, cluster.values(), before))


def test_a_late_first_step_that_torch_cannot_fuse_is_refused_with_the_reason() -> None:
    hyper: Hyper = {"momentum": 0.9, "fused": True}
    job = make_job("SGD", hyper, THREE, [[1, 0, 1], [1, 1, 1]], 0)
    job.shards = 1
    plain, cluster = replace(job, rounds=job.rounds[:1]).run()
    before = cluster.values()
    with pytest.raises(TypeError):
        plain.step(job.rounds[1])
    with pytest.raises(UnsupportedError, match=r"1 of 3 parameters .* leave out fused=True"):
        cluster.step(job.rounds[1])
    assert all(map(is_same, cluster.values(), before))


# ---- hyper-parameters of the round ---------------------------------------------------------------


def test_a_users_own_scheduler_is_followed_round_by_round() -> None:
    job = make_job("SGD", {"momentum": 0.9}, THREE, [[1, 1, 1]] * 6, 0)
    users = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(users, max_lr=0.5, total_steps=8)
    for round_ in job.rounds:
        round_.groups = hyper_of(users)
        users.step()
        scheduler.step()
    assert len({str(round_.groups) for round_ in job.rounds}) == len(job.rounds)
    assert job.differences() == []
    with mock.patch.object(unit_module, "set_hyper"):
        assert job.differences() != []


def test_wrong_hyper_parameters_change_nothing() -> None:
    job = make_job("SGD", {}, MIXED, [ALL], 0)
    cluster = job.run()[1]
    before = cluster.values()
    wrong: list[list[Hyper]] = [[], [{"lr": 0.1}], [{"lr": 0.1}, {"learning_rate": 0.1}]]
    for groups in wrong:
        with pytest.raises(DataError, match=r"param groups|no hyper-parameter"):
            cluster.shards[0].step(cluster.folded(cluster.shards[0], job.rounds[0]), groups)
    assert all(map(is_same, cluster.values(), before))


# ---- clipping and norms --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "AdamW", "SparseAdam"])
def test_the_coefficient_scales_gradients_and_no_buffers(name: str) -> None:
    job = make_job(name, {}, MIXED, [ALL, ALL], 0)
    unclipped = job.run()[1]
    for round_ in job.rounds:
        round_.coefficient = 0.3
    plain, clipped = job.run()
    assert differences(plain, clipped) == []
    assert differences(plain, unclipped) != []
    assert all(map(is_same, clipped.values()[-2:], unclipped.values()[-2:]))


def test_a_gradient_that_clipping_makes_minus_zero_still_counts_as_touched() -> None:
    job = make_job("SparseAdam", {}, [([4], 0)], [[1]], 0)
    job.rounds = [Round([torch.tensor([-1e-45, -0.0, 0.0, 1.0])], [{}], coefficient=0.1)]
    with mock.patch.object(unit_module, "step", _remember):
        job.run()
    assert _STEPPED == [[[0, 2, 3]]]


_STEPPED: list[object] = []


def _remember(optimizer: Optimizer) -> None:
    (parameter,) = optimizer.param_groups[0]["params"]
    _STEPPED.append(parameter.grad._indices().tolist())


@given(st.floats(1e-6, 1e6), st.floats(0, 2**100, width=32))
def test_the_coefficient_is_torchs(norm_max: float, norm: float) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    torch.nn.utils.clip_grads_with_norm_([parameter], norm_max, torch.tensor(norm))
    assert clip_coefficient(norm_max, norm) == parameter.grad.item()


@pytest.mark.parametrize(("norm", "wanted"), [(0.0, 1.0), (1.0, 1.0), (math.inf, 0.0)])
def test_the_coefficient_of_a_special_norm(norm: float, wanted: float) -> None:
    assert clip_coefficient(2.0, norm) == wanted


def test_the_coefficient_of_a_norm_that_is_not_a_number_is_none_either() -> None:
    assert math.isnan(clip_coefficient(2.0, math.nan))


def _sums(job: Job) -> list[float]:
    with blocks_of(job.block, blocks_per_part=4):
        spans = Layout(job.spec).cut(job.shards)
        cluster = Cluster(job.spec, spans)
        cluster.start(job.initial)
        return [
            total
            for shard in cluster.shards
            for total in shard.block_sums(cluster.folded(shard, job.rounds[0]))
        ]


@pytest.mark.parametrize("placement", Placement)
@pytest.mark.parametrize("block", [37, 40_000])
def test_block_sums_do_not_depend_on_the_cut(block: int, placement: Placement) -> None:
    tensors = [([90_001], 0), ([13, 11], 0), ([77_777], 1), ([5000], BUFFER_GROUP)]
    job = make_job("SGD", {}, tensors, [[1, 1, 0, 1]], 0)
    job = replace(job, block=block, spec=msgspec.structs.replace(job.spec, placement=placement))
    sums = [_sums(replace(job, shards=shards)) for shards in (1, 2, 3)]
    assert sums[0] == sums[1] == sums[2]
    squares = [g.double().square().sum() for g in job.rounds[0].gradients[:2] if g is not None]
    assert math.fsum(sums[0]) == pytest.approx(float(sum(squares)), rel=1e-12)


def test_block_sums_do_not_depend_on_the_number_of_threads() -> None:
    job = make_job("SGD", {}, [([3 * BLOCK_ELEMENTS - 5], 0)], [[1]], 0)
    job.block = BLOCK_ELEMENTS
    many = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    sums, at_once = [], []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sums.append(_sums(job))
            at_once.append(many.double().sum().item())
    finally:
        torch.set_num_threads(1)
    assert sums[0] == sums[1] == sums[2]
    assert len(set(at_once)) > 1  # which is why a block is summed in pieces


def test_a_gradient_that_is_not_finite_shows_in_its_block_alone() -> None:
    job = make_job("SGD", {}, [([40], 0)], [[1]], 0)
    values = job.rounds[0].gradients[0]
    assert values is not None
    values[20] = math.nan
    assert [math.isfinite(total) for total in _sums(job)] == [True, False, True]


@pytest.mark.parametrize("name", ["SGD", "Adafactor"])
def test_a_part_without_payload_has_nothing_of_the_last_rounds_gradient(name: str) -> None:
    job = make_job(name, {}, [([16], 0)], [[1]], 0)
    cluster = job.run()[1]
    shard = cluster.shards[0]
    assert shard.block_sums(cluster.folded(shard, job.rounds[0])) != [0.0]
    assert shard.block_sums([FoldedPart(0, None, b"\1")]) == [0.0]


# ---- kinds of tables and tensors -----------------------------------------------------------------


def test_buffers_get_the_folded_value_where_there_is_one() -> None:
    tensors = [([5], 0), ([6], BUFFER_GROUP), ([7], BUFFER_GROUP)]
    job = make_job("SGD", {}, tensors, [[1, 1, 1], [1, 0, 1]], 0)
    assert job.differences() == []
    values = job.run()[1].values()
    first, second = job.rounds[0].gradients, job.rounds[1].gradients
    assert is_same(values[1], first[1])
    assert is_same(values[2], second[2])


def test_a_table_of_buffers_alone_needs_no_optimizer() -> None:
    job = make_job("SGD", {}, [([5], 0)], [[1]], 0)
    tensors = [msgspec.structs.replace(job.spec.tensors[0], group=BUFFER_GROUP)]
    spec = msgspec.structs.replace(job.spec, tensors=tensors, optimizer=None)
    cluster = Cluster(spec, Layout(spec).cut(1))
    cluster.start(job.initial)
    cluster.step(Round(job.rounds[0].gradients, []))
    assert is_same(cluster.values()[0], job.rounds[0].gradients[0])
    with pytest.raises(DataError, match="1 param groups, but no optimizer"):
        cluster.shards[0].step([FoldedPart(0, None, b"\1")], [{}])


def test_a_constant_table_has_values_and_no_rounds() -> None:
    job = make_job("SGD", {}, [([5], 0)], [[1]], 0)
    spec = msgspec.structs.replace(job.spec, rule=Rule.CONSTANT, optimizer=None)
    cluster = Cluster(spec, Layout(spec).cut(1))
    cluster.start(job.initial)
    shard = cluster.shards[0]
    assert is_same(cluster.values()[0], job.initial[0])
    assert shard.state_pieces() == []
    for ask in (lambda: shard.block_sums([]), lambda: shard.step([], [])):
        with pytest.raises(DataError, match="constant and has no rounds"):
            ask()


def test_the_master_copy_of_a_bf16_tensor_is_float32() -> None:
    job = make_job("SGD", {}, [([5], 0)], [[1]] * 3, 0)
    tensors = [msgspec.structs.replace(job.spec.tensors[0], dtype=Dtype.BFLOAT16)]
    job.spec = msgspec.structs.replace(job.spec, tensors=tensors)
    assert job.differences() == []
    assert not is_same(job.run()[1].values()[0].bfloat16().float(), job.run()[1].values()[0])


def test_a_shard_that_would_cut_a_whole_tensor_is_refused() -> None:
    job = make_job("Muon", {}, [([8, 8], 0)], [[1]], 0)
    with blocks_of(16), pytest.raises(DataError, match="would cut 't0'"):
        ShardState(job.spec, ShardSpan(0, 2))


def test_tensors_that_the_optimizer_cannot_step_are_refused() -> None:
    with pytest.raises(DataError, match="only supports 2D"):
        ShardState(make_spec("Muon", [{}], [([8], 0)]), ShardSpan(0, 1))


def test_values_of_a_wrong_shape_are_refused() -> None:
    shard = ShardState(make_spec("SGD", [{}], [([5], 0)]), ShardSpan(0, 1))
    with pytest.raises(DataError, match=r"initial values of shape \[4\], expected \[5\]"):
        shard.initialize(0, torch.zeros(4))
    with pytest.raises(DataError, match=r"a copy into shape \[6\], expected \[5\]"):
        shard.copy_to(torch.zeros(6))
