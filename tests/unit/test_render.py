"""``treefold render compose``: golden files, the repository's own one, and that options count."""

import re
import shlex
from pathlib import Path

import pytest

from treefold.cli import render
from treefold.common.errors import ConfigError

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
CALLS = {
    "compose-large.yaml": [
        "--servers", "3", "--workers", "16", "--slots", "64", "--consistency", "async",
        "--image", "registry.example/vision:2", "--",
        "python", "/jobs/train.py", "--note", 'a "word" for $5',
    ],
    "compose-keys.yaml": ["--keys", "./keys", "--image", "treefold"],
    "compose-metrics.yaml": ["--metrics-token-file", "./token", "--image", "treefold"],
    "compose-single.yaml": ["--servers", "1", "--workers", "1", "--rejoin-grace-s", "5"],
}  # fmt: skip


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What ``treefold render compose WORDS`` prints."""
    assert render.main(["compose", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", CALLS)
def test_the_file_is_the_golden_one(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(CALLS[name], capsys) == (GOLDEN / name).read_text(encoding="utf-8")


def test_the_repositorys_own_file_is_what_the_command_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = (ROOT / "deploy/compose/compose.yaml").read_text(encoding="utf-8")
    assert printed([], capsys) == own


@pytest.mark.parametrize("name", CALLS)
def test_the_command_in_the_first_lines_makes_the_same_file(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (GOLDEN / name).read_text(encoding="utf-8")
    [words] = re.findall(r"^#   treefold render compose (.*)$", text, re.MULTILINE)
    assert printed(shlex.split(words), capsys) == text


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--seed", "7"], '  TREEFOLD_SEED: "7"'),
        (["--dead-after-ms", "5000"], '  TREEFOLD_DEAD_AFTER_MS: "5000"'),
        (["--replicas", "1"], '  TREEFOLD_REPLICAS: "1"'),
        (["--workers", "9"], "      replicas: 9"),
        (["--image", "own:1"], '  image: "own:1"'),
        (["--", "true"], '    command: ["worker", "--", "true"]'),
    ],
)
def test_what_is_asked_for_is_in_the_file(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line in printed(words, capsys).splitlines()
    assert line not in printed([], capsys).splitlines()


def test_a_setting_of_the_environment_is_in_the_file_and_one_that_is_chosen_here_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TREEFOLD_SLOTS", "16")
    monkeypatch.setenv("TREEFOLD_SCHEDULER", "tcp://elsewhere:1")
    text = printed([], capsys)
    assert '  TREEFOLD_SLOTS: "16"' in text
    assert "elsewhere" not in text


def test_with_keys_nothing_is_open_and_no_role_gets_anothers_key(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = printed(["--keys", "./keys"], capsys)
    assert "INSECURE" not in text
    for role in ("scheduler", "server", "worker"):
        assert f"    secrets: [allowed, observer.key, {role}.key]\n" in text
    assert "secrets" not in printed([], capsys)


def test_metrics_and_prometheus_are_there_with_a_token_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = printed(["--metrics-token-file", "./token", "--keys", "./keys"], capsys)
    assert "    secrets: [allowed, observer.key, worker.key, metrics.token]\n" in text
    assert '  metrics.token: {file: "./token"}\n' in text
    assert "    profiles: [metrics]\n" in text
    assert "metrics" not in printed([], capsys)


def test_a_word_that_would_break_the_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="has a line break"):
        render.main(["compose", "--", "sh", "-c", "a\nb"])
    assert capsys.readouterr().out == ""


def test_the_wrong_size_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="replicas is 3 and servers 1"):
        render.main(["compose", "--replicas", "3"])
    assert capsys.readouterr().out == ""
