"""Forward begins while parameters are on their way: with the same bits, and really."""

from collections.abc import Callable

import pytest

from tests.support.processes import Bits, Cluster

JOB = "streaming.py"
ROUNDS_EARLY = [1, 2, 3, 4, 6, 7, 8, 9]  # all but the first of each pass
SLOTS = "slots=4"


@pytest.mark.parametrize("overlap", ["true", "backward", "false"])
@pytest.mark.parametrize("lane", ["auto", "socket"])
def test_every_overlap_ends_with_the_bits_of_one_process(
    cluster: Callable[..., Cluster], alone: Callable[..., Bits], overlap: str, lane: str
) -> None:
    with cluster(2, 2, slots=4, lane=lane) as job:
        for _ in range(2):
            job.worker(JOB, f"--overlap={overlap}")
        assert job.bits() == alone(JOB, SLOTS, "--overlap=false")


@pytest.mark.parametrize(("servers", "workers"), [(1, 1), (1, 3), (3, 2)])
def test_every_cluster_ends_with_the_bits_of_one_process(
    cluster: Callable[..., Cluster], alone: Callable[..., Bits], servers: int, workers: int
) -> None:
    with cluster(servers, workers, slots=4, lane_bytes_per_s=50_000_000) as job:
        for _ in range(workers):
            job.worker(JOB)
        assert job.bits() == alone(JOB, SLOTS, "--overlap=false")


@pytest.mark.parametrize("lane", ["auto", "socket"])
def test_the_first_layer_runs_before_the_second_one_is_there(
    cluster: Callable[..., Cluster], alone: Callable[..., Bits], lane: str
) -> None:
    with cluster(2, 2, slots=4, lane=lane, retry_ms=30) as job:
        workers = [job.worker(JOB, "--withhold") for _ in range(2)]
        assert job.bits() == alone(JOB, SLOTS, "--overlap=false")
        found = [worker.line(r"^early ([\d,]*) lost (\d+)$") for worker in workers]
    early = {int(number) for one in found for number in one[1].split(",") if number}
    assert early == set(ROUNDS_EARLY)
    assert sum(int(one[2]) for one in found) >= len(ROUNDS_EARLY)
