"""The journal gives back what was synced, or says that it cannot. Real files, real processes."""

import errno
import os
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import pytest

from treefold.common.errors import ConfigError, JournalError
from treefold.scheduler import journal as module
from treefold.scheduler.journal import HEADER, Journal, frame, scan

RECORDS = [msgpack.packb(record) for record in ({"view": 1}, [0, 0, 0, 7], "x" * 40, {"view": 2})]
WHOLE = HEADER + b"".join(map(frame, RECORDS))
ENDS = [len(HEADER) + sum(len(frame(r)) for r in RECORDS[:n]) for n in range(len(RECORDS) + 1)]

HOLD = """
import sys
from pathlib import Path
from treefold.scheduler.journal import Journal
journal = Journal(Path(sys.argv[1]))
journal.append(b"\\x01")
print("held", flush=True)
sys.stdin.read()
"""

# Kills itself at the n-th call of those that change the disk, before or after the call.
DIE = """
import os, signal, sys
from pathlib import Path
from treefold.scheduler import journal as module
journal = module.Journal(Path(sys.argv[1]))
left = int(sys.argv[2])
def wrapped(call):
    def step(*args, **kwargs):
        global left
        for action in (lambda: None, lambda: call(*args, **kwargs)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = action()
        return result
    return step
for name in ("open", "write", "fsync", "rename", "close"):
    setattr(os, name, wrapped(getattr(os, name)))
journal.rewrite([b"\\x07", b"\\x08"])
"""


def made(folder: Path, data: bytes = WHOLE) -> Path:
    """A folder with a journal file of these bytes."""
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / "journal").write_bytes(data)
    return folder


def reopened(folder: Path) -> tuple[list[bytes], str]:
    """What the next process finds."""
    journal = Journal(folder)
    journal.close()
    return journal.payloads, journal.torn


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the journal in ``tmp_path`` open."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


# ---- the format ----------------------------------------------------------------------------------


def test_the_layout_is_what_is_documented_and_msgpack_reads_it() -> None:
    assert WHOLE[:8] == b"TFJRNL\x00\x01"
    offset, found = 8, []
    while offset < len(WHOLE):
        length, check = struct.unpack_from(">II", WHOLE, offset)
        payload = WHOLE[offset + 8 : offset + 8 + length]
        assert check == zlib.crc32(WHOLE[offset : offset + 4] + payload)
        found.append(msgpack.unpackb(payload))
        offset += 8 + length
    assert found == [{"view": 1}, [0, 0, 0, 7], "x" * 40, {"view": 2}]
    assert scan(WHOLE) == (RECORDS, len(WHOLE), "")


@pytest.mark.parametrize("size", [0, module.PAYLOAD_BYTES_MAX + 1])
def test_payloads_that_could_not_be_read_back_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="bytes, not"):
        frame(bytes(size))


def test_a_file_cut_at_any_byte_gives_exactly_its_whole_records() -> None:
    for size in range(len(WHOLE)):
        found = scan(WHOLE[:size])
        whole = sum(end <= size for end in ENDS[1:])
        assert found.payloads == RECORDS[:whole]
        if size >= len(HEADER):
            assert found.good_bytes == ENDS[whole]
            cut = size - ENDS[whole]
            assert found.torn == (f"{cut} bytes at offset {ENDS[whole]}" if cut else "")
        else:
            assert found.good_bytes == 0
            assert "the header is not whole" in found.torn


