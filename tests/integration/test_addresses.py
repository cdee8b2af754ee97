"""Members that are reached by IPv6, at two addresses of one host, by an interface and by a name."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.processes import FINAL, JOBS, QUICK, Bits, Process, Starter
from treefold.common import ledger
from treefold.common.config import environment_of

JOB = "three_tables.py"
SERVERS = {
    "tcp://[::1]:0": r"^server (tcp://\[::1\]:\d+)$",
    "tcp://127.0.0.2:0": r"^server (tcp://127\.0\.0\.2:\d+)$",
    "tcp://lo:0": r"^server (tcp://localhost:\d+)$",
}
"""What each binds, and what it says of itself."""


@pytest.fixture
def start(starter: Starter, tmp_path: Path) -> Callable[..., Process]:
    """Starts a role, or a worker's script, with settings."""
    common = QUICK | {"servers": 3, "workers": 2, "ledger": str(tmp_path), "lane": "socket"}

    def begin(words: list[str], **settings: object) -> Process:
        values = environment_of(common | settings)
        return starter.start(" ".join(words)[-20:], words, values, is_forked=True, place="")

    return begin


def test_members_at_all_kinds_of_addresses_end_with_the_same_bits(
    start: Callable[..., Process], alone: Callable[..., Bits], tmp_path: Path
) -> None:
    role = ["-m", "treefold.cli"]
    scheduler = start([*role, "scheduler"], bind="tcp://[::1]:0")
    there = scheduler.line(r"^scheduler (tcp://\[::1\]:\d+)$")[1]
    servers = []
    for bind, said in SERVERS.items():
        advertise = "tcp://localhost:0" if "lo:" in bind else ""
        server = start([*role, "server"], scheduler=there, bind=bind, advertise=advertise)
        server.line(said)
        servers.append(server)
    workers = [start([str(JOBS / JOB)], scheduler=there) for _ in range(2)]
    everybody = [*workers, *servers, scheduler]
    assert [process.end() for process in everybody] == [0] * len(everybody)
    finals = {worker.line(FINAL)[1] for worker in workers}
    assert Bits(finals.pop(), ledger.state_digest(str(tmp_path))) == alone(JOB, "slots=8")
    assert finals == set()
