"""How contributions are measured and judged: bands, rules that stand bad ones, and their sums."""

import math
import random

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from treefold.common import blocks, layout
from treefold.common.layout import Layout
from treefold.common.spec import (
    Aggregation,
    Dtype,
    Guard,
    HealthPolicy,
    OptimizerSpec,
    Placement,
    Rule,
    TableSpec,
    TensorSpec,
)
from treefold.scheduler.robust import Fault, Verdict, band_of, judge, remembered
from treefold.server.products import Products, trimmed_mean

REJECT = Guard(HealthPolicy.REJECT, warmup=4)
USUAL = [0.0, 0.1, -0.1, 0.05, -0.05]
"""Logarithms of norms around 1."""


def squares(*norms: float, slots: int) -> list[float]:
    """Sums of squares of what slots send whose gradients have these norms."""
    return [(norm / slots) ** 2 for norm in norms]


def verdict(guard: Guard, *norms: float, usual: list[float] = USUAL) -> Verdict:
    """What counts of a round with gradients of these norms, of as many samples each."""
    slots = len(norms)
    return judge(guard, usual, squares(*norms, slots=slots), [1 / slots] * slots)


# ---- bands ---------------------------------------------------------------------------------------


def test_a_gradient_that_is_too_large_is_left_out_and_the_others_are_a_mean() -> None:
    found = verdict(REJECT, 1.0, 1e3, 1.1, 0.9)
    assert found.faults == {1: Fault.HIGH}
    assert found.coefficients == [1.0, 0.0, 1.0, 1.0]
    assert found.factor == pytest.approx(4 / 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (HealthPolicy.WARN, [1.0, 1.0, 1.0]),
        (HealthPolicy.REJECT, [1.0, 0.0, 1.0]),
        (HealthPolicy.CLIP, [1.0, 0.0, 1.0]),
        (HealthPolicy.SKIP_ROUND, [0.0, 0.0, 0.0]),
    ],
)
def test_what_is_not_finite_is_found_before_there_is_a_band(
    policy: HealthPolicy, kept: list[float], bad: float
) -> None:
    found = judge(Guard(policy), [], [1.0, bad, 1.0], [1 / 3] * 3)
    assert found.faults == {1: Fault.NONFINITE}
    assert found.coefficients == kept
    assert found.is_skipped == (policy is HealthPolicy.SKIP_ROUND)


def test_clipping_ends_at_the_edge_of_the_band() -> None:
    guard = replace(REJECT, policy=HealthPolicy.CLIP)
    band = band_of(guard, USUAL)
    assert band is not None
    found = verdict(guard, 1.0, 1e3)
    assert found.coefficients[1] * 1e3 == pytest.approx(math.exp(band.high))
    assert (found.coefficients[0], found.factor) == (1.0, 1.0)


def test_a_small_gradient_is_counted_and_nothing_else_and_none_at_all_is_nothing() -> None:
    for policy in (HealthPolicy.REJECT, HealthPolicy.CLIP, HealthPolicy.SKIP_ROUND):
        found = verdict(replace(REJECT, policy=policy), 1.0, 1e-3, 0.0)
        assert found == Verdict({1: Fault.LOW}, [1.0, 1.0, 1.0], 1.0, is_skipped=False)


def test_without_a_policy_or_before_the_warmup_there_is_no_band() -> None:
    assert not verdict(Guard(), 1e9, 1.0).faults
    assert not verdict(replace(REJECT, warmup=6), 1e9, 1.0).faults
    assert verdict(replace(REJECT, warmup=5), 1e9, 1.0).faults


def test_a_band_stands_less_than_half_of_its_window_and_follows_more() -> None:
    usual = [*([0.0] * 60), *([20.0] * 40)]
    assert verdict(REJECT, 1.4, 1e9, usual=usual).faults == {1: Fault.HIGH}
    moved = remembered(replace(REJECT, window=100), usual, [20.0] * 70)
    assert len(moved) == 100
    assert not verdict(REJECT, math.exp(20.0), usual=moved).faults
    assert remembered(REJECT, [], [math.nan, -math.inf, 1.0]) == [1.0]


def test_gradients_that_hardly_differ_make_no_band_that_hardly_allows_anything() -> None:
    assert not verdict(REJECT, 1.4, usual=[0.0] * 50).faults
    assert verdict(REJECT, 1.6, usual=[0.0] * 50).faults


def test_a_slot_with_few_samples_is_judged_by_its_gradient_not_by_its_share() -> None:
    found = judge(REJECT, USUAL, [(1.0 * 0.9) ** 2, (1e3 * 0.1) ** 2], [0.9, 0.1])
    assert found.faults == {1: Fault.HIGH}
    assert found.factor == pytest.approx(1 / 0.9)
    assert not judge(REJECT, USUAL, [0.81, 0.01], [0.9, 0.1]).faults


# ---- rules for pairs -----------------------------------------------------------------------------


