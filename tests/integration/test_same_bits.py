"""One job, many clusters of real processes: parameters, buffers and optimizer state are the same.

The job has AdamW with a limit for the norm and a schedule, SGD with momentum and Adagrad, BatchNorm
and dropout, and a last round of an epoch in which not every slot takes part.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.processes import Bits, Cluster

JOB = "three_tables.py"
GRID = [(8, 1, 1), (8, 2, 2), (8, 3, 4), (5, 2, 3), (2, 1, 3), (1, 2, 1)]
"""Slots, servers, workers."""


@pytest.fixture(params=["shared", "ipc", "tcp"])
def lane(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, object]:
    """Settings for every way that payloads can go."""
    if request.param == "shared":
        return {"lane": "auto"}
    bind = f"ipc://{tmp_path}/NAME" if request.param == "ipc" else "tcp://127.0.0.1:0"
    return {"lane": "socket", "bind": bind}


@pytest.mark.parametrize("point", GRID, ids=str)
def test_any_cluster_of_processes_ends_with_the_bits_of_one_process(
    cluster: Callable[..., Cluster],
    alone: Callable[..., Bits],
    lane: dict[str, object],
    point: tuple[int, int, int],
) -> None:
    slots, servers, workers = point
    with cluster(servers, workers, slots=slots, **lane) as job:
        for _ in range(workers):
            job.worker(JOB)
        assert job.bits() == alone(JOB, f"slots={slots}")


@pytest.mark.parametrize("settings", [{"lane_bytes_max": 0}, {"lane_bytes_max": 200_000}])
def test_a_lane_for_nothing_or_for_some_tensors_gives_the_same_bits(
    cluster: Callable[..., Cluster], alone: Callable[..., Bits], settings: dict[str, object]
) -> None:
    with cluster(2, 3, **settings) as job:
        for _ in range(3):
            job.worker(JOB)
        assert job.bits() == alone(JOB, "slots=8")


def test_roles_that_are_new_interpreters_end_with_the_same_bits_too(
    cluster: Callable[..., Cluster], alone: Callable[..., Bits]
) -> None:
    with cluster(1, 2, is_forked=False) as job:
        job.worker(JOB)
        job.worker(JOB)
        assert job.bits() == alone(JOB, "slots=8")


def test_another_number_of_slots_gives_other_bits(alone: Callable[..., Bits]) -> None:
    ends = [alone(JOB, f"slots={slots}") for slots in (8, 5, 2, 1)]
    assert len({end.final for end in ends}) == len({end.state for end in ends}) == len(ends)


def test_servers_that_fold_in_the_order_of_arrival_give_other_bits(
    cluster: Callable[..., Cluster], alone: Callable[..., Bits]
) -> None:
    with cluster(1, 3, faults={"server": ["arrival_order"]}) as job:
        for _ in range(3):
            job.worker(JOB)
        found = job.bits()
    assert found.final != alone(JOB, "slots=8").final
    assert found.state != alone(JOB, "slots=8").state
