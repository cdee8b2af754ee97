"""A script begins anew when the job has gone back, and only where it can."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from treefold.common.errors import JobFailedError, RolledBackError
from treefold.torch.restarting import can_begin_anew, is_rolled_back

SCRIPT = """
import os, sys
from pathlib import Path
from treefold.common.errors import RolledBackError
from treefold.torch.leaving import ExitWatch

watch = ExitWatch(lambda outcome, text: print("left", outcome.name, flush=True))
watch.install()
seen = Path(sys.argv[1])
if seen.exists():
    print("second time", os.getpid(), sys.argv[2], os.getcwd(), flush=True)
else:
    seen.touch()
    print("first time", os.getpid(), flush=True)
    os.chdir("/")
    try:
        raise RolledBackError("go back")
    except RolledBackError as error:
        raise ValueError("the user's own") from error
"""


def test_the_process_runs_its_command_again_in_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "script.py", "seen", "--flag"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    first, left, second, end = done.stdout.splitlines()
    assert left == "left DRAINED"
    assert second == f"second time {first.split()[2]} --flag {os.path.realpath(tmp_path)}"
    assert end == "left DONE"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "is_back"),
    [(RolledBackError("x"), True), (JobFailedError("x"), False), (ValueError("x"), False)],
)
def test_only_the_job_that_went_back_is_a_reason(error: Exception, is_back: bool) -> None:
    assert is_rolled_back(error) is is_back


def test_an_interactive_session_cannot_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    assert not can_begin_anew()
