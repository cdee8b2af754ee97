"""Flags, settings and exit codes of the command line."""

import sys
from pathlib import Path

import msgspec
import pytest

from treefold.cli import config, main, run, scheduler, server, worker
from treefold.cli.flags import Parser, setting_texts
from treefold.common.config import KEYS, Settings, load
from treefold.common.errors import (
    ConfigError,
    DataError,
    FormationError,
    SchedulerLostError,
    TreefoldError,
    UnavailableError,
)

Printed = pytest.CaptureFixture[str]


def test_every_setting_is_a_flag_with_its_text_default_and_variable(printed: str) -> None:
    for key in KEYS:
        assert f"--{key.replace('_', '-')}" in printed
        assert f"TREEFOLD_{key.upper()}" in printed
        assert setting_texts()[key]
    assert "V, the slots of a round (default 8; TREEFOLD_SLOTS)" in printed


@pytest.fixture
def printed(capsys: Printed) -> str:
    """The help of a command that takes every setting, as one line."""
    with pytest.raises(SystemExit):
        Parser("all", "Everything.").read(["--help"])
    return " ".join(capsys.readouterr().out.split())


def test_a_flag_wins_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(tmp_path / "t.toml")
    Path(file).write_text("slots = 2\nseed = 2\nservers = 2\n", encoding="utf-8")
    monkeypatch.setenv("TREEFOLD_SLOTS", "3")
    monkeypatch.setenv("TREEFOLD_SEED", "3")
    _, loaded = Parser("all", "").read(["--config", file, "--slots", "4", "--no-linger"])
    assert (loaded.settings.slots, loaded.settings.seed, loaded.settings.servers) == (4, 3, 2)
    assert [loaded.origins[key] for key in ("slots", "seed", "servers", "linger", "bind")] == [
        "argument", "environment", file, "argument", "default",
    ]  # fmt: skip


def test_a_negative_seed_and_a_truth_value_can_be_given() -> None:
    _, loaded = Parser("all", "").read(["--seed", "-5", "--insecure"])
    assert loaded.settings.seed == -5
    assert loaded.settings.insecure is True


@pytest.mark.parametrize(
    ("word", "hint"),
    [("--slot", "did you mean --slots?"), ("--seed-value=3", "did you mean --seed?"),
     ("--zzzz", "treefold all --help names all flags")],
)  # fmt: skip
def test_an_unknown_flag_is_refused_with_the_nearest_right_one(
    word: str, hint: str, capsys: Printed
) -> None:
    with pytest.raises(SystemExit) as ending:
        Parser("all", "").read([word])
    assert ending.value.code == 2
    assert hint in capsys.readouterr().err


def test_flags_after_the_script_belong_to_the_script() -> None:
    parser = run.parser()
    options, loaded = parser.read(["--slots", "3", "x.py", "--slots", "9", "--", "-h"])
    assert options.command == ["x.py", "--slots", "9", "--", "-h"]
    assert loaded.settings.slots == 3
    options, _ = parser.read(["--workers", "2", "--", "python", "-m", "x", "--", "y"])
    assert options.command == ["--", "python", "-m", "x", "--", "y"]


def test_a_script_runs_in_this_interpreter_and_a_command_as_it_is(tmp_path: Path) -> None:
    script = str(tmp_path / "x.py")
    Path(script).touch()
    parser = run.parser()
    assert run.command_of([script, "-v"], parser) == [sys.executable, script, "-v"]
    assert run.command_of(["--", "sh", "-c", "x"], parser) == ["sh", "-c", "x"]


def test_members_of_a_launch_wait_for_each_other_unless_told_how_long() -> None:
    patient = run.settings_of(load({"form_timeout_s": 300.0}))
    assert patient.connect_timeout_s == 300.0
    told = run.settings_of(load({"form_timeout_s": 300.0, "connect_timeout_s": 2.0}))
    assert told.connect_timeout_s == 2.0


def test_a_job_whose_killed_workers_are_started_again_waits_for_them() -> None:
    assert run.settings_of(load({})).rejoin_grace_s == Settings().rejoin_grace_s
    sizes = {"servers": 2, "replicas": 2}
    assert run.settings_of(load(sizes)).rejoin_grace_s == Settings().form_timeout_s
    assert run.settings_of(load(sizes | {"rejoin_grace_s": 1.0})).rejoin_grace_s == 1.0


def test_a_launch_has_a_live_page_unless_told_otherwise() -> None:
    assert run.settings_of(load({})).page_port == 0
    assert run.settings_of(load({"page_port": -1})).page_port == -1
    assert run.settings_of(load({"page_port": 8080})).page_port == 8080


def test_roles_take_only_settings_that_exist() -> None:
    flags = [*scheduler.FLAGS, *server.FLAGS, *worker.FLAGS, *run.CHOSEN_HERE]
    assert [flag for flag in flags if flag not in KEYS] == []


def test_config_show_prints_values_that_can_be_read_again_and_their_origins(
    tmp_path: Path, capsys: Printed
) -> None:
    assert config.main(["show", "--slots", "3", "--linger", "--ledger", "a b"]) == 0
    file = tmp_path / "shown.toml"
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    expected = msgspec.structs.replace(Settings(), slots=3, linger=True, ledger="a b")
    assert load({}, str(file)).settings == expected
    config.main(["show", "--origin", "--slots", "3"])
    shown = capsys.readouterr().out
    assert "slots = 3  # argument" in shown
    assert "workers = 1  # default" in shown


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("x"), 2), (FormationError("x"), 3), (SchedulerLostError("x"), 3),
     (UnavailableError("x"), 3), (DataError("x"), 1)],
)  # fmt: skip
def test_errors_of_a_command_become_its_exit_code(
    error: TreefoldError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    def fail(words: list[str]) -> int:
        del words
        raise error

    monkeypatch.setattr(config, "main", fail)
    monkeypatch.setattr(sys, "argv", ["treefold", "config", "show"])
    assert main.main() == code
    assert capsys.readouterr().err == "treefold config: x\n"


def test_the_version_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    monkeypatch.setattr(sys, "argv", ["treefold", "--version"])
    with pytest.raises(SystemExit):
        main.main()
    assert capsys.readouterr().out.startswith("treefold 0.")