def test_any_flipped_bit_before_the_last_record_is_an_error_and_in_it_a_cut() -> None:
    for bit in range(8 * len(WHOLE)):
        data = bytearray(WHOLE)
        data[bit // 8] ^= 1 << bit % 8
        if bit // 8 >= ENDS[-2]:
            found = scan(bytes(data))
            assert (found.payloads, found.good_bytes) == (RECORDS[:-1], ENDS[-2])
            assert found.torn == f"{len(WHOLE) - ENDS[-2]} bytes at offset {ENDS[-2]}"
        else:
            with pytest.raises(JournalError, match="offset"):
                scan(bytes(data))


@pytest.mark.parametrize("tail", [bytes(5), bytes(4096), b"\xff" * 700, b"\x00\x00\x00\x05junk!"])
def test_zeros_and_garbage_behind_the_last_record_are_cut(tail: bytes) -> None:
    found = scan(WHOLE + tail)
    assert found == (RECORDS, len(WHOLE), f"{len(tail)} bytes at offset {len(WHOLE)}")


def test_damage_names_the_file_the_offset_and_what_to_do(tmp_path: Path) -> None:
    data = bytearray(WHOLE)
    data[ENDS[1] + 1] ^= 0x40  # a length of a million, of the second record
    folder = made(tmp_path / "j", bytes(data))
    wanted = rf"j/journal is damaged.* offset {ENDS[1]} .* offset {ENDS[2]}.*Restore the file"
    with pytest.raises(JournalError, match=wanted):
        Journal(folder)
    assert (folder / "journal").read_bytes() == data, "nothing was changed"
    made(folder)
    assert reopened(folder) == (RECORDS, ""), "the lock was given back"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "lost its header"),
        (HEADER[:5], "lost its header"),
        (b"TFJRNL\x00\x02", "format version 2"),
        (b'{"view": 1}', "does not begin as a journal"),
    ],
)
def test_a_file_without_its_header_is_refused_and_left(
    tmp_path: Path, data: bytes, text: str
) -> None:
    made(tmp_path, data)
    with pytest.raises(JournalError, match=text):
        Journal(tmp_path)
    assert (tmp_path / "journal").read_bytes() == data


# ---- the file ------------------------------------------------------------------------------------


