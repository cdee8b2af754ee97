"""Output of children, the guard, and the notes by which schedulers are found."""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from treefold.common.config import Settings, load
from treefold.common.errors import ConfigError
from treefold.launch import guard, runtime
from treefold.launch.commands import (
    IPC_PATH_MAX,
    Attempt,
    LaunchPlan,
    check_socket_path,
    prepared,
)
from treefold.launch.effects import describe_exit, signal_name
from treefold.launch.processes import LINE_BYTES_MAX, Child, Guard, Line, Stream

# ---- output --------------------------------------------------------------------------------------


@pytest.fixture
def pipe() -> Iterator[tuple[Stream, int]]:
    """A stream, and the descriptor to write to it."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with os.fdopen(reading, "rb") as file:
        yield Stream("worker-0", file, is_error=False), writing
    if Path(f"/proc/self/fd/{writing}").exists():
        os.close(writing)


def test_a_line_is_passed_on_when_its_end_has_come(pipe: tuple[Stream, int]) -> None:
    stream, writing = pipe
    os.write(writing, b"one\ntw")
    assert list(stream.read()) == [Line("worker-0", "one", is_error=False)]
    os.write(writing, b"o\n")
    assert [line.text for line in stream.read()] == ["two"]


def test_the_last_line_is_passed_on_although_it_has_no_end(pipe: tuple[Stream, int]) -> None:
    stream, writing = pipe
    os.write(writing, b"one\ntwo")
    os.close(writing)
    assert [line.text for line in stream.drain()] == ["one", "two"]


def test_draining_does_not_wait_for_a_pipe_that_somebody_keeps(pipe: tuple[Stream, int]) -> None:
    stream, writing = pipe
    os.write(writing, b"one\n")
    assert [line.text for line in stream.drain()] == ["one"]


def test_of_a_progress_bar_the_last_state_is_shown(pipe: tuple[Stream, int]) -> None:
    stream, writing = pipe
    os.write(writing, b"10 %\r20 %\r30 %\nplain\r\n")
    assert [line.text for line in stream.read()] == ["30 %", "plain"]


def test_a_line_without_an_end_does_not_fill_the_memory(pipe: tuple[Stream, int]) -> None:
    stream, writing = pipe
    piece = b"x" * 60_000
    os.write(writing, piece)
    assert list(stream.read()) == []
    os.write(writing, piece)
    [line] = stream.read()
    assert len(line.text) == 2 * len(piece) > LINE_BYTES_MAX


def test_bytes_that_are_no_text_are_passed_on_as_well_as_can_be(pipe: tuple[Stream, int]) -> None:
    stream, writing = pipe
    os.write(writing, b"a\xffb\n")
    assert [line.text for line in stream.read()] == ["a�b"]


# ---- children and the guard ----------------------------------------------------------------------


def test_a_child_that_cannot_be_started_says_so_and_ends_with_127() -> None:
    watch = Guard()
    child = Child("worker-0", ["/no/such/command"], {}, watch)
    os.waitid(os.P_PID, child.session, os.WEXITED | os.WNOWAIT)
    assert child.poll() == 127
    assert [line.text for line in child.bury()] == [
        "/no/such/command cannot be started: No such file or directory"
    ]
    watch.close()


def test_the_end_of_the_pipe_kills_sessions_that_were_not_forgotten(tmp_path: Path) -> None:
    folder = tmp_path / "sockets"
    folder.mkdir()
    sleepers = [subprocess.Popen(["sleep", "1000"], start_new_session=True) for _ in range(2)]
    lines = [f"+{sleeper.pid}\n" for sleeper in sleepers]
    guard.main([*lines, f"-{sleepers[0].pid}\n", f"@{folder}\n"])
    assert sleepers[1].wait() == -signal.SIGKILL
    assert sleepers[0].poll() is None
    assert not folder.exists()
    sleepers[0].kill()
    sleepers[0].wait()


def test_a_session_is_killed_with_the_groups_that_its_processes_made(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, subprocess\n"
        "null = subprocess.DEVNULL\n"
        "child = subprocess.Popen(['sleep', '1000'], process_group=0, stdout=null)\n"
        "print(child.pid, flush=True)\n"
        "os._exit(0)\n",
        encoding="utf-8",
    )
    leader = subprocess.Popen(
        [sys.executable, str(script)], start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    text, _ = leader.communicate()
    left = psutil.Process(int(text))
    assert left.is_running()
    guard.kill_session(leader.pid)
    assert psutil.wait_procs([left], timeout=30)[1] == []


def test_killing_a_session_that_is_gone_does_nothing() -> None:
    done = subprocess.Popen(["true"], start_new_session=True)
    done.wait()
    guard.kill_session(done.pid)
    assert guard.session_of(done.pid) == 0


def test_ends_are_told_in_words() -> None:
    assert describe_exit(7) == "exited with code 7"
    assert describe_exit(-9) == "was killed by SIGKILL"
    assert signal_name(63) == "signal 63"


# ---- commands and environment --------------------------------------------------------------------


def test_the_address_is_known_beforehand_over_ipc_and_only_then() -> None:
    settings = Settings(servers=2)
    attempt = Attempt(LaunchPlan(settings, ["true"], "ipc"), "/tmp/x")  # noqa: S108 # only a name
    assert attempt.scheduler == "ipc:///tmp/x/scheduler"
    assert Attempt(LaunchPlan(settings, ["true"], "tcp"), "/tmp/x").scheduler == ""  # noqa: S108


def test_every_process_gets_its_own_address_and_all_other_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = Settings(
        servers=2, slots=5, advertise="tcp://10.0.0.1:1", linger=True, metrics_port=9100
    )
    plan = LaunchPlan(settings, ["true"], "ipc", {"TREEFOLD_SLOTS": "9", "HOME": "/home/x"})
    attempt = Attempt(plan, "/tmp/x")  # noqa: S108 # only a name
    environment = attempt.environment("server-1")
    assert environment["HOME"] == "/home/x"
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    expected = msgspec.structs.replace(
        settings,
        scheduler=attempt.scheduler,
        bind="ipc:///tmp/x/server-1",
        rank=1,
        advertise="",
        engine="none",
        linger=False,
        metrics_port=9102,
    )
    assert load({}).settings == expected


def test_all_schedulers_of_a_launch_have_one_port_and_one_token_and_nobody_else_has(
    tmp_path: Path,
) -> None:
    plan = LaunchPlan(Settings(page_port=0), ["true"])
    first, again = (Attempt(plan, str(tmp_path / name)) for name in "12")
    begun = first.environment("scheduler")
    token = Path(begun["TREEFOLD_PAGE_TOKEN_FILE"])
    assert begun["TREEFOLD_PAGE_PORT"] == "0"
    assert token.stat().st_mode & 0o777 == 0o600
    assert len(token.read_text()) >= 16
    again.link = "http://127.0.0.1:4321/#secret"
    later = again.environment("scheduler")
    assert later["TREEFOLD_PAGE_PORT"] == "4321"
    assert later["TREEFOLD_PAGE_TOKEN_FILE"] == str(token)
    for other in ("server-0", "worker-0"):
        found = first.environment(other)
        assert (found["TREEFOLD_PAGE_PORT"], found["TREEFOLD_PAGE_TOKEN_FILE"]) == ("-1", "")
    own = LaunchPlan(Settings(page_port=0, page_token_file="/mine"), ["true"])  # noqa: S106 # a path
    given = Attempt(own, "/tmp/x/1").environment("scheduler")  # noqa: S108 # only a name
    assert Path(given["TREEFOLD_PAGE_TOKEN_FILE"]) == Path("/mine")


def test_one_thread_computes_unless_the_user_said_otherwise() -> None:
    assert prepared({})["OMP_NUM_THREADS"] == "1"
    assert prepared({"OMP_NUM_THREADS": "4"})["OMP_NUM_THREADS"] == "4"


def test_a_path_that_is_too_long_for_a_socket_is_refused() -> None:
    check_socket_path("x" * IPC_PATH_MAX)
    with pytest.raises(ConfigError, match="is 104 bytes long, and a socket's path may have 103"):
        check_socket_path("x" * (IPC_PATH_MAX + 1))


# ---- notes of running schedulers -----------------------------------------------------------------


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of this test's own."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("temporary")
def test_a_scheduler_is_found_for_as_long_as_it_is_noted() -> None:
    with runtime.noted("tcp://127.0.0.1:1"):
        assert [note.address for note in runtime.running()] == ["tcp://127.0.0.1:1"]
    assert runtime.running() == []


@pytest.mark.usefixtures("temporary")
def test_notes_of_dead_processes_reused_numbers_and_nonsense_are_removed() -> None:
    folder = runtime.folder()
    dead = subprocess.Popen(["true"])
    dead.wait()
    born = psutil.Process().create_time()
    notes = {
        "dead": (dead.pid, 0.0),
        "reused": (os.getpid(), born - 100),
        "alive": (os.getpid(), born),
    }
    for name, (pid, started) in notes.items():
        note = runtime.Running(name, pid, started)
        (folder / f"{name}.json").write_bytes(msgspec.json.encode(note))
    (folder / "nonsense.json").write_bytes(b"{")
    assert [note.address for note in runtime.running()] == ["alive"]
    assert [file.name for file in folder.iterdir()] == ["alive.json"]


def test_nobody_else_can_enter_the_folder_of_notes(temporary: Path) -> None:
    folder = runtime.folder()
    assert folder.parent == temporary
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match="nobody else can enter"):
        runtime.folder()
