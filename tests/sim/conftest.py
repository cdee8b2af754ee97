"""Options of the simulator, beside ``--seeds N`` of all tests, and its line in their summary."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sim.background import Background
from tests.sim.runs import TALLY

HERE = Path(__file__).parent
BACKGROUND = pytest.StashKey[Background]()
SEEDS, PLANTED = "test_no_seed_breaks_a_promise", "test_a_planted_bug_is_found"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare ``--first-seed``; it is known when this folder is named on the command line."""
    group = parser.getgroup("treefold")
    group.addoption("--first-seed", type=int, default=0, help="where the simulator's seeds begin")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Wait for it last: until then it takes what other tests leave of the processors."""
    items.sort(key=lambda item: HERE in item.path.parents)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin at once with what takes long, while tests of real processes wait for each other."""
    batches = [int(str(value)) for value in _chosen(session, SEEDS, "batch")]
    names = [str(value) for value in _chosen(session, PLANTED, "name")]
    if not (batches or names) or session.config.option.collectonly:
        return
    gc.freeze()  # what torch imported need not be looked at again and again
    first = int(session.config.getoption("--first-seed", 0))
    seeds = range(first, first + int(session.config.getoption("--seeds")))
    session.config.stash[BACKGROUND] = Background(seeds, batches, names)


def _chosen(session: pytest.Session, test: str, parameter: str) -> Iterator[object]:
    for item in session.items:
        if isinstance(item, pytest.Function) and item.originalname == test:
            yield item.callspec.params[parameter]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Leave nothing behind."""
    if BACKGROUND in session.config.stash:
        session.config.stash[BACKGROUND].end()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say what the simulator has been through."""
    if TALLY in config.stash:
        terminalreporter.section("simulator")
        terminalreporter.line(config.stash[TALLY].line())


@pytest.fixture(scope="session")
def background(pytestconfig: pytest.Config) -> Background:
    """What was begun before the first test; now it is waited for."""
    found = pytestconfig.stash[BACKGROUND]
    found.hasten()
    return found