def test_what_was_appended_and_rewritten_is_found_again(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    journal = Journal(folder)
    assert (journal.payloads, journal.torn) == ([], "")
    for record in RECORDS:
        journal.append(record)
    journal.sync()
    journal.close()
    assert (folder / "journal").read_bytes() == WHOLE
    journal = Journal(folder)
    assert journal.payloads == RECORDS
    journal.rewrite(RECORDS[3:])
    journal.append(RECORDS[0])
    journal.sync()
    journal.close()
    assert reopened(folder) == ([RECORDS[3], RECORDS[0]], "")
    with pytest.raises(JournalError, match="is closed"):
        journal.append(RECORDS[0])


def test_folder_and_files_are_for_the_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    journal = Journal(folder)
    journal.rewrite(RECORDS)
    journal.close()
    assert folder.stat().st_mode & 0o777 == 0o700
    modes = {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()}
    assert modes == {"journal": 0o600, "lock": 0o600}


def test_a_torn_tail_is_cut_so_that_later_records_follow_good_ones(tmp_path: Path) -> None:
    for size in range(ENDS[-2] + 1, ENDS[-1]):
        folder = made(tmp_path, WHOLE[:size])
        journal = Journal(folder)
        assert journal.payloads == RECORDS[:-1]
        assert journal.torn == f"{size - ENDS[-2]} bytes at offset {ENDS[-2]}"
        journal.append(RECORDS[0])
        journal.close()
        assert reopened(folder) == ([*RECORDS[:-1], RECORDS[0]], "")


def test_a_second_scheduler_is_told_who_has_the_journal(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    with pytest.raises(ConfigError, match=f"in use by pid {holder.pid} on host {os.uname()[1]};"):
        Journal(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert reopened(tmp_path) == ([b"\x01"], ""), "a killed process holds no lock, its record is in"


def test_the_lock_is_not_handed_to_programs_that_are_started(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False) as child:
        journal.close()
        assert reopened(tmp_path) == ([], "")
        child.kill()


def test_a_folder_that_is_a_file_is_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be a folder"):
        Journal(tmp_path / "file")


# ---- failures ------------------------------------------------------------------------------------


def failing(code: int) -> Callable[..., int]:
    """A system call that fails."""

    def call(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("call", ["append", "sync", "rewrite"])
def test_after_a_failure_every_later_call_fails_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    journal = Journal(tmp_path)
    journal.append(RECORDS[0])
    journal.sync()
    broken = {"append": "write", "sync": "fdatasync", "rewrite": "fsync"}[call]
    calls: dict[str, Callable[[], None]] = {
        "append": lambda: journal.append(RECORDS[1]),
        "sync": journal.sync,
        "rewrite": lambda: journal.rewrite(RECORDS[1:]),
    }
    with monkeypatch.context() as patch:
        patch.setattr(os, broken, failing(errno.EIO))
        with pytest.raises(JournalError, match="Input/output error"):
            calls[call]()
    for again in calls.values():
        with pytest.raises(JournalError, match="Input/output error"):
            again()
    journal.close()
    assert reopened(tmp_path) == (RECORDS[:1], "")


def test_a_write_that_fails_half_way_leaves_a_tail_that_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = os.write, iter(range(9))

    def short(file: int, data: bytes) -> int:
        if next(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[:5])

    journal = Journal(tmp_path)
    journal.append(RECORDS[0])
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", short)
        with pytest.raises(JournalError, match=r"No space left.*is full: make room"):
            journal.append(RECORDS[1])
    journal.close()
    end = len(HEADER) + len(frame(RECORDS[0]))
    assert reopened(tmp_path) == (RECORDS[:1], f"10 bytes at offset {end}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "treefold-test", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"NO REAL FULL DISK IS TESTED, only patched calls: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def until_full(write: Callable[[bytes], object], data: bytes) -> int:
    """How many writes go well before the disk is full, as it must be soon."""
    for count in range(1000):
        try:
            write(data)
        except (OSError, JournalError) as error:
            if "No space left" not in str(error):
                raise
            return count
    raise AssertionError("the disk never got full")


def test_a_really_full_disk_is_named_and_loses_nothing_synced(small_disk: Path) -> None:
    folder, record = small_disk / "j", b"\xc4\xff" * 1000
    journal = Journal(folder)
    written = until_full(journal.append, record)
    assert written >= 10
    with pytest.raises(JournalError, match=r"No space left.*disk of .*/j is full: make room"):
        journal.sync()
    journal.close()
    with (small_disk / "rest").open("wb", buffering=0) as rest:
        until_full(rest.write, bytes(4096))
    assert reopened(folder)[0] == [record] * written, "opens on a full disk, too"
    with (small_disk / "rest").open("ab", buffering=0) as rest:
        until_full(rest.write, bytes(4096))  # what was cut off the journal made room
    with pytest.raises(JournalError, match="is full: make room"):
        Journal(small_disk / "other")


# ---- rewriting -----------------------------------------------------------------------------------


def test_a_kill_at_any_step_of_rewriting_leaves_the_old_or_the_new_records(tmp_path: Path) -> None:
    seen = []
    for step in range(1, 40):
        folder = made(tmp_path / str(step))
        command = [sys.executable, "-c", DIE, str(folder), str(step)]
        code = subprocess.run(command, check=False).returncode
        payloads, torn = reopened(folder)
        assert payloads in (RECORDS, [b"\x07", b"\x08"])
        assert not torn
        assert sorted(file.name for file in folder.iterdir()) == ["journal", "lock"], (
            "nothing is left lying about"
        )
        seen.append(payloads == RECORDS)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert seen[-1] is False, "the last one was not killed"
    assert seen == sorted(seen, reverse=True), "old before the rename, new after it"
    assert seen.count(True) >= 7, "open, write, fsync and rename, before and after each"
    assert seen.count(False) >= 5, "close, open, fsync, close"


def test_a_rewrite_syncs_the_file_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path)
    calls = []

    def noted(name: str) -> Callable[..., object]:
        real = getattr(os, name)

        def call(target: object, *rest: object) -> object:
            is_folder = isinstance(target, int) and os.path.isdir(f"/proc/self/fd/{target}")  # noqa: PTH112 - a descriptor
            calls.append(f"{name} folder" if is_folder else name)
            return real(target, *rest)

        return call

    for name in ("write", "fsync", "rename"):
        monkeypatch.setattr(os, name, noted(name))
    journal.rewrite(RECORDS)
    monkeypatch.undo()
    journal.close()
    assert calls == ["write", "fsync", "rename", "fsync folder"]
