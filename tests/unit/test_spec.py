"""Specs: what may be declared, and how two declarations are told apart in words."""

import json
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treefold.common.errors import DataError
from treefold.common.spec import (
    BUFFER_GROUP,
    ELEMENTS_MAX,
    Dtype,
    HyperValue,
    OptimizerSpec,
    Placement,
    Rule,
    TableSpec,
    TensorSpec,
    differences,
)


def adamw(**changes: HyperValue) -> OptimizerSpec:
    """An optimizer with one param group."""
    return OptimizerSpec("AdamW", [{"lr": 0.1, "betas": [0.9, 0.999], **changes}])


def net(optimizer: OptimizerSpec | None = None, groups: tuple[int, ...] = (0, 0)) -> TableSpec:
    """A table with a tensor for each of the groups."""
    tensors = [TensorSpec(f"t{n}", [2, 3], Dtype.FLOAT32, g) for n, g in enumerate(groups)]
    return TableSpec("net", Rule.OPTIMIZER, Placement.ELEMENTWISE, tensors, optimizer or adamw())


def test_equal_specs_have_no_differences() -> None:
    assert differences(net(), net()) == []


@pytest.mark.parametrize(
    ("theirs", "line"),
    [
        (net(adamw(lr=0.2)), "optimizer.groups[0].lr: 0.1 here, 0.2 there"),
        (net(adamw(betas=[0.8, 0.999])), "optimizer.groups[0].betas[0]: 0.9 here, 0.8 there"),
        (net(adamw(fused=True)), "optimizer.groups[0].fused: absent here, True there"),
        (net(adamw(lr=None)), "optimizer.groups[0].lr: 0.1 here, None there"),
        (net(groups=(0,)), "tensors: 2 entries here, 1 there"),
        (net(groups=(0, BUFFER_GROUP)), "tensors[1].group: 0 here, -1 there"),
        (
            msgspec.structs.replace(net(), placement=Placement.TENSORWISE),
            "placement: 'elementwise' here, 'tensorwise' there",
        ),
    ],
)
def test_a_difference_is_named_by_field_with_both_values(theirs: TableSpec, line: str) -> None:
    assert differences(net(), theirs) == [line]


def test_a_number_and_a_truth_value_differ_although_python_calls_them_equal() -> None:
    assert differences({"nesterov": True}, {"nesterov": 1}) == ["nesterov: True here, 1 there"]


def test_a_missing_key_differs_from_every_value() -> None:
    assert differences({}, {"mode": "absent"}) == ["mode: absent here, 'absent' there"]


def test_not_a_number_is_equal_to_itself() -> None:
    assert differences({"lr": math.nan}, {"lr": math.nan}) == []


def test_many_differences_are_cut_short_and_counted() -> None:
    lines = differences(list(range(100)), list(range(1, 101)), lines_max=3)
    assert lines == [
        "[0]: 0 here, 1 there",
        "[1]: 1 here, 2 there",
        "[2]: 2 here, 3 there",
        "... and 97 more",
    ]


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=2),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(values)
def test_nothing_differs_from_itself(value: object) -> None:
    assert differences(value, value) == []


@given(values, values)
def test_different_values_have_a_difference(ours: object, theirs: object) -> None:
    texts = [json.dumps(value, sort_keys=True) for value in (ours, theirs)]
    assert (differences(ours, theirs) == []) is (texts[0] == texts[1])


@pytest.mark.parametrize("groups", [(1, 0), (BUFFER_GROUP, 0), (0, 1, 0)])
def test_tensors_out_of_the_order_of_groups_are_refused(groups: tuple[int, ...]) -> None:
    optimizer = OptimizerSpec("SGD", [{"lr": 0.1}, {"lr": 0.2}])
    with pytest.raises(DataError, match="in the order of groups, buffers last"):
        net(optimizer, groups)


def test_groups_in_order_with_buffers_last_are_accepted() -> None:
    optimizer = OptimizerSpec("SGD", [{"lr": 0.1}, {"lr": 0.2}])
    assert len(net(optimizer, (0, 0, 1, BUFFER_GROUP)).tensors) == 4


def test_a_group_that_the_optimizer_does_not_have_is_refused() -> None:
    with pytest.raises(DataError, match="in group 1 of 1 param groups"):
        net(adamw(), (0, 1))


def test_a_table_that_no_cluster_could_hold_is_refused() -> None:
    side = 1 << 30
    tensor = TensorSpec("vast", [side, side], Dtype.FLOAT32, 0)
    with pytest.raises(DataError, match=f"{side * side} elements, at most {ELEMENTS_MAX}"):
        TableSpec("net", Rule.CONSTANT, Placement.ELEMENTWISE, [tensor], None)


@pytest.mark.parametrize(("shape", "elements"), [([], 1), ([0, 5], 0), ([2, 3, 4], 24)])
def test_a_tensor_has_the_product_of_its_extents(shape: list[int], elements: int) -> None:
    assert TensorSpec("t", shape, Dtype.INT64, 0).elements == elements


@pytest.mark.parametrize(
    ("dtype", "size"), [(Dtype.FLOAT32, 4), (Dtype.BFLOAT16, 2), (Dtype.FLOAT64, 8)]
)
def test_a_dtype_knows_its_size(dtype: Dtype, size: int) -> None:
    assert dtype.itemsize == size
