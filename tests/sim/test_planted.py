"""The simulator looks: bugs that are planted in the cores are found."""

import pytest

from tests.sim import (
    found,
    planted,
    planted_apart,
    planted_chains,
    planted_clocks,
    planted_parts,
    planted_saves,
    planted_streams,
)
from tests.sim.planting import PLANTED
from tests.sim.runs import each
from tests.sim.scenario import Theme
from tests.sim.world import Violation

SEEDS_MAX = 150
MODULES = (
    found,
    planted,
    planted_apart,
    planted_chains,
    planted_clocks,
    planted_parts,
    planted_saves,
    planted_streams,
)  # importing them has filled `PLANTED`


def run_seeds(theme: Theme, count: int, first: int = 0) -> None:
    """Run so many seeds of a theme."""
    for _ in each(range(first, first + count), theme):
        pass


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bug, theme, first = PLANTED[name]
    bug(monkeypatch)
    with pytest.raises(Violation):
        run_seeds(theme, SEEDS_MAX, first)


@pytest.mark.parametrize("theme", Theme)
def test_the_same_seeds_find_nothing_where_nothing_is_planted(theme: Theme) -> None:
    run_seeds(theme, SEEDS_MAX // 5)
