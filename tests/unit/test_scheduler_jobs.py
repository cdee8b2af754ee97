"""One job after another: which folder a scheduler takes, and what it begins with."""

from pathlib import Path

import msgspec
import pytest

from treefold.common.config import Settings
from treefold.common.errors import ConfigError, JournalError
from treefold.scheduler import jobs, records, shell
from treefold.scheduler.journal import Journal
from treefold.wire.words import Outcome


def job(state: Path, number: int, outcome: Outcome | None, *, is_saved: bool = True) -> None:
    """A job that was there, and how it ended."""
    folder = state / f"{number:04}"
    with_end = [records.Ended(outcome, "")] if outcome is not None else []
    journal = Journal(folder / "journal")
    journal.append(records.encode([records.Written(1), *with_end]))
    journal.sync()
    journal.close()
    if is_saved:
        manifest = folder / "checkpoints/00000001/manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.touch()


def begins(state: Path) -> tuple[str, str, str]:
    """Journal, checkpoints and beginning that are chosen, within the folder."""
    found = jobs.chosen(Settings(state=str(state)))
    every = (found.journal, found.checkpoint, found.resume)
    short = [one.removeprefix(f"{state}/") for one in every]
    return short[0], short[1], short[2]


def test_the_first_job_begins_from_nothing(tmp_path: Path) -> None:
    assert begins(tmp_path) == ("0001/journal", "0001/checkpoints", "")


def test_a_job_that_has_not_ended_is_gone_on_with(tmp_path: Path) -> None:
    job(tmp_path, 1, Outcome.DONE)
    job(tmp_path, 2, None)
    assert begins(tmp_path) == ("0002/journal", "0002/checkpoints", "")


def test_a_job_whose_scheduler_died_before_it_wrote_anything_is_gone_on_with(
    tmp_path: Path,
) -> None:
    (tmp_path / "0003").mkdir()
    assert begins(tmp_path) == ("0003/journal", "0003/checkpoints", "")


def test_a_job_that_is_done_is_followed_by_a_new_one(tmp_path: Path) -> None:
    job(tmp_path, 9, Outcome.DONE)
    job(tmp_path, 10, Outcome.DONE)
    assert begins(tmp_path) == ("0011/journal", "0011/checkpoints", "")


@pytest.mark.parametrize("outcome", [Outcome.DRAINED, Outcome.FAILED, Outcome.NOT_FORMED])
def test_a_job_that_was_stopped_or_failed_is_followed_from_its_checkpoints(
    tmp_path: Path, outcome: Outcome
) -> None:
    job(tmp_path, 1, outcome)
    assert begins(tmp_path) == ("0002/journal", "0002/checkpoints", "0001/checkpoints")


def test_without_a_checkpoint_the_job_before_is_gone_back_to_unless_it_was_done(
    tmp_path: Path,
) -> None:
    job(tmp_path, 1, Outcome.DONE)
    job(tmp_path, 2, Outcome.FAILED)
    job(tmp_path, 3, Outcome.DRAINED, is_saved=False)
    assert begins(tmp_path)[2] == "0002/checkpoints"
    job(tmp_path, 4, Outcome.DONE)
    job(tmp_path, 5, Outcome.FAILED, is_saved=False)
    assert begins(tmp_path)[2] == ""


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "7up").mkdir()
    assert begins(tmp_path)[0] == "0001/journal"


@pytest.mark.parametrize("key", ["journal", "checkpoint", "resume"])
def test_what_the_folder_decides_must_not_be_set(key: str) -> None:
    with pytest.raises(ConfigError, match=f"state and {key} are both set"):
        jobs.chosen(msgspec.structs.replace(Settings(state="here"), **{key: "there"}))


def test_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    job(tmp_path, 1, Outcome.DONE)
    (tmp_path / "0001/journal/journal").write_bytes(b"something else")
    with pytest.raises(JournalError):
        begins(tmp_path)


def test_settings_without_the_folder_stay_as_they_are() -> None:
    settings = Settings(journal="there")
    assert jobs.chosen(settings) is settings


def test_the_scheduler_asks_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Settings] = []

    def stop(settings: Settings) -> None:
        taken.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(shell, "SchedulerShell", stop)
    with pytest.raises(KeyboardInterrupt):
        shell.main(Settings(state=str(tmp_path)), print)
    assert taken[0].journal == str(tmp_path / "0001/journal")
