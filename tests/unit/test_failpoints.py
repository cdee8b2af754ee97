"""Failpoints act where, when and in whom a test says, in real processes; elsewhere they are off."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from treefold.common import failpoints
from treefold.scheduler.journal import Journal

ROOT = Path(__file__).parents[2]
SOURCE_ROOTS = ("common", "ps", "worker", "deploy")

# Arms itself under the names given, then passes a point five times.
HITS = """
import sys
from treefold.common.failpoints import arm, failpoint
arm(*sys.argv[1:])
for hit in range(1, 6):
    try:
        failpoint("journal.before_write")
    except OSError as error:
        print("error", error.errno, flush=True)
    print(hit, flush=True)
    failpoint("journal.after_sync")
    arm(*sys.argv[1:], "late")
"""
ALL = "1\n2\n3\n4\n5\n"

# Passes a point five times; hits count from the third one on.
HITS_FROM_THREE = """
import os, pathlib
from treefold.common.failpoints import arm, failpoint
arm()
for hit in range(1, 6):
    failpoint("journal.before_write")
    print(hit, flush=True)
    if hit == 2:
        pathlib.Path(os.environ["TREEFOLD_FAILPOINT_FROM"]).touch()
"""

# Writes records one by one, each synced, then rewrites the journal.
WRITE = """
import sys
from pathlib import Path
from treefold.common.failpoints import arm
from treefold.scheduler.journal import Journal
arm("scheduler")
journal = Journal(Path(sys.argv[1]))
for number in range(1, 4):
    journal.append(bytes([number]))
    journal.sync()
journal.rewrite([b"\\x09"])
"""


def passed(
    spec: str,
    *members: str,
    once: Path | str = "",
    start: Path | str = "",
    script: str = HITS,
) -> subprocess.CompletedProcess[str]:
    """A process that passes points with this in its environment."""
    values = {"FAILPOINT": spec, "FAILPOINT_ONCE": str(once), "FAILPOINT_FROM": str(start)}
    environment = os.environ | {f"TREEFOLD_{key}": value for key, value in values.items()}
    command = [sys.executable, "-c", script, *members]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_process_dies_at_the_hit_that_was_named_and_not_before() -> None:
    done = passed("journal.before_write:kill@3")
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "1\n2\n")
    done = passed("journal.after_sync:kill")
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "1\n")


def test_errors_are_raised_at_that_hit_alone_and_several_can_be_given() -> None:
    done = passed("journal.before_write:raise@2, journal.before_write:enospc@4")
    assert done.stdout == "1\nerror 5\n2\n3\nerror 28\n4\n5\n"
    assert done.returncode == 0


def test_only_the_member_that_was_named_dies() -> None:
    spec = "server-1/journal.before_write:kill@2"
    assert passed(spec, "server", "server-1").stdout == "1\n"
    for others in ((), ("server", "server-11"), ("worker-1",)):
        done = passed(spec, *others)
        assert (done.returncode, done.stdout) == (0, ALL)


def test_a_process_that_learns_its_name_later_is_armed_from_then_on() -> None:
    assert passed("late/journal.before_write:kill").stdout == "1\n"


def test_a_process_that_is_started_again_does_not_die_again(tmp_path: Path) -> None:
    spec = "s-1/journal.before_write:kill@2"
    assert passed(spec, "s-1", once=tmp_path).returncode == -signal.SIGKILL
    assert [file.name for file in tmp_path.iterdir()] == ["s-1+journal.before_write+kill@2"]
    done = passed(spec, "s-1", once=tmp_path)
    assert (done.returncode, done.stdout) == (0, ALL)
    done = passed(spec.replace("@2", "@3"), "s-1", once=tmp_path)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "1\n2\n"), "another one does happen"
    assert passed(spec, "s-1").stdout == "1\n", "without the folder it happens every time"


def test_a_process_that_stops_itself_goes_on_where_it_was() -> None:
    environment = {**os.environ, "TREEFOLD_FAILPOINT": "journal.before_write:stop@2"}
    command = [sys.executable, "-c", HITS]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert os.WSTOPSIG(status) == signal.SIGSTOP
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        process.send_signal(signal.SIGCONT)
        assert process.stdout.read() == "2\n3\n4\n5\n"
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("journal.before_wrote:kill", f"the points are {', '.join(failpoints.POINTS)}"),
        ("other/no.point:kill", "has 'no.point'"),
        ("journal.before_write", "is written [member/]point:action[@hit]"),
        ("journal.before_write:explode", "kill, stop, raise or enospc"),
        ("journal.before_write:kill@0", "is written"),
    ],
)
def test_what_is_not_known_is_refused_at_the_start(spec: str, text: str) -> None:
    done = passed(spec, "server-1")
    assert done.returncode == 1
    assert "ConfigError: TREEFOLD_FAILPOINT has " in done.stderr
    assert text in done.stderr
    assert not done.stdout


def test_a_folder_of_markers_that_is_not_there_is_refused(tmp_path: Path) -> None:
    done = passed("journal.before_write:kill", once=tmp_path / "none")
    assert "TREEFOLD_FAILPOINT_ONCE is" in done.stderr
    assert not done.stdout


def test_nothing_is_on_when_the_environment_names_nothing() -> None:
    assert passed("").stdout == ALL
    assert not failpoints.armed, "nor in the process of these tests"


def points_in(node: ast.AST) -> list[str]:
    """The points that a call passes: one of `failpoint`, or a table of `Points`."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return []
    named = []
    if node.func.id == "failpoint" and not isinstance(node.args[0], ast.Subscript):
        named = [node.args[0]]
    if node.func.id == "Points":
        tables = [keyword.value for keyword in node.keywords]
        assert all(isinstance(table, ast.Dict) for table in tables), "not literal tables"
        named = [value for table in tables for value in getattr(table, "values", [])]
    assert all(isinstance(value, ast.Constant) for value in named), "not literals"
    return [str(value.value) for value in named if isinstance(value, ast.Constant)]