def gram(rows: Tensor) -> list[float]:
    """Products of rows with themselves and later ones."""
    wide = rows.double()
    upper = torch.triu_indices(len(rows), len(rows))
    return (wide @ wide.T)[upper[0], upper[1]].tolist()


def made(guard: Guard, rows: Tensor) -> Tensor:
    """What a paired rule makes of gradients."""
    slots = len(rows)
    found = judge(guard, [], gram(rows / slots), [1 / slots] * slots)
    weights = torch.tensor(found.coefficients, dtype=torch.float64)
    return weights @ (rows.double() / slots) * found.factor


def honest(slots: int, seed: int) -> Tensor:
    """Gradients around one direction."""
    generator = torch.Generator().manual_seed(seed)
    return torch.ones(50) + 0.3 * torch.randn(slots, 50, generator=generator)


def krum_of(rows: Tensor, byzantine: int) -> int:
    """Krum as the paper has it."""
    distances = torch.cdist(rows.double(), rows.double()) ** 2
    distances.fill_diagonal_(math.inf)
    nearest = distances.sort(dim=1).values[:, : len(rows) - byzantine - 2]
    return int(nearest.sum(dim=1).argmin())


@pytest.mark.parametrize("seed", range(5))
def test_krum_chooses_as_the_paper_says_and_no_bad_one(seed: int) -> None:
    rows = honest(9, seed)
    rows[2], rows[5] = -20 * rows[2], torch.full((50,), 1e9)
    guard = Guard(aggregation=Aggregation.KRUM, byzantine=2)
    expected = krum_of(rows, 2)
    assert expected not in (2, 5)
    assert torch.allclose(made(guard, rows), rows[expected].double())


def test_krum_changes_nothing_where_it_has_too_few_to_choose_from() -> None:
    guard = Guard(aggregation=Aggregation.KRUM, byzantine=1)
    rows = honest(4, 0)
    found = judge(guard, [], gram(rows), [0.25] * 4)
    assert found == Verdict({}, [0.0] * 4, 1.0, is_skipped=True)


def clipped_by_hand(rows: Tensor, radius: float, iterations: int) -> Tensor:
    """Centered clipping of whole vectors."""
    rows = rows.double()
    apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    start = int(apart.sum(dim=1).argmin())
    centre, reach = rows[start], radius or float(apart[start].quantile(0.5))
    for _ in range(iterations):
        away = rows - centre
        scale = (reach / away.norm(dim=1, keepdim=True)).clamp(max=1.0).nan_to_num(0.0)
        centre = centre + (away * scale).mean(dim=0)
    return centre


@pytest.mark.parametrize("radius", [0.0, 0.5, 100.0])
def test_centered_clipping_is_what_it_is_with_whole_vectors(radius: float) -> None:
    rows = honest(8, 3)
    rows[6] = -30 * rows[6]
    guard = Guard(aggregation=Aggregation.CENTERED_CLIPPING, radius=radius, iterations=3)
    assert torch.allclose(made(guard, rows), clipped_by_hand(rows, radius, 3), atol=1e-9)


def test_one_gradient_alone_is_what_centered_clipping_makes() -> None:
    guard = Guard(aggregation=Aggregation.CENTERED_CLIPPING, iterations=3)
    rows = honest(1, 1)
    assert torch.allclose(made(guard, rows), rows[0].double())


@pytest.mark.parametrize("rule", [Aggregation.KRUM, Aggregation.CENTERED_CLIPPING])
def test_what_is_not_finite_is_left_out_before_pairs_are_compared(rule: Aggregation) -> None:
    guard = Guard(aggregation=rule, byzantine=1, iterations=2)
    rows = honest(6, 2)
    sums = gram(rows)
    for number, (one, other) in enumerate((a, b) for a in range(6) for b in range(a, 6)):
        if 3 in (one, other):
            sums[number] = math.nan
    found = judge(guard, [], sums, [1 / 6] * 6)
    assert found.coefficients[3] == 0.0
    assert any(found.coefficients)
    assert not any(math.isnan(one) for one in found.coefficients)


