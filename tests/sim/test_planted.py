"""The simulator looks: bugs that are planted in the cores are found."""

import pytest

from tests.sim.background import Background
from tests.sim.hunts import NAMES, SEEDS_MAX, run_seeds
from tests.sim.scenario import Theme


@pytest.mark.parametrize("name", NAMES)
def test_a_planted_bug_is_found(name: str, background: Background) -> None:
    assert background.is_found(name)


@pytest.mark.parametrize("theme", Theme)
def test_the_same_seeds_find_nothing_where_nothing_is_planted(theme: Theme) -> None:
    run_seeds(theme, SEEDS_MAX // 5)
