"""Options and fixtures of all tests.

``--data DIR`` (or ``TREEFOLD_TEST_DATA``) names a folder with the IDX files of Fashion-MNIST, such
as Debian's package dataset-fashion-mnist installs; tests marked ``data`` are skipped without it.
``--seeds N`` says how many seeds the simulator runs, ``--headers N`` how many headers the decoder
gets, ``--kills N`` how many processes the storm kills, ``--partitions=full`` that every pair of
processes is cut off for every time, which takes half an hour. ``--engine DIR`` (or
``TREEFOLD_TEST_ENGINE``) names the folder of a container engine (`tests.support.engine`).

What tests measured, and what could not be run, is told in the last lines.
"""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

# Settings of the person who runs the tests must not change what they find.
for _name in [name for name in os.environ if name.startswith("TREEFOLD_")]:
    if not _name.startswith("TREEFOLD_TEST_"):
        del os.environ[_name]

torch.set_num_threads(1)

MEASURED = pytest.StashKey[list[str]]()
NOT_RUN = "NOT RUN"  # in the reason of a skip that is to be told loudly

# The same examples in every run: a red run is red again when somebody looks into it.
hypothesis.settings.register_profile("treefold", deadline=None, derandomize=True)
hypothesis.settings.load_profile("treefold")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    group = parser.getgroup("treefold")
    group.addoption("--data", default=None, metavar="DIR", help="folder of the Fashion-MNIST files")
    group.addoption("--seeds", type=int, default=200, help="seeds that the simulator runs")
    group.addoption("--kills", type=int, default=20, help="processes that the storm kills")
    group.addoption(
        "--partitions",
        choices=("chosen", "full"),
        default="chosen",
        help="cuts of the network: all pairs for 1 s and a few for longer, or all for 1, 10, 40 s",
    )
    group.addoption(
        "--engine",
        default=os.environ.get("TREEFOLD_TEST_ENGINE"),
        metavar="DIR",
        help="folder of the container engine that `python -m tests.support.engine DIR` prepared",
    )
    group.addoption(
        "--headers", type=int, default=1_000_000, help="mutated headers that the decoder is given"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell what tests measured, and loudly what was not run although it should be."""
    reasons = [str(one.longrepr[2]) for one in terminalreporter.stats.get("skipped", [])]
    missed = list(dict.fromkeys(reason for reason in reasons if NOT_RUN in reason))
    lines = [*terminalreporter.config.stash.get(MEASURED, []), *missed]
    if lines:
        terminalreporter.section("measured, and not run" if missed else "measured")
    for line in lines:
        terminalreporter.line(line, red=line in missed, bold=line in missed)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run."""
    reasons = {}
    if _data_folder(config) is None:
        reasons["data"] = "no data folder: pass --data DIR or set TREEFOLD_TEST_DATA"
    if not torch.cuda.is_available():
        reasons["gpu"] = "no accelerator"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def data_dir(pytestconfig: pytest.Config) -> Path:
    """Folder with the IDX files of Fashion-MNIST; tests that use it are marked ``data``."""
    folder = _data_folder(pytestconfig)
    assert folder is not None, "a test that uses data_dir must be marked data"
    return folder


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> list[str]:
    """Lines that are told at the end of the run."""
    return pytestconfig.stash.setdefault(MEASURED, [])


@pytest.fixture(scope="session")
def seeds(pytestconfig: pytest.Config) -> range:
    """The seeds that the simulator is to run."""
    return range(int(pytestconfig.getoption("--seeds")))


@pytest.fixture(scope="session")
def kills(pytestconfig: pytest.Config) -> int:
    """How many processes the storm is to kill."""
    return int(pytestconfig.getoption("--kills"))


@pytest.fixture(scope="session")
def headers(pytestconfig: pytest.Config) -> int:
    """How many headers the decoder is to be given."""
    return int(pytestconfig.getoption("--headers"))


def _data_folder(config: pytest.Config) -> Path | None:
    given = config.getoption("--data") or os.environ.get("TREEFOLD_TEST_DATA", "")
    if not given:
        return None
    folder = Path(given)
    if not (folder / "train-images-idx3-ubyte.gz").is_file():
        message = f"{folder} has no train-images-idx3-ubyte.gz: not the Fashion-MNIST folder"
        raise pytest.UsageError(message)
    return folder
