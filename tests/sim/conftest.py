"""Options of the simulator, beside ``--seeds N`` of all tests."""

import gc

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare ``--first-seed``; it is known when this folder is named on the command line."""
    group = parser.getgroup("treefold")
    group.addoption("--first-seed", type=int, default=0, help="where the simulator's seeds begin")


@pytest.fixture(scope="session")
def seeds(pytestconfig: pytest.Config) -> range:
    """The seeds that the simulator is to run."""
    gc.freeze()  # what torch imported need not be looked at again and again: a tenth of the time
    first = int(pytestconfig.getoption("--first-seed", 0))
    return range(first, first + int(pytestconfig.getoption("--seeds")))
