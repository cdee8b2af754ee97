"""What servers make of stale contributions: hyper-parameters and corrected gradients."""

import pytest
import torch

from tests.unit.shard_jobs import make_spec
from treefold.common import layout
from treefold.common.layout import ShardSpan
from treefold.common.spec import (
    BUFFER_GROUP,
    Compensation,
    Consistency,
    ConsistencyKind,
    Hyper,
    TableSpec,
)
from treefold.server.compensation import MEMORY, StalenessMean, compensated
from treefold.server.delays import DECAY, EPSILON, Delays
from treefold.server.shard import FoldedPart, ShardState

GROUPS: list[Hyper] = [{"lr": 0.5, "momentum": 0.9}]
RATE = 0.25
PLAIN: Hyper = {"lr": RATE}


@pytest.mark.parametrize(
    ("rule", "stale", "mean", "expected"),
    [
        (Compensation.NONE, 7, 7.0, {"lr": 0.5, "momentum": 0.9}),
        (Compensation.LR_STALENESS, 1, 7.0, {"lr": 0.5, "momentum": 0.9}),
        (Compensation.LR_STALENESS, 4, 7.0, {"lr": 0.125, "momentum": 0.9}),
        (Compensation.DC_ASGD, 4, 7.0, {"lr": 0.5, "momentum": 0.9}),
        (Compensation.MOMENTUM, 4, 0.0, {"lr": 0.5, "momentum": 0.9}),
        (Compensation.MOMENTUM, 0, 1.0, {"lr": 0.5, "momentum": 0.4}),
        (Compensation.MOMENTUM, 0, 15.0, {"lr": 0.5, "momentum": 0.0}),
    ],
)
def test_hyper_parameters_of_a_stale_contribution(
    rule: Compensation, stale: int, mean: float, expected: Hyper
) -> None:
    (found,) = compensated(rule, GROUPS, stale, mean)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("group", [{"lr": 0.5}, {"lr": 0.5, "momentum": 0.0}])
def test_a_group_without_momentum_stays_as_it_is(group: Hyper) -> None:
    assert compensated(Compensation.MOMENTUM, [group], 3, 3.0) == [group]


def test_the_mean_staleness_is_of_the_last_contributions() -> None:
    mean = StalenessMean()
    for stale in (0, 1, 2, 5):
        mean.add(stale)
    assert mean.value == pytest.approx(2.0)
    for _ in range(10 * MEMORY):
        mean.add(7)
    assert mean.value == pytest.approx(7.0, abs=0.01)


class _Shard:
    """A shard of two parts, the second of which ends with a buffer, and what moves it."""

    def __init__(self, rule: Consistency) -> None:
        self.spec: TableSpec = make_spec("SGD", [PLAIN], [([6], 0), ([2], BUFFER_GROUP)])
        self.state = ShardState(self.spec, ShardSpan(0, 2))
        self.initial = torch.arange(8.0) / 8
        for part, (start, stop) in enumerate(self.state.parts):
            self.state.initialize(part, self.initial[start:stop].clone())
        self.delays = Delays(self.state, rule)
        self.version = 0

    def step(self, gradient: torch.Tensor) -> None:
        """Make a version."""
        folded = []
        for part, (start, stop) in enumerate(self.state.parts):
            self.delays.keep(part, self.version)
            folded.append(FoldedPart(part, gradient[start:stop].clone(), b"\0"))
        self.state.step(folded, [PLAIN])
        self.version += 1

    def corrected(self, gradient: torch.Tensor, base: int, active: int = 1) -> torch.Tensor:
        """A contribution as it is applied."""
        found = gradient.clone()
        for part, (start, stop) in enumerate(self.state.parts):
            self.delays.correct(part, found[start:stop], base, active)
        return found

    @property
    def values(self) -> torch.Tensor:
        """The newest values."""
        return torch.cat([self.state.values(part) for part in range(len(self.state.parts))])


@pytest.fixture
def rule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Consistency:
    """Of parts of four elements each."""
    monkeypatch.setattr(layout, "BLOCK_ELEMENTS", 4)
    monkeypatch.setattr(layout, "PART_BLOCKS_MAX", 1)
    return Consistency(ConsistencyKind.ASYNC, 0, request.param, 0.5, 2)


@pytest.mark.parametrize("rule", [Compensation.DC_ASGD], indirect=True)
@pytest.mark.parametrize("active", [1, 4])
def test_a_stale_gradient_is_corrected_by_what_has_moved(rule: Consistency, active: int) -> None:
    shard = _Shard(rule)
    shard.step(torch.full((8,), 1.0))
    shard.step(torch.full((8,), 3.0))
    whole = torch.tensor([1.0, -2.0, 0.5, -0.0, 3.0, 0.25, 9.0, 9.0])
    wanted = whole.clone()
    wanted[:6] += 0.5 * whole[:6].square() * (shard.values - shard.initial)[:6]
    found = shard.corrected(whole / active, 0, active)
    torch.testing.assert_close(found * active, wanted)
    assert torch.signbit(found[3]), "what has no gradient gets none"
    assert torch.equal(shard.corrected(whole, 2), whole), "nothing has moved since"


@pytest.mark.parametrize("rule", [Compensation.DC_ASGD], indirect=True)
def test_what_is_older_than_anything_that_is_kept_counts_as_the_oldest(rule: Consistency) -> None:
    shard = _Shard(rule)
    for _ in range(4):
        shard.step(torch.ones(8))
    whole = torch.ones(8)
    assert torch.equal(shard.corrected(whole, 0), shard.corrected(whole, 2))
    assert not torch.equal(shard.corrected(whole, 2), shard.corrected(whole, 3))
    assert torch.equal(_Shard(rule).corrected(whole, 0), whole), "nothing is kept yet"


@pytest.mark.parametrize("rule", [Compensation.DC_ASGD_ADAPTIVE], indirect=True)
@pytest.mark.parametrize("active", [1, 4])
def test_an_adaptive_correction_is_less_where_gradients_are_large(
    rule: Consistency, active: int
) -> None:
    shard = _Shard(rule)
    shard.step(torch.ones(8))
    moved = (shard.values - shard.initial)[:6]
    mean = torch.zeros(6)
    for whole in (torch.arange(1.0, 9.0), torch.arange(-8.0, 0.0)):
        squares = whole[:6].square()
        mean = DECAY * mean + (1 - DECAY) * squares
        wanted = whole.clone()
        wanted[:6] += 0.5 / (mean + EPSILON).sqrt() * squares * moved
        found = shard.corrected(whole / active, 0, active)
        torch.testing.assert_close(found * active, wanted)
