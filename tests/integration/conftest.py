"""Fixtures of the tests that start real processes."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.processes import Bits, Cluster, Starter, bits_alone


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
    """Makes a cluster with a ledger; its keywords are settings and the fields of `Cluster`."""

    def make(servers: int = 1, workers: int = 1, **settings: object) -> Cluster:
        fields = {
            name: settings.pop(name)
            for name in ("server_faults", "scheduler_faults", "is_forked")
            if name in settings
        }
        sizes: dict[str, object] = {"servers": servers, "workers": workers}
        ledger: dict[str, object] = {"ledger": str(tmp_path / "ledger")}
        return Cluster(starter, ledger | sizes | settings, **fields)

    return make


@pytest.fixture(scope="session")
def alone(starter: Starter, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bits]:
    """The bits of an undisturbed job in one process; every job is run once and remembered."""

    @cache
    def run(script: str, *arguments: str) -> Bits:
        folder = tmp_path_factory.mktemp("alone")
        return bits_alone(starter, folder, script, *arguments)

    return run
