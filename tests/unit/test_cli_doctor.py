"""``treefold doctor``: each check fails when its matter is broken, and says what to change."""

import errno
import socket
import sys
import tempfile
from pathlib import Path

import pytest

from tests.unit.test_cli_display import document, member
from treefold.cli import checkup, doctor, machine
from treefold.cli.checks import CheckError
from treefold.common.config import Settings
from treefold.common.errors import CapacityError
from treefold.common.host import memory_free_bytes
from treefold.launch.link import Status
from treefold.launch.runtime import noted
from treefold.transport import segments
from treefold.wire.words import PROTOCOL_VERSION

GIB = 1 << 30
MS = 1_000_000
FACTS: dict[str, object] = {
    "package": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "files_max": 4096,
    "memory_free_bytes": GIB, "clock_ahead_s": 0.004,
}  # fmt: skip
OWN = {"package": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "files_max": 4096}


def cluster(**changes: object) -> Status:
    """A status of two members, of which ``worker-0`` differs."""
    members = [member("server-0", facts=FACTS), member("worker-0", facts=FACTS | changes)]
    return document(*members, facts=OWN, protocol=PROTOCOL_VERSION)


# ---- this machine --------------------------------------------------------------------------------


def test_this_machine_is_found_fit() -> None:
    assert "ns a reading" in machine.check_clock()
    assert "run" in machine.check_processes()
    assert "memfd" in machine.check_memory(8 * GIB)


def test_a_clock_that_goes_back_is_found() -> None:
    readings = iter([*range(5_000), 3, 4] * 100)
    with pytest.raises(CheckError, match="goes back: choose another clock source"):
        machine.check_clock(lambda: next(readings) % 900)


def test_a_clock_that_stands_still_or_is_slow_is_found() -> None:
    with pytest.raises(CheckError, match="stands still"):
        machine.check_clock(lambda: 7)
    readings = iter(range(0, 1_000_000_000, 20_000))
    with pytest.raises(CheckError, match=r"takes 20 us .*: choose a faster one"):
        machine.check_clock(lambda: next(readings))


def test_a_system_clock_from_before_the_installation_is_found() -> None:
    with pytest.raises(CheckError, match=r"shows 1970-01-01 00:01:40 UTC, before .*chrony"):
        machine.check_clock(wall_s=100.0, installed_s=1e9)


def test_too_few_processes_are_found() -> None:
    with pytest.raises(CheckError, match=r"64 processes .*ulimit -u 512 \(the hard limit is 128\)"):
        machine.check_processes((64, 128))


def test_little_memory_is_found() -> None:
    with pytest.raises(CheckError, match=r"100 MiB of memory are left.*memory limit"):
        machine.check_memory(100 << 20)


def test_a_machine_without_shared_memory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, nbytes: int) -> segments.Segment:
        raise CapacityError(f"no memfd for {nbytes} bytes of {name}")

    monkeypatch.setattr(segments, "create", refuse)
    with pytest.raises(CheckError, match=r"no shared memory: no memfd .*--lane socket"):
        machine.check_memory(8 * GIB)


def test_memory_that_a_container_may_use_is_less_than_the_machine_has(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 7\ninactive_file 500000\nactive_file 9\n")
    assert memory_free_bytes(tmp_path) == 2_500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_free_bytes(tmp_path) > 5_000_000
    assert memory_free_bytes(tmp_path / "none") > 5_000_000


def test_who_holds_the_port_of_a_scheduler_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as held:
        address = f"tcp://127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(CheckError, match=rf"{address} is held by process \d+ .*--bind"):
            machine.check_port(address)
        with noted(address):
            assert machine.check_port(address).startswith(f"a scheduler listens at {address}")
    assert machine.check_port(address) == f"{address} is free for a scheduler"


def test_an_address_that_cannot_be_bound_is_said() -> None:
    with pytest.raises(CheckError, match=f"Errno {errno.EADDRNOTAVAIL}.*--bind"):
        machine.check_port("tcp://192.0.2.1:29700")


# ---- a cluster -----------------------------------------------------------------------------------


def test_a_sound_cluster_is_found_sound() -> None:
    status = cluster()
    assert "running, 1 servers and 1 workers" in checkup.reached(status, "tcp://h:1")
    assert "the same on 2 members" in checkup.agreed_versions(status, status.members)
    assert "within 4 ms" in checkup.agreed_clocks(status.members)
    assert "4,096" in checkup.enough_files(status.members)
    assert "1,024 MiB" in checkup.enough_memory(status.members)


@pytest.mark.parametrize(
    ("key", "name"), [("package", "treefold"), ("torch", "torch"), ("python", "Python")]
)
def test_another_version_is_found_with_who_has_it(key: str, name: str) -> None:
    status = cluster(**{key: "9.9"})
    with pytest.raises(CheckError, match=f"(?i){name} is .* but 9.9 on worker-0: install the same"):
        checkup.agreed_versions(status, status.members)


def test_another_protocol_is_found() -> None:
    with pytest.raises(
        CheckError, match=f"speaks protocol 3, this installation {PROTOCOL_VERSION}"
    ):
        checkup.reached(document(protocol=3), "tcp://h:1")


@pytest.mark.parametrize("ahead_s", [-3.0, 1.5])
def test_a_clock_apart_is_found(ahead_s: float) -> None:
    with pytest.raises(CheckError, match=rf"worker-0 by \{ahead_s:+.1f} s: let chrony"):
        checkup.agreed_clocks(cluster(clock_ahead_s=ahead_s).members)


def test_few_files_and_little_memory_of_a_member_are_found() -> None:
    with pytest.raises(CheckError, match="worker-0 256: ulimit -n 1024"):
        checkup.enough_files(cluster(files_max=256).members)
    with pytest.raises(CheckError, match="worker-0 has 10 MiB left: more memory"):
        checkup.enough_memory(cluster(memory_free_bytes=10 << 20).members)


def test_a_member_that_says_nothing_of_itself_is_named() -> None:
    silent = document(member("server-0", facts=FACTS), member("worker-0"))
    with pytest.raises(CheckError, match="worker-0 said nothing of where they run: ask again"):
        checkup.agreed_clocks(silent.members)


def test_slow_ways_are_found() -> None:
    trips_ns = [MS] * 98 + [7 * MS, 50 * MS]
    assert "answers in 1.00 ms (p99 7.00), 900 MB/s there and 80 MB/s back" in checkup.judged(
        trips_ns, 900e6, 80e6
    )
    with pytest.raises(CheckError, match=r"answers in 200\.00 ms .*it is far away"):
        checkup.judged([200 * MS] * 100, 900e6, 80e6)
    with pytest.raises(CheckError, match=r"5 MB/s back .*a slow network"):
        checkup.judged(trips_ns, 900e6, 5e6)


def test_a_scheduler_that_is_not_there_is_the_only_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "ANSWER_MS", 50)
    with socket.create_server(("127.0.0.1", 0)) as held:
        address = f"tcp://127.0.0.1:{held.getsockname()[1]}"
        checks = checkup.cluster_checks(Settings(), address)
        assert list(checks) == ["scheduler"]
        with pytest.raises(CheckError, match=r"no scheduler answered at .*: start it"):
            checks["scheduler"]()


def test_without_its_packages_the_doctor_still_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "treefold.cli.flags", None)
    monkeypatch.setitem(sys.modules, "treefold.cli.machine", None)
    monkeypatch.setattr(doctor, "check_trial", lambda name: name)
    assert doctor.main([]) == 1
    assert "clock" in capsys.readouterr().out.partition("FAIL")[2].partition("install what is")[0]
