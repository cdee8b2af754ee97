"""What only the scheduler's core hears and asks for, beside the vocabulary that all cores share."""

from dataclasses import dataclass

from treefold.checkpoint.manifest import Manifest
from treefold.scheduler.records import Record
from treefold.wire.exchange import Halt, Note, PeerLost, Received, Send, Tick
from treefold.wire.words import Outcome


@dataclass(frozen=True, slots=True)
class SchedulerStopAsked:
    """The operator wants the cluster to end."""

    outcome: Outcome
    text: str


@dataclass(frozen=True, slots=True)
class Persist:
    """Write these to the journal; they must be safe before anything that follows is sent."""

    records: list[Record]


@dataclass(frozen=True, slots=True)
class Rewrite:
    """Put these in the place of everything that the journal has."""

    records: list[Record]


@dataclass(frozen=True, slots=True)
class WriteManifest:
    """Make a checkpoint count, whose files are all there; answered by `ManifestWritten`.

    When it is written and who wrote it is filled in by the shell.
    """

    manifest: Manifest


@dataclass(frozen=True, slots=True)
class ManifestWritten:
    """The checkpoint of this version counts, or why it does not."""

    version: int
    text: str


@dataclass(frozen=True, slots=True)
class ChooseCheckpoint:
    """Look for the newest checkpoint that is whole; answered by `CheckpointChosen`."""


@dataclass(frozen=True, slots=True)
class CheckpointChosen:
    """The newest checkpoint that is whole and the folder it is in, None if there is none."""

    folder: str
    manifest: Manifest | None


Event = Received | PeerLost | Tick | SchedulerStopAsked | ManifestWritten | CheckpointChosen
Effect = Send | Note | Halt | Persist | Rewrite | WriteManifest | ChooseCheckpoint
