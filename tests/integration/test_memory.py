"""How much memory members need beside what they have anyway.

Counted is the largest resident memory of a process as the kernel saw it (``VmHWM``, set back at the
first stop) less what it had there, with interpreter and torch loaded and used. Left out are code
of libraries, and memory that a peer has made and this process only reads: it is counted there.
"""

from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import shared
from tests.support.processes import Cluster, Gate, Process, Starter

MODEL = 4 * 24 * 1024 * (1024 + 1)  # as in `jobs/large.py`: 101 MB
SHARDS = MODEL / 2  # of one server
WORKER_MAX = MODEL + MODEL + 1.2 * MODEL  # model, gradients, segments
SERVER_MAX = SHARDS + 2 * SHARDS + 2.2 * SHARDS  # master, AdamW's state, shards
COUNTED_WITHIN = 2 << 20  # the kernel adds up pages per processor, and tells the sum now and then
FRAME_BYTES = 4 << 20  # of a version that came by a socket, as a job's first one may
SOCKET_REASON = (
    "on the socket lane a version lies in received frames before it is copied into the model, and "
    "pushed gradients lie beside both versions"
)
SERVER_REASON = "a server of 50 MB of shards needs 5.3 times that: not all of it are tensors"
TODAY = {"auto": (3.7 * MODEL, 6.5 * SHARDS), "socket": (5.5 * MODEL, 9.0 * SHARDS)}
"""What workers and servers must not exceed as long as the bounds do not hold everywhere.

On shared memory a server has a whole gradient of its shards once more where the first ones come by
sockets, before it has mapped the workers' memory: about once in fifteen jobs.
"""


class Peaks(NamedTuple):
    """Bytes of every worker and server."""

    workers: list[int]
    servers: list[int]


def status(pid: int, key: str) -> int:
    """A figure of a process in bytes."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    [line] = [line for line in text.splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


def begin(process: Process) -> int:
    """Set the largest resident memory back to what there is now, which is returned, less code."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5", encoding="ascii")
    return status(process.pid, "VmHWM") - status(process.pid, "RssFile")


def peak(process: Process, before: int) -> int:
    """The most that it has had since, without code and without what peers have made."""
    code, foreign = status(process.pid, "RssFile"), shared.foreign_bytes(process.pid)
    return status(process.pid, "VmHWM") - code - before - foreign


@pytest.fixture(scope="module", params=["auto", "socket"])
def lane(request: pytest.FixtureRequest) -> str:
    """How payloads travel."""
    return str(request.param)


@pytest.fixture(scope="module")
def peaks(lane: str, starter: Starter, tmp_path_factory: pytest.TempPathFactory) -> Peaks:
    """The figures of a job with two workers, two servers and two slots."""
    folder = tmp_path_factory.mktemp("memory")
    settings = {
        "servers": 2,
        "workers": 2,
        "slots": 2,
        "lane": lane,
        "bind": f"ipc://{folder}/NAME",
    }
    with (
        Gate(folder / "first") as first,
        Gate(folder / "last") as last,
        Cluster(starter, settings) as job,
    ):
        workers = [job.worker("large.py", str(first.path), str(last.path)) for _ in range(2)]
        for worker in workers:
            worker.line("^before")
        before = {process.name: begin(process) for process in (*job.servers, *workers)}
        first.open()
        for worker in workers:
            worker.line("^after")
        assert all(shared.own(worker.pid) for worker in workers) == (lane == "auto")
        found = [[peak(p, before[p.name]) for p in some] for some in (workers, job.servers)]
        last.open()
        job.end()
    return Peaks(*found)


def of(peaks: Peaks) -> str:
    """The figures for people."""
    workers = ", ".join(f"{bytes_ / MODEL:.2f}" for bytes_ in peaks.workers)
    servers = ", ".join(f"{bytes_ / SHARDS:.2f}" for bytes_ in peaks.servers)
    return f"workers {workers} times the model, servers {servers} times their shards"


def test_a_worker_needs_model_and_gradients_and_little_more(
    peaks: Peaks, lane: str, request: pytest.FixtureRequest
) -> None:
    if lane == "socket":
        request.applymarker(pytest.mark.xfail(reason=SOCKET_REASON))
    # The first gradients travel as bytes where a server answers late that it has mapped their
    # memory; that is seen in one of the two now and then, and bounded below.
    assert min(peaks.workers) <= WORKER_MAX + COUNTED_WITHIN + FRAME_BYTES, of(peaks)


def test_a_server_needs_master_and_state_and_two_versions_of_its_shards(
    peaks: Peaks, lane: str, request: pytest.FixtureRequest
) -> None:
    reason = SOCKET_REASON if lane == "socket" else SERVER_REASON
    request.applymarker(pytest.mark.xfail(reason=reason, strict=lane == "socket"))
    assert max(peaks.servers) <= SERVER_MAX, of(peaks)


def test_members_need_no_more_memory_than_they_did(peaks: Peaks, lane: str) -> None:
    assert min(peaks.workers) > 2 * MODEL, of(peaks)
    assert min(peaks.servers) > 3 * SHARDS, of(peaks)
    worker_max, server_max = TODAY[lane]
    assert max(peaks.workers) <= worker_max, of(peaks)
    assert max(peaks.servers) <= server_max, of(peaks)
