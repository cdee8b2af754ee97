"""Which mode a script gets, from where, and what is refused by name."""

import math
from typing import Any

import pytest
import torch

import treefold.torch as ps
from tests.support.reference import ReferenceJob
from tests.support.sessions import backward, bare, dataset, joined, loss_of
from treefold.common.config import Settings, load
from treefold.common.errors import ConfigError, UnsupportedError
from treefold.common.spec import SYNC, Compensation, Consistency, ConsistencyKind, Late
from treefold.torch.options import consistency_of

SETTINGS = Settings()


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    """The user's own."""
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, SYNC),
        ("sync", SYNC),
        ("async", Consistency(ConsistencyKind.ASYNC)),
        ("ssp", Consistency(ConsistencyKind.SSP, 4)),
        (ps.SSP(staleness=0), Consistency(ConsistencyKind.SSP, 0)),
        (ps.SSP(7), Consistency(ConsistencyKind.SSP, 7)),
        (ps.Quorum(6), Consistency(ConsistencyKind.QUORUM, quorum=6, grace=0.5)),
        (
            ps.Quorum(8, grace=0, late="drop"),
            Consistency(ConsistencyKind.QUORUM, quorum=8, late=Late.DROP),
        ),
    ],
)
def test_a_mode_has_a_name(value: object, expected: Consistency) -> None:
    assert consistency_of(value, SETTINGS) == expected


def test_a_script_that_says_nothing_gets_the_jobs_mode() -> None:
    settings = load({"consistency": "ssp", "staleness": 2}).settings
    assert consistency_of(None, settings) == Consistency(ConsistencyKind.SSP, 2)
    assert consistency_of("sync", settings) == SYNC
    bounded = load({"consistency": "async", "staleness_max": 3}).settings
    assert consistency_of(None, bounded) == Consistency(ConsistencyKind.ASYNC, staleness_max=3)


@pytest.mark.parametrize("value", ["asynchronous", "SSP", 3, True, ps.SSP])
def test_an_unknown_mode_is_refused_by_name(value: object) -> None:
    with pytest.raises(ConfigError, match=r"it is one of 'sync', 'async', 'ssp', 'quorum'"):
        consistency_of(value, SETTINGS)


@pytest.mark.parametrize(
    "arguments",
    [{"slots": 0}, {"slots": 2.0}, {"slots": True}, {"slots": 2, "grace": -1},
     {"slots": 2, "grace": "0"}, {"slots": 2, "late": "blend"}],
)  # fmt: skip
def test_a_quorum_that_is_none_is_refused_by_name(arguments: dict[str, Any]) -> None:
    *_, (name, value) = arguments.items()
    with pytest.raises(ConfigError, match=f"{name}(=| is ){value!r}"):
        ps.Quorum(**arguments)


def test_a_quorum_of_more_slots_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="a quorum of 9 slots, of which a round has 8"):
        consistency_of(ps.Quorum(9), SETTINGS)
    settings = load({"consistency": "quorum", "quorum": 2, "grace": 1.5, "late": "drop"}).settings
    expected = Consistency(ConsistencyKind.QUORUM, quorum=2, grace=1.5, late=Late.DROP)
    assert consistency_of(None, settings) == expected
    with pytest.raises(ConfigError, match="needs consistency 'async' or 'ssp'"):
        consistency_of("quorum", settings, "lr-staleness")


@pytest.mark.parametrize("staleness", [-1, 1.5, "4", True, 1 << 40])
def test_a_bound_that_is_none_is_refused_by_name(staleness: int) -> None:
    with pytest.raises(ConfigError, match=f"staleness is {staleness!r}"):
        ps.SSP(staleness=staleness)


def test_a_compensation_has_a_name_and_is_refused_where_nothing_is_stale() -> None:
    rule = consistency_of("async", SETTINGS, "lr-staleness")
    assert rule == Consistency(ConsistencyKind.ASYNC, 0, Compensation.LR_STALENESS)
    settings = load({"compensation": "lr-staleness"}).settings
    assert consistency_of("ssp", settings).compensation is Compensation.LR_STALENESS
    assert consistency_of("sync", settings, "none") == SYNC
    for given in (("sync", SETTINGS, "lr-staleness"), ("sync", settings), (None, settings)):
        with pytest.raises(ConfigError, match="needs consistency 'async' or 'ssp'"):
            consistency_of(*given)
    with pytest.raises(ConfigError, match="compensation='lr'; it is one of 'none', 'lr-staleness'"):
        consistency_of("async", SETTINGS, "lr")
    with pytest.raises(ConfigError, match="compensation is 'lr'; it is one of none, lr-staleness"):
        load({"compensation": "lr"})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("momentum", (Compensation.MOMENTUM, 0.0, 0)),
        ("dc-asgd", (Compensation.DC_ASGD, 0.04, 16)),
        ("dc-asgd-adaptive", (Compensation.DC_ASGD_ADAPTIVE, 2.0, 16)),
        (ps.DCASGD(strength=0.5, versions=3), (Compensation.DC_ASGD, 0.5, 3)),
        (ps.DCASGD(adaptive=True), (Compensation.DC_ASGD_ADAPTIVE, 2.0, 16)),
    ],
)
def test_corrections_have_names_and_strengths(
    value: object, expected: tuple[Compensation, float, int]
) -> None:
    found = consistency_of("async", SETTINGS, value)
    assert (found.compensation, found.strength, found.versions) == expected


