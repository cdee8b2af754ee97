"""What users choose for gradients that are not what they should be, and what is refused by name."""

from typing import Any

import pytest
import torch

import treefold.torch as ps
from tests.support.reference import ReferenceJob
from tests.support.sessions import bare, joined
from treefold.common.config import Settings, load
from treefold.common.errors import ConfigError, UnsupportedError
from treefold.common.spec import UNGUARDED, Aggregation, Guard, HealthPolicy
from treefold.torch.health import guard_of

SETTINGS = Settings()


@pytest.mark.parametrize(
    ("health", "aggregation", "expected"),
    [
        (None, None, UNGUARDED),
        ("off", "mean", UNGUARDED),
        ("warn", None, Guard(HealthPolicy.WARN)),
        ("skip-round", None, Guard(HealthPolicy.SKIP_ROUND)),
        (ps.Health(), None, Guard(HealthPolicy.REJECT)),
        (ps.Health("clip", 6, 100, 10), None, Guard(HealthPolicy.CLIP, 6.0, 100, 10)),
        (None, "median", Guard(aggregation=Aggregation.MEDIAN)),
        (None, ps.TrimmedMean(0.2), Guard(aggregation=Aggregation.TRIMMED_MEAN, share=0.2)),
        (None, ps.Krum(2), Guard(aggregation=Aggregation.KRUM, byzantine=2)),
        (
            "reject",
            ps.CenteredClipping(2, 5),
            Guard(
                HealthPolicy.REJECT,
                aggregation=Aggregation.CENTERED_CLIPPING,
                radius=2.0,
                iterations=5,
            ),
        ),
    ],
)
def test_a_choice_is_a_guard(health: object, aggregation: object, expected: Guard) -> None:
    assert guard_of(health, aggregation, SETTINGS) == expected


def test_a_script_that_says_nothing_gets_the_jobs_policy() -> None:
    settings = load({"health": "clip"}).settings
    assert guard_of(None, None, settings).policy is HealthPolicy.CLIP
    assert guard_of("off", None, settings) == UNGUARDED
    with pytest.raises(ConfigError, match="health is 'repair'; it is one of off, warn, reject"):
        load({"health": "repair"})


@pytest.mark.parametrize(
    ("make", "arguments", "text"),
    [
        (ps.Health, {"policy": "repair"}, "health policy 'repair'; it is one of 'off', 'warn'"),
        (ps.Health, {"band": 0}, "band is 0; it is a number above 0"),
        (ps.Health, {"band": "8"}, "band is '8'"),
        (ps.Health, {"window": 0}, "window is 0; it is a whole number from 1 to 4096"),
        (ps.Health, {"window": 10}, "warmup is 32; it is a whole number from 1 to 10"),
        (ps.Health, {"warmup": True}, "warmup is True"),
        (ps.TrimmedMean, {"share": 0.5}, "a trimmed mean of share=0.5; it is above 0 and below"),
        (ps.TrimmedMean, {"share": 0}, "share=0"),
        (ps.Krum, {"byzantine": -1}, "byzantine is -1; it is a whole number from 0"),
        (ps.CenteredClipping, {"radius": 0}, "radius is 0; it is a finite number above 0, or None"),
        (ps.CenteredClipping, {"iterations": 0}, "iterations is 0; it is a whole number from 1"),
    ],
)
def test_a_wrong_value_is_refused_by_name(make: Any, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make(**arguments)
    assert text in str(refused.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"health": "repair"}, "health policy 'repair'"),
        ({"health": 8}, "health=8; it is one of 'off', 'warn'"),
        ({"aggregation": "krum"}, "aggregation='krum'; it is 'mean', 'median', ps.TrimmedMean"),
        ({"aggregation": ps.Krum}, "aggregation=<class"),
        ({"health": "warn", "consistency": "async"}, "this table is 'async'"),
        ({"health": "warn", "consistency": ps.SSP(2)}, "this table is 'ssp'"),
        ({"aggregation": "median", "consistency": ps.Quorum(2)}, "this table is 'quorum'"),
        ({"health": "reject", "buffers": "slot0"}, "buffers='slot0' needs slot 0 in every round"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(options: Any, text: str) -> None:
    with joined(ReferenceJob(slots=2)):
        model = bare()
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises((ConfigError, UnsupportedError)) as refused:
            ps.DistributedOptimizer(inner, model, **options)
    assert text in str(refused.value)
