"""The simulator looks: bugs that are planted in the cores are found."""

import pytest
from tests.sim.cluster import simulate
from tests.sim.planted import PLANTED
from tests.sim.scenario import draw
from tests.sim.world import Violation

SEEDS_MAX = 120
RARE = {
    "earlier_leases_of_the_dead_stay": 708,
}
"""Bugs that need more luck than `SEEDS_MAX` seeds have, and a seed that finds each."""


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTED[name](monkeypatch)
    seeds = [RARE[name]] if name in RARE else range(SEEDS_MAX)
    with pytest.raises(Violation):
        for seed in seeds:
            simulate(draw(seed))


def test_a_rare_seed_finds_nothing_without_its_bug() -> None:
    for seed in RARE.values():
        simulate(draw(seed))
