"""Loop bodies that compute with parameters where servers keep them: the same bits, and really."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.test_memory import MODEL
from tests.support.processes import Bits, Cluster, Gate

JOB = "streaming.py"
SLOTS = "slots=4"


@pytest.mark.parametrize(("servers", "workers"), [(1, 1), (3, 2)])
def test_parameters_used_in_place_have_the_bits_of_one_process(
    cluster: Callable[..., Cluster], alone: Callable[..., Bits], servers: int, workers: int
) -> None:
    with cluster(servers, workers, slots=4) as job:
        found = [job.worker(JOB, "--in-place") for _ in range(workers)]
        assert job.bits() == alone(JOB, SLOTS, "--overlap=false")
        places = [int(worker.line(r"^places (\d+)$")[1]) for worker in found]
    assert max(places) >= 2, places  # the two buffers of a server


def test_on_sockets_they_are_copied(
    cluster: Callable[..., Cluster], alone: Callable[..., Bits]
) -> None:
    with cluster(2, 2, slots=4, lane="socket") as job:
        found = [job.worker(JOB, "--in-place", "--overlap=false") for _ in range(2)]
        assert job.bits() == alone(JOB, SLOTS, "--overlap=false")
        assert [int(worker.line(r"^places (\d+)$")[1]) for worker in found] == [1, 1]


def test_a_body_whose_version_is_overwritten_counts_for_nothing(
    cluster: Callable[..., Cluster], alone: Callable[..., Bits], tmp_path: Path
) -> None:
    with cluster(2, 2, slots=4) as job:
        linger = f"--linger={tmp_path / 'lingers'}"
        found = [job.worker(JOB, "--in-place", linger) for _ in range(2)]
        assert job.bits() == alone(JOB, SLOTS, "--overlap=false")
        said = [worker.all("^overwritten$") for worker in found]
    assert sum(map(len, said)) == 1, said


def test_most_of_the_model_takes_no_memory_of_the_worker_then(
    cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    with (
        Gate(tmp_path / "first") as first,
        Gate(tmp_path / "last") as last,
        cluster(2, 2, slots=2) as job,
    ):
        gates = str(first.path), str(last.path)
        copied, in_place = (
            job.worker("large.py", *gates),
            job.worker("large.py", *gates, "--in-place"),
        )
        first.open()
        within = [int(one.line(r"^within (-?\d+)$")[1]) / MODEL for one in (copied, in_place)]
        last.open()
        job.end()
    assert within[0] - within[1] > 0.5, within  # what lies in two shards is copied


def test_whoever_writes_to_a_parameter_is_told_where(
    cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    with cluster(2, 2, slots=4) as job:
        write = f"--write={tmp_path / 'writes'}"
        found = [job.worker(JOB, "--in-place", write) for _ in range(2)]
        ended = {worker.end(): worker for worker in found}
        assert set(ended) == {0, -signal.SIGSEGV}
        assert ended[-signal.SIGSEGV].all(r"line \d+ in write$")
        job.end(ended[-signal.SIGSEGV])


def test_who_is_drained_has_the_parameters_in_memory_of_its_own(
    cluster: Callable[..., Cluster], alone: Callable[..., Bits], tmp_path: Path
) -> None:
    with cluster(2, 2, slots=4) as job:
        drain = f"--drain={tmp_path / 'drained'}"
        found = [job.worker(JOB, "--in-place", drain) for _ in range(2)]
        ended = [worker for worker in found if worker.end() == 0 and worker.all("^before True$")]
        assert len(ended) == 1
        assert ended[0].all("^after False$")
        assert not ended[0].all("^final")
        assert job.bits(ended[0]) == alone(JOB, SLOTS, "--overlap=false")