# ---- rules for coordinates -----------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 20))
def test_a_trimmed_mean_is_that_of_sorted_columns(count: int) -> None:
    rows = torch.randn(count, 300, generator=torch.Generator().manual_seed(count))
    ordered = rows.sort(dim=0).values
    for trimmed in {0, (count - 1) // 3, (count - 1) // 2}:
        expected = ordered[trimmed : count - trimmed].mean(dim=0)
        assert torch.allclose(trimmed_mean([row.clone() for row in rows], trimmed), expected)
    median = Guard(aggregation=Aggregation.MEDIAN).trimmed(count)
    found = trimmed_mean([row.clone() for row in rows], median)
    assert torch.allclose(found, rows.quantile(0.5, dim=0))


def test_a_share_is_rounded_up_and_a_round_with_nothing_left_changes_nothing() -> None:
    guard = Guard(aggregation=Aggregation.TRIMMED_MEAN, share=0.2)
    assert [guard.trimmed(count) for count in (8, 5, 3, 2)] == [2, 1, 1, 1]
    exact = [replace(guard, share=n / 100).trimmed(100) for n in range(1, 50)]
    assert exact == list(range(1, 50))
    assert verdict(guard, 1.0, 1.0, 1.0).coefficients == [1.0] * 3
    assert verdict(guard, 1.0, 1.0).is_skipped


# ---- sums ----------------------------------------------------------------------------------------


def table(tensors: list[TensorSpec], placement: Placement = Placement.ELEMENTWISE) -> Layout:
    """A table of these tensors."""
    optimizer = OptimizerSpec("SGD", [{"lr": 0.1}])
    return Layout(TableSpec("t", Rule.OPTIMIZER, placement, tensors, optimizer))


def test_sums_have_the_same_bits_on_every_cut() -> None:
    rng = random.Random(5)
    for count in (1, 2, 7, 16, 37):
        rows = [[rng.random() * 10 ** rng.randint(-8, 8), rng.random()] for _ in range(count)]
        found = set()
        for _ in range(20):
            cuts = sorted(rng.sample(range(1, count), min(count - 1, rng.randint(0, 4))))
            nodes = []
            for low, high in zip([0, *cuts], [*cuts, count], strict=True):
                nodes += blocks.of_shard(low, rows[low:high])
            rng.shuffle(nodes)
            found.add(tuple(blocks.of_table(count, nodes) or ()))
        (sums,) = found
        assert sums == pytest.approx([math.fsum(row[n] for row in rows) for n in (0, 1)])


def test_sums_of_which_a_shard_is_missing_are_none() -> None:
    nodes = blocks.of_shard(0, [[1.0]] * 3)
    assert blocks.of_table(4, nodes) is None
    assert blocks.of_table(3, nodes) == [3.0]


TENSORS = [
    TensorSpec("w", [70_000], Dtype.FLOAT32, 0),
    TensorSpec("v", [90_001], Dtype.FLOAT32, 0),
    TensorSpec("mean", [40], Dtype.FLOAT32, -1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_block_of_a_part_has_its_own_sum_whatever_the_part_begins_with(
    dtype: torch.dtype,
) -> None:
    own = table(TENSORS)
    values = torch.randn(own.elements, generator=torch.Generator().manual_seed(1)).to(dtype)
    step = layout.BLOCK_ELEMENTS
    found: dict[int, set[float]] = {}
    for low in range(own.blocks):
        for high in range(low + 1, own.blocks + 1):
            part = low * step, min(high * step, own.elements)
            rows = Products(own).of(part, [values[slice(*part)]])
            for number, (row,) in enumerate(rows):
                found.setdefault(low + number, set()).add(row)
    for number, sums in found.items():
        (one,) = sums
        block = values[number * step : min((number + 1) * step, 160_001)].double()
        assert one == pytest.approx(float(block.square().sum()), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 69_999, 70_000, 160_000, 160_001, 160_040])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(at: int, bad: float) -> None:
    own = table(TENSORS)
    values = torch.ones(own.elements)
    part = 0, own.elements
    whole = Products(own)
    assert all(math.isfinite(row[0]) for row in whole.of(part, [values]))
    values[at] = bad
    sums = [row[0] for row in whole.of(part, [values])]
    assert not math.isfinite(math.fsum(sums))
    other = torch.ones(own.elements)
    pairs = whole.of(part, [other, values])
    assert math.isfinite(math.fsum(row[0] for row in pairs))
    assert not math.isfinite(math.fsum(row[2] for row in pairs))


def test_a_gradient_whose_squares_are_no_float32_is_large_and_finite() -> None:
    own = table(TENSORS)
    values = torch.full((own.elements,), 1e30)
    (total,) = {math.fsum(row[0] for row in Products(own).of((0, own.elements), [values]))}
    assert total == pytest.approx(160_001 * 1e60)


def test_pairs_are_products_and_what_did_not_come_is_zeros() -> None:
    own = table(TENSORS)
    generator = torch.Generator().manual_seed(2)
    one, two = (torch.randn(own.elements, generator=generator) for _ in range(2))
    rows = Products(own).of((0, own.elements), [one, None, two])
    sums = [math.fsum(row[n] for row in rows) for n in range(6)]
    a, b = one[:160_001].double(), two[:160_001].double()
    expected = [float(a @ a), 0.0, float(a @ b), 0.0, 0.0, float(b @ b)]
    assert sums == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_gaps_between_whole_tensors_do_not_count() -> None:
    own = table(TENSORS[:2], Placement.TENSORWISE)
    values = torch.full((own.elements,), math.nan)
    for start, size in zip(own.starts, own.sizes, strict=True):
        values[start : start + size] = 1.0
    rows = Products(own).of((0, own.elements), [values])
    assert math.fsum(row[0] for row in rows) == pytest.approx(160_001)
