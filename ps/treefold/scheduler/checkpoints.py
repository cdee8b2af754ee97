"""Checkpoints as the scheduler sees them: what servers have saved, and when that is a whole one.

A checkpoint is the same version of every table that has rounds, and the one version of those that
have none. It counts once its manifest is written; what is missing of it then is never added.

Part of `treefold.scheduler.core` in a file of its own; just as pure.
"""

import math

from treefold.checkpoint.manifest import FileEntry, Manifest, TableEntry
from treefold.common.round_state import decode_applied
from treefold.common.spec import Rule, TableSpec
from treefold.scheduler.admission import SchedulerLimits
from treefold.scheduler.declared import Declared
from treefold.scheduler.effects import Effect, WriteManifest
from treefold.scheduler.eventlog import CHECKPOINT
from treefold.wire.exchange import Level, Note
from treefold.wire.messages import ShardSaved
from treefold.wire.words import Source

BEGUN_MAX = 8  # checkpoints that are being made at a time; older ones are given up
Key = tuple[int, int]
"""Table and shard."""


class Checkpoints:
    """The checkpoints of a job.

    Parameters
    ----------
    declared : Declared
        The tables, and where they lie.

    Attributes
    ----------
    saved : dict of (version, table, shard) to ShardSaved
        Files of checkpoints that are not whole, and those of constant tables.
    newest : int
        Version of the newest checkpoint that counts, -1 for none.
    source : Source or None
        What the job began with, or went back to.
    changes : int
        How often any of this has changed.
    """

    def __init__(self, declared: Declared) -> None:
        self._declared = declared
        self.saved: dict[tuple[int, int, int], ShardSaved] = {}
        self.newest = -1
        self.source: Source | None = None
        self.changes = 0
        self._writing: int | None = None
        self._failed: dict[int, None] = {}

    @property
    def is_any(self) -> bool:
        """Whether the job could go back to a checkpoint."""
        return self.newest >= 0 or self.source is not None

    @property
    def is_writing(self) -> bool:
        """Whether a manifest is being written."""
        return self._writing is not None

    def on_saved(self, limits: SchedulerLimits, view: int, message: ShardSaved) -> list[Effect]:
        """A server has saved a shard, or could not."""
        version, key = message.version, (message.version, message.table, message.shard)
        rule = self._rule(message.table)
        is_old = rule is Rule.OPTIMIZER and version <= max(self.newest, self._source_version())
        if rule is None or is_old or key in self.saved:
            return []
        if message.text:
            return self._give_up(version, message)
        self.saved[key] = message
        self.changes += 1
        self._forget()
        return self.write(limits, view)

    def doubts(self, limits: SchedulerLimits) -> list[Effect]:
        """Say so if nothing will ever be saved of what the job trains."""
        declared = self._declared
        if not (limits.checkpoint and declared.is_loader and declared.is_asynchronous):
            return []
        text = "checkpoints of asynchronous tables are made at the ends of passes"
        return [Note(Level.WARNING, f"{text}; with own loaders there are none, so none is made")]

    def write(self, limits: SchedulerLimits, view: int) -> list[Effect]:
        """Begin to write the manifest of the newest checkpoint that is whole."""
        if self.is_writing or not self._declared.plans:
            return []  # without a pass over the data more tables may come
        versions = sorted({version for version, *_ in self.saved}, reverse=True)
        for version in versions:
            if version > self.newest and version != self._source_version():
                tables = self._entries(version)
                if tables is not None:
                    self._writing = version
                    return [WriteManifest(self._manifest(limits, view, version, tables))]
        return []

    def on_written(self, version: int, text: str) -> list[Effect]:
        """A manifest is there, or could not be written, which ``text`` says."""
        self._writing = None
        if text:
            self._drop(version)
            warning = f"there is no checkpoint of version {version}: {text}; training goes on"
            return [Note(Level.WARNING, f"{warning} {self._with_older()}")]
        self.newest = max(self.newest, version)
        self.changes += 1
        for key in [key for key in self.saved if self._is_done(key)]:
            del self.saved[key]
        return [Note(Level.INFO, f"checkpoint of version {version} is written", CHECKPOINT)]

    def begin_at(self, source: Source | None) -> None:
        """The job begins, or goes on, from here: what was saved before counts no more."""
        self.source = source
        self.newest = -1
        self.saved.clear()
        self._failed.clear()
        self.changes += 1

    def take_up(self, message: ShardSaved) -> None:
        """Another scheduler knew of this file."""
        self.saved[message.version, message.table, message.shard] = message

    def take_up_newest(self, version: int) -> None:
        """Another scheduler had this checkpoint written."""
        self.newest = version

    # ---- insides ------------------------------------------------------------------------------

    def _rule(self, table: int) -> Rule | None:
        tables = self._declared.tables
        return tables[table].spec.rule if table < len(tables) else None

    def _source_version(self) -> int:
        return -1 if self.source is None else self.source.version

    def _is_done(self, key: tuple[int, int, int]) -> bool:
        return key[0] <= self.newest and self._rule(key[1]) is Rule.OPTIMIZER

    def _forget(self) -> None:
        """Keep a bounded number of checkpoints that are not whole."""
        trained = {v for v, table, _ in self.saved if self._rule(table) is Rule.OPTIMIZER}
        for version in sorted(trained)[:-BEGUN_MAX]:
            self._drop(version)

    def _drop(self, version: int) -> None:
        for key in [key for key in self.saved if key[0] == version]:
            if self._rule(key[1]) is Rule.OPTIMIZER:
                del self.saved[key]
        self.changes += 1

    def _give_up(self, version: int, message: ShardSaved) -> list[Effect]:
        self._drop(version)
        if version in self._failed:
            return []
        self._failed[version] = None
        where = f"shard {message.shard} of {self._declared.tables[message.table].spec.name}"
        text = f"there will be no checkpoint of version {version}: {where}: {message.text}"
        return [Note(Level.WARNING, f"{text}; training goes on {self._with_older()}")]

    def _with_older(self) -> str:
        if self.newest >= 0:
            return f"with the checkpoint of version {self.newest}"
        return "without one" if self.source is None else "with the one that it began from"

    def _entries(self, version: int) -> list[TableEntry] | None:
        """What a manifest says of the tables, None if something is not saved yet."""
        found: list[TableEntry] = []
        for number, table in enumerate(self._declared.tables):
            own = version if table.spec.rule is Rule.OPTIMIZER else 0
            if table.place is None:
                return None
            files = [self.saved.get((own, number, place.shard)) for place in table.place.shards]
            known = [one for one in files if one is not None]
            if len(known) < len(files) or not _is_cut(table.spec, known):
                return None
            first = known[0]
            entries = [
                FileEntry(
                    path=one.path,
                    first_block=place.first_block,
                    blocks=place.blocks,
                    nbytes=one.nbytes,
                    sha256=one.sha256.hex(),
                )
                for one, place in zip(known, table.place.shards, strict=True)
            ]
            norm = None if math.isnan(first.norm) else first.norm
            found.append(
                TableEntry(
                    number=number,
                    spec=table.spec,
                    record=table.record,
                    version=own,
                    state=first.state,
                    norm=norm,
                    files=entries,
                )
            )
        return found or None

    def _manifest(
        self, limits: SchedulerLimits, view: int, version: int, tables: list[TableEntry]
    ) -> Manifest:
        return Manifest(
            job=limits.job,
            version=version,
            view=view,
            slots=limits.slots,
            seed=limits.seed,
            package="",
            created="",
            plans=list(self._declared.plans.values()),
            tables=tables,
        )


def _is_cut(spec: TableSpec, files: list[ShardSaved]) -> bool:
    """Whether the shards of a table belong together: the same contributions are in all of them."""
    clocks = [decode_applied(one.state).clocks for one in files if spec.is_asynchronous]
    return all(one == clocks[0] for one in clocks)