@pytest.mark.parametrize(
    "arguments",
    [{"strength": -1}, {"strength": "2"}, {"strength": math.nan}, {"versions": 0},
     {"versions": 2.0}, {"versions": 1 << 20}, {"adaptive": 1}],
)  # fmt: skip
def test_a_correction_that_is_none_is_refused_by_name(arguments: dict[str, Any]) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(ConfigError, match=f"{name} is {value!r}"):
        ps.DCASGD(**arguments)


def test_a_momentum_that_is_corrected_has_to_be_there() -> None:
    with joined(ReferenceJob(slots=2)):
        model = bare()
        with pytest.raises(ConfigError, match="needs an optimizer with a momentum above 0"):
            ps.DistributedOptimizer(sgd(model), model, consistency="async", compensation="momentum")


def test_settings_that_are_no_mode_or_bound_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="consistency is 'bsp'; it is sync, async, ssp or quorum"):
        load({"consistency": "bsp"})
    with pytest.raises(ConfigError, match="quorum is 0; with consistency=quorum"):
        load({"consistency": "quorum"})
    with pytest.raises(ConfigError, match="late is 'blend'"):
        load({"late": "blend"})
    with pytest.raises(ConfigError, match="staleness"):
        load({"staleness": -1})


@pytest.mark.parametrize("consistency", ["async", "ssp", ps.SSP(0)])
def test_a_table_is_declared_with_its_mode(consistency: str | ps.SSP) -> None:
    with joined(ReferenceJob(slots=2)):
        model = bare()
        optimizer = ps.DistributedOptimizer(sgd(model), model, consistency=consistency)
        assert optimizer.table.is_asynchronous


def test_tables_have_modes_of_their_own() -> None:
    with joined(ReferenceJob(slots=2)):
        found = [
            ps.DistributedOptimizer(sgd(model), model, consistency=mode).table.is_asynchronous
            for mode, model in (("async", bare()), ("sync", bare()), (ps.SSP(1), bare()))
        ]
    assert found == [True, False, True]


@pytest.mark.parametrize("other", ["sync", "async", ps.Quorum(slots=1)])
def test_beside_a_quorum_other_modes_are_refused_by_name(other: str | ps.Quorum) -> None:
    with joined(ReferenceJob(slots=2)):
        first, second = bare(), bare()
        ps.DistributedOptimizer(sgd(first), first, consistency=ps.Quorum(slots=2))
        with pytest.raises(UnsupportedError, match="table 'model' has consistency 'quorum'"):
            ps.DistributedOptimizer(sgd(second), second, consistency=other)


def test_a_norm_over_all_slots_is_refused_where_there_is_none() -> None:
    with joined(ReferenceJob(slots=2)):
        model = bare()
        ps.DistributedOptimizer(sgd(model), model, consistency="async")
        with pytest.raises(UnsupportedError, match=r"torch.nn.utils.clip_grad_norm_"):
            ps.clip_grad_norm(model.parameters(), 1.0)


def test_a_bound_needs_slots_that_can_move() -> None:
    with joined(ReferenceJob(slots=2)):
        model = bare()
        optimizer = ps.DistributedOptimizer(sgd(model), model, consistency=ps.SSP(1))
        batch = [torch.stack([dataset()[n][0] for n in range(4)]), torch.arange(4) % 3]
        backward(loss_of(model, batch))
        with pytest.raises(UnsupportedError, match=r"needs ps.batches\(\)"):
            optimizer.step()


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_a_bound_in_versions_that_is_none_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ConfigError, match=f"staleness_max is {value!r}"):
        ps.Async(value)


def test_a_bound_in_versions_is_part_of_the_table() -> None:
    with joined(ReferenceJob(slots=2)):
        model = bare()
        optimizer = ps.DistributedOptimizer(sgd(model), model, consistency=ps.Async(3))
        assert optimizer.table.options.consistency.staleness_max == 3


def test_a_bound_in_versions_is_refused_beside_a_synchronous_table_and_with_own_loaders() -> None:
    with joined(ReferenceJob(slots=2)):
        first, second = bare(), bare()
        ps.DistributedOptimizer(sgd(first), first)
        with pytest.raises(UnsupportedError, match="staleness_max needs a job without synchronous"):
            ps.DistributedOptimizer(sgd(second), second, consistency=ps.Async(3))
    with joined(ReferenceJob(slots=2)):
        model = bare()
        optimizer = ps.DistributedOptimizer(sgd(model), model, consistency=ps.Async(3))
        batch = [torch.stack([dataset()[n][0] for n in range(4)]), torch.arange(4) % 3]
        backward(loss_of(model, batch))
        with pytest.raises(UnsupportedError, match=r"staleness_max needs ps.batches\(\)"):
            optimizer.step()
