"""Narrow types on the wire: real processes on every lane against plain PyTorch that rounds."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.processes import FINAL, JOBS, Cluster, Starter

JOB = "narrow.py"
WIRES = ["bfloat16", "float16", "float32"]


@pytest.fixture(scope="module")
def plain(starter: Starter) -> dict[str, str]:
    """What the job ends with in one process without a cluster, by type."""
    processes = {
        wire: starter.start(wire, [str(JOBS / JOB), wire, "--alone"], {}) for wire in WIRES
    }
    assert [process.end() for process in processes.values()] == [0] * len(WIRES)
    return {wire: process.line(FINAL)[1] for wire, process in processes.items()}


@pytest.mark.parametrize("lane", ["shared", "ipc", "tcp"])
@pytest.mark.parametrize("wire", WIRES)
def test_every_lane_rounds_as_one_process_that_rounds(
    cluster: Callable[..., Cluster], plain: dict[str, str], tmp_path: Path, wire: str, lane: str
) -> None:
    settings = {"slots": 4, "lane": "auto" if lane == "shared" else "socket"}
    if lane == "ipc":
        settings["bind"] = f"ipc://{tmp_path}/NAME"
    with cluster(2, 3, **settings) as job:
        for _ in range(3):
            job.worker(JOB, wire)
        assert job.bits().final == plain[wire]


def test_each_type_ends_with_bits_of_its_own(plain: dict[str, str]) -> None:
    assert len(set(plain.values())) == len(WIRES)