def test_every_declared_point_is_in_the_code_and_every_one_there_is_declared() -> None:
    files = [file for root in SOURCE_ROOTS for file in (ROOT / root).rglob("*.py")]
    nodes = [n for file in files for n in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    found = [point for node in nodes for point in points_in(node)]
    assert sorted(found) == sorted(failpoints.POINTS), "each is in one place"


def test_points_are_found_in_calls_and_in_tables() -> None:
    text = 'failpoint("a.b")\nother("c")\nPoints(before={int: "d.e"}, first={str: "f.g"})'
    found = [point for node in ast.walk(ast.parse(text)) for point in points_in(node)]
    assert found == ["a.b", "d.e", "f.g"]


def test_a_hit_counts_only_when_the_file_is_there(tmp_path: Path) -> None:
    start = tmp_path / "start"
    done = passed("journal.before_write:kill@2", start=start, script=HITS_FROM_THREE)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "1\n2\n3\n")


@pytest.mark.parametrize(
    ("spec", "records"),
    [
        ("journal.before_write:kill@2", [1]),
        ("journal.after_write_before_sync:kill@2", [1, 2]),
        ("journal.after_sync:kill@2", [1, 2]),
        # The first hit of each is the making of the file.
        ("journal.rewrite.before_rename:kill@1", []),
        ("journal.rewrite.before_rename:kill@2", [1, 2, 3]),
        ("journal.rewrite.after_rename:kill@1", []),
        ("journal.rewrite.after_rename:kill@2", [9]),
    ],
)
def test_a_scheduler_that_dies_in_its_journal_leaves_what_it_had_written(
    tmp_path: Path, spec: str, records: list[int]
) -> None:
    done = passed(spec, str(tmp_path), script=WRITE)
    assert done.returncode == -signal.SIGKILL, done.stderr
    journal = Journal(tmp_path)
    journal.close()
    assert (journal.payloads, journal.torn) == ([bytes([number]) for number in records], "")


def test_an_error_in_the_journal_breaks_it_for_good(tmp_path: Path) -> None:
    done = passed("journal.after_sync:enospc@2", str(tmp_path), script=WRITE)
    assert done.returncode == 1
    assert "is full: make room" in done.stderr
