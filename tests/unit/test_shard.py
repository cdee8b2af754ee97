"""Shards: however a table is cut, the optimizer's step has the bits of one plain `torch.optim`."""

import math
from dataclasses import replace
from unittest import mock

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.unit.shard_jobs import (
    Cluster,
    Job,
    Plain,
    Round,
    blocks_of,
    differences,
    is_same,
    jobs,
    make_job,
    make_spec,
    marks,
)
from treefold.common.errors import DataError, UnsupportedError
from treefold.common.layout import BLOCK_ELEMENTS, Layout, ShardSpan
from treefold.common.optim import hyper_of
from treefold.common.spec import BUFFER_GROUP, Dtype, Hyper, Placement, Rule
from treefold.server import shard as shard_module
from treefold.server.shard import ShardState, clip_coefficient

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


def _parameters(cluster: Cluster) -> list[int]:
    """How many parameters torch steps, shard by shard."""
    optimizers = [shard._optimizer for shard in cluster.shards]
    return [sum(len(g["params"]) for g in o.param_groups) for o in optimizers if o is not None]


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
    with pytest.raises(DataError, match="AdamW with .*'fused': True.* needs tensorwise placement"):
        job.run()


@pytest.mark.parametrize("flag", ["foreach", "fused"])
@pytest.mark.parametrize("name", ["NAdam", "AdamW"])
def test_the_kernel_that_is_pinned_is_the_one_that_runs(name: str, flag: str) -> None:
    if (name, flag) in {("NAdam", "fused"), ("AdamW", "foreach")}:
        return  # torch has none, or one of the same bits
    job = make_job(name, {flag: True}, THREE, [[1, 1, 1]] * 4, 0)
    plain = job.run()[0]
    loop = make_job(name, {}, THREE, [[1, 1, 1]] * 4, 0)
    cluster = loop.run()[1]
    assert job.differences() == loop.differences() == []
    with blocks_of(loop.block):
        assert differences(plain, cluster) != []
