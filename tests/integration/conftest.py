"""Fixtures of the tests that start real processes."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

from tests.support.netns import Network
from tests.support.processes import Bits, Cluster, Gate, Starter, bits_alone


@pytest.fixture(scope="session")
def starter() -> Iterator[Starter]:
    """What all processes are forked from; when it closes, none of them may be left."""
    started = Starter()
    yield started
    left = started.left()
    started.close()
    assert left == [], "processes were left behind"


@pytest.fixture
def cluster(starter: Starter, tmp_path: Path) -> Callable[..., Cluster]:
    """Makes a cluster with a ledger; its other keywords are settings."""

    def make(
        servers: int,
        workers: int,
        faults: Mapping[str, list[str]] | None = None,
        is_forked: bool = True,
        network: Network | None = None,
        **settings: object,
    ) -> Cluster:
        fixed: dict[str, object] = {"servers": servers, "workers": workers}
        fixed["ledger"] = str(tmp_path / "ledger")
        return Cluster(starter, fixed | settings, faults or {}, is_forked, network=network)

    return make


@pytest.fixture(scope="session")
def alone(starter: Starter, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bits]:
    """The bits of an undisturbed job in one process; every job is run once and remembered."""

    @cache
    def run(script: str, *arguments: str) -> Bits:
        folder = tmp_path_factory.mktemp("alone")
        return bits_alone(starter, folder, script, *arguments)

    return run


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """Where workers can be made to wait."""
    with Gate(tmp_path / "gate") as made:
        yield made
