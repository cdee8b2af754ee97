"""What simulated servers and schedulers do with a folder of checkpoints; it takes them a while."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from tests.sim.checks import Checks
from tests.sim.memory import Shelf
from tests.sim.process import Process
from tests.sim.vault import FOLDER, Saved, Vault
from tests.sim.world import MS, Violation
from treefold.scheduler.core import SchedulerCore
from treefold.scheduler.effects import (
    CheckpointChosen,
    ChooseCheckpoint,
    ManifestWritten,
    WriteManifest,
)
from treefold.server.core import ServerCore
from treefold.server.effects import RestoreShard, SaveShard, ShardRestored, ShardStored

Acts = dict[type, Callable[..., Iterable[object] | None]]
Key = tuple[int, int]


class Manifests:
    """The scheduler's part: manifests are written, and one is chosen.

    Parameters
    ----------
    process : Process
        The scheduler's.
    core : SchedulerCore
        Its core.
    vault : Vault
        The folder.
    checks : Checks
        Of the cluster.
    """

    def __init__(self, process: Process, core: SchedulerCore, vault: Vault, checks: Checks) -> None:
        self._process = process
        self._core = core
        self._vault = vault
        self._checks = checks

    def acts(self) -> Acts:
        """What is done for which effect."""
        return {WriteManifest: self._write, ChooseCheckpoint: self._choose}

    def _write(self, effect: WriteManifest) -> None:
        process, rng = self._process, self._process.world.rng

        def written(_: object) -> None:
            process.network.count("manifest")
            self._vault.commit(effect.manifest)
            process.later(rng.randint(0, 20) * MS, told)

        def told(_: object) -> None:
            process.feed(ManifestWritten(effect.manifest.version, ""), b"manifest")

        process.later(rng.randint(0, 50) * MS, written)

    def _choose(self, _: ChooseCheckpoint) -> None:
        process, damaged = self._process, self._checks.reference.scenario.damaged

        def chosen(_: object) -> None:
            passed_over = 0
            while process.world.rng.random() < damaged:
                passed_over += 1
            found = self._vault.choose(passed_over)
            process.feed(CheckpointChosen(FOLDER, found), b"chosen")

        process.later(process.world.rng.randint(0, 100) * MS, chosen)


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a server holds of each shard: what it was opened as, its versions, its parts'."""

    opened: Mapping[Key, object]
    shelves: Mapping[Key, Shelf]
    states: Mapping[Key, dict[int, int]]
    names: Mapping[Key, dict[int, object]]


class ShardFiles:
    """A server's part: shards are saved and restored.

    Parameters
    ----------
    process : Process
        The server's.
    core : ServerCore
        Its core.
    checks : Checks
        Of the cluster.
    held : Holdings
        What it holds.

    Attributes
    ----------
    vault : Vault
        The folder.
    """

    def __init__(self, process: Process, core: ServerCore, checks: Checks, held: Holdings) -> None:
        self._process = process
        self._core = core
        self._checks = checks
        self._held = held
        self.vault = Vault()

    def acts(self) -> Acts:
        """What is done for which effect."""
        return {SaveShard: self._save, RestoreShard: self._restore}

    def _save(self, effect: SaveShard) -> None:
        """The shard is at that version now; copies on write see to it that the file is too."""
        key, process = (effect.table, effect.shard), self._process
        states = set(self._held.states[key].values())
        if states != {effect.version}:
            raise Violation(f"{effect} of parts at {states}")
        parts = self._core.shards[key].parts
        saved = Saved(effect.table, effect.version, parts[0][0], parts[-1][1])
        is_written = process.world.rng.random() >= self._checks.reference.scenario.damaged

        def stored(_: object) -> None:
            process.network.count("saved" if is_written else "not saved")
            if is_written:
                self.vault.put(effect.path, saved)
            text = "" if is_written else "no space left"
            digest = bytes(32 * is_written)
            event = ShardStored(*key, effect.version, effect.path, 1, digest, text)
            process.feed(event, b"stored")

        process.later(process.world.rng.randint(0, 100) * MS, stored)

    def _restore(self, effect: RestoreShard) -> None:
        key, process, held = (effect.table, effect.shard), self._process, self._held
        mine = held.opened[key]

        def restored(_: object) -> None:
            if held.opened.get(key) is not mine:
                return
            table = self.vault.manifests[effect.version].tables[effect.table]
            reference = self._checks.reference
            for part, (start, _stop) in enumerate(self._core.shards[key].parts):
                value = reference.version(effect.table, start, table.version)
                held.names[key][part] = value
                held.states[key][part] = table.version
                held.shelves[key].put(table.version, part, value, is_busy=False)
            self._checks.on_restored(self._core.view, key, table.version)
            process.network.count("restored")
            norm = math.nan if table.norm is None else table.norm
            event = ShardRestored(*key, table.version, table.state, norm)
            process.feed(event, b"restored")

        process.later(process.world.rng.randint(0, 100) * MS, restored)
