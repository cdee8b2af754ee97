"""Planted bugs are looked for, each by seeds of the kind that meets it."""

from importlib import import_module

import pytest

from tests.sim.planting import PLANTED
from tests.sim.runs import each
from tests.sim.scenario import Theme
from tests.sim.world import Violation

SEEDS_MAX = 150
KINDS = (
    "", "_apart", "_beside", "_chains", "_clocks", "_guarded", "_parts", "_quorum", "_saves",
    "_streams",
)  # fmt: skip
for _module in ("found", *(f"planted{kind}" for kind in KINDS)):
    import_module(f"tests.sim.{_module}")  # which fills `PLANTED`
NAMES = list(PLANTED)


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
