"""Options of the simulator, beside ``--seeds N`` of all tests, and its line in their summary."""

import gc
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.sim.runs import PROCESSORS, TALLY


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare ``--first-seed``; it is known when this folder is named on the command line."""
    group = parser.getgroup("treefold")
    group.addoption("--first-seed", type=int, default=0, help="where the simulator's seeds begin")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say what the simulator has been through."""
    if TALLY in config.stash:
        terminalreporter.section("simulator")
        terminalreporter.line(config.stash[TALLY].line())


@pytest.fixture(scope="session")
def seeds(pytestconfig: pytest.Config) -> range:
    """The seeds that the simulator is to run."""
    gc.freeze()  # what torch imported need not be looked at again and again
    first = int(pytestconfig.getoption("--first-seed", 0))
    return range(first, first + int(pytestconfig.getoption("--seeds")))


@pytest.fixture(scope="session")
def pool() -> Iterator[ProcessPoolExecutor]:
    """A process for each processor; a seed does not know which one runs it."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSORS, context) as executor:
        yield executor
