"""One job after another in one folder: which one a scheduler that starts has to do with.

Looks at what the last one left, and writes nothing. Each job has a numbered folder with its journal
and its checkpoints.
"""

from pathlib import Path

import msgspec

from treefold.checkpoint.store import Store
from treefold.common.config import Settings
from treefold.common.errors import ConfigError
from treefold.scheduler import records
from treefold.scheduler.journal import FILE_NAME, scan
from treefold.wire.words import Outcome

JOURNAL, CHECKPOINTS = "journal", "checkpoints"
DIGITS = 4


def chosen(settings: Settings) -> Settings:
    """The settings with the journal, the checkpoints and the beginning of the job that it is now.

    A job that has not ended is gone on with. One that is done is followed by a new one; one that
    ended in another way by one that begins with the newest checkpoint.

    Parameters
    ----------
    settings : Settings
        ``state`` names the folder; without it they come back as they are.

    Raises
    ------
    ConfigError
        Something is set that the folder decides.
    JournalError, DataError
        The last job's journal is damaged.
    """
    if not settings.state:
        return settings
    for key in ("journal", "checkpoint", "resume"):
        if getattr(settings, key):
            raise ConfigError(f"state and {key} are both set; state has a {key} of its own")
    folder = Path(settings.state)
    found = [one for one in folder.glob("[0-9]*") if one.name.isdigit()]
    jobs = sorted(found, key=lambda job: int(job.name))
    outcome = outcome_of(jobs[-1]) if jobs else None
    if jobs and outcome is None:
        return _within(settings, jobs[-1], "")
    number = int(jobs[-1].name) + 1 if jobs else 1
    resume = newest_checkpoints(jobs) if outcome is not Outcome.DONE else ""
    return _within(settings, folder / f"{number:0{DIGITS}}", resume)


def outcome_of(job: Path) -> Outcome | None:
    """How a job ended, None if it did not."""
    file = job / JOURNAL / FILE_NAME
    if not file.is_file():
        return None
    payloads = scan(file.read_bytes(), str(file)).payloads
    noted = [record for payload in payloads for record in records.decode(payload)]
    return next((one.outcome for one in noted if isinstance(one, records.Ended)), None)


def newest_checkpoints(jobs: list[Path]) -> str:
    """Folder of checkpoints of the last of these jobs that has any; none of before one was done."""
    for job in reversed(jobs):
        if outcome_of(job) is Outcome.DONE:
            return ""
        if (job / CHECKPOINTS).is_dir() and Store(str(job / CHECKPOINTS)).versions():
            return str(job / CHECKPOINTS)
    return ""


def _within(settings: Settings, job: Path, resume: str) -> Settings:
    return msgspec.structs.replace(
        settings,
        state="",
        journal=str(job / JOURNAL),
        checkpoint=str(job / CHECKPOINTS),
        resume=resume,
    )
