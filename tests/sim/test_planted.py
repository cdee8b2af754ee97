"""The simulator looks: bugs that are planted in the cores are found."""

import pytest

from tests.sim.cluster import simulate
from tests.sim.planted import PLANTED
from tests.sim.scenario import draw
from tests.sim.world import Violation

SEEDS_MAX = 150


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bug, theme = PLANTED[name]
    bug(monkeypatch)
    with pytest.raises(Violation):
        for seed in range(SEEDS_MAX):
            simulate(draw(seed, theme))
