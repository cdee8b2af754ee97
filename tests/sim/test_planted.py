"""The simulator looks: bugs that are planted in the cores are found."""

import pytest

from tests.sim import found, planted, planted_parts
from tests.sim.cluster import simulate
from tests.sim.planting import PLANTED
from tests.sim.scenario import Theme, draw
from tests.sim.world import Violation

SEEDS_MAX = 150
MODULES = (found, planted, planted_parts)  # importing them has filled `PLANTED`


def run_seeds(theme: Theme, count: int) -> None:
    """Run so many seeds of a theme."""
    for seed in range(count):
        simulate(draw(seed, theme))


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bug, theme = PLANTED[name]
    bug(monkeypatch)
    with pytest.raises(Violation):
        run_seeds(theme, SEEDS_MAX)


@pytest.mark.parametrize("theme", Theme)
def test_the_same_seeds_find_nothing_where_nothing_is_planted(theme: Theme) -> None:
    run_seeds(theme, SEEDS_MAX // 5)
