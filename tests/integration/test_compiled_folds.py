"""Servers whose folds are compiled, with real processes: the bits of those whose are not."""

from collections.abc import Callable

import pytest

from tests.support.processes import Bits, Cluster

JOB = "streaming.py"
SLOTS = "slots=2"  # one of each worker, lent with a factor: what is added has to be scaled


@pytest.mark.parametrize("health", ["off", "warn"])
def test_compiled_folds_end_with_the_bits_of_one_process(
    cluster: Callable[..., Cluster], alone: Callable[..., Bits], health: str
) -> None:
    faults = {"server": ["compiled_at_once"]}
    with cluster(2, 2, faults, slots=2, health=health) as job:
        for _ in range(2):
            job.worker(JOB, "--overlap=false")
        assert job.bits() == alone(JOB, SLOTS, "--overlap=false")
        said = [server.all("folds are compiled from now on") for server in job.servers]
    assert all(said), said
