"""The simulator looks: bugs that are planted in the cores are found."""

from concurrent.futures import Future, ProcessPoolExecutor

import pytest

from tests.sim import (
    found,
    planted,
    planted_apart,
    planted_chains,
    planted_clocks,
    planted_parts,
    planted_quorum,
    planted_saves,
    planted_streams,
)
from tests.sim.planting import PLANTED
from tests.sim.runs import each
from tests.sim.scenario import Theme
from tests.sim.world import Violation

SEEDS_MAX = 150
TRIED = "test_a_planted_bug_is_found"
MODULES = (
    found,
    planted,
    planted_apart,
    planted_chains,
    planted_clocks,
    planted_parts,
    planted_quorum,
    planted_saves,
    planted_streams,
)  # importing them has filled `PLANTED`


def run_seeds(theme: Theme, count: int, first: int = 0) -> None:
    """Run so many seeds of a theme."""
    for _ in each(range(first, first + count), theme):
        pass


def is_found(name: str) -> bool:
    """Whether seeds of a bug's theme break a promise where it is planted."""
    bug, theme, first = PLANTED[name]
    with pytest.MonkeyPatch.context() as patch:
        bug(patch)
        try:
            run_seeds(theme, SEEDS_MAX, first)
        except Violation:
            return True
    return False


@pytest.fixture(scope="module")
def verdicts(
    request: pytest.FixtureRequest, pool: ProcessPoolExecutor
) -> dict[str, "Future[bool]"]:
    """What comes of every bug that is to be tried, all of them on their way at once."""
    names = [
        str(item.callspec.params["name"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == TRIED
    ]
    return {name: pool.submit(is_found, name) for name in names}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found(name: str, verdicts: dict[str, "Future[bool]"]) -> None:
    assert verdicts[name].result()


@pytest.mark.parametrize("theme", Theme)
def test_the_same_seeds_find_nothing_where_nothing_is_planted(theme: Theme) -> None:
    run_seeds(theme, SEEDS_MAX // 5)
