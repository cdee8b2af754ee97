"""Shards to files of checkpoints and back, beside the rounds.

A shard is copied unit by unit, by a thread beside the shell's, or by the shell itself when it is
about to step a unit that is not copied yet. So the file has one version of all of them, and a round
waits for the copy of one unit at most.
"""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from treefold.checkpoint.shards import ShardReader, write_shard
from treefold.checkpoint.store import Store
from treefold.common.background import Background
from treefold.common.errors import CheckpointError, TreefoldError, UnsupportedError
from treefold.server.effects import (
    RestoreShard,
    SaveShard,
    ServerFailed,
    ShardRestored,
    ShardStored,
)
from treefold.server.shard import ShardState

if TYPE_CHECKING:
    from treefold.common.unit_state import UnitState


class Saving:
    """One version of one shard on its way to a file.

    Parameters
    ----------
    effect : SaveShard
        What is wanted.
    state : ShardState
        The shard, at that version.

    Attributes
    ----------
    path : str
        Of the file, which is no other saving's.
    """

    def __init__(self, effect: SaveShard, state: ShardState) -> None:
        self.path = effect.path
        self._effect = effect
        self._state = state
        self._lock = threading.Lock()
        self._copies: list[UnitState | None] = [None] * len(state.units())
        self._left = len(self._copies)
        self._failure = ""

    def keep(self, unit: int) -> None:
        """Copy a unit, if that is not done yet: it is about to change, or its turn has come."""
        if not self._left:
            return
        with self._lock:
            if not self._left or self._copies[unit] is not None:  # it may be over by now
                return
            try:
                self._copies[unit] = self._state.export_unit(unit)
            except UnsupportedError as error:  # a checkpoint less; the round goes on
                self._failure = str(error)
                self._left = 0
            else:
                self._left -= 1

    def run(self) -> ShardStored:
        """Copy what is left and write the file; for a thread of its own."""
        effect = self._effect
        try:
            for unit in range(len(self._copies)):
                self.keep(unit)
            if self._failure:
                return self._stored(0, b"", self._failure)
            copies = [copy for copy in self._copies if copy is not None]
            nbytes, digest = write_shard(
                Store(effect.folder), effect.path, self._state.spec, copies
            )
        except Exception as error:  # filesystems of other packages raise what they like
            return self._stored(0, b"", f"{type(error).__name__}: {error}")
        finally:
            self._copies.clear()
        return self._stored(nbytes, bytes.fromhex(digest), "")

    def _stored(self, nbytes: int, sha256: bytes, text: str) -> ShardStored:
        effect = self._effect
        return ShardStored(
            effect.table, effect.shard, effect.version, effect.path, nbytes, sha256, text
        )


@dataclass(frozen=True, slots=True)
class Restored:
    """A shard that has its values again, unless the event says otherwise."""

    state: ShardState
    event: ShardRestored | ServerFailed


def restore(effect: RestoreShard, state: ShardState) -> Restored:
    """Give a shard the values of a checkpoint; for a thread of its own."""
    try:
        store = Store(effect.folder)
        manifest = store.manifest(effect.version)
        found = [table for table in manifest.tables if table.spec.name == state.spec.name]
        if not found:
            where = f"{effect.version:08d}/manifest.json"
            raise CheckpointError(where, f"it has no table {state.spec.name!r}")
        table = found[0]
        reader = ShardReader(store, table)
        for unit, copy in enumerate(reader.units(state.units())):
            state.import_unit(unit, copy)
    except (TreefoldError, OSError) as error:
        text = f"shard {effect.shard} of {state.spec.name} cannot be restored: {error}"
        return Restored(state, ServerFailed(text))
    norm = float("nan") if table.norm is None else table.norm
    event = ShardRestored(effect.table, effect.shard, table.version, table.state, norm)
    return Restored(state, event)


class ShardFiles:
    """The files that a server is writing and reading, in a thread of their own.

    Parameters
    ----------
    ring : callable
        Wakes the shell when a file is done.
    """

    def __init__(self, ring: Callable[[], None]) -> None:
        self._background: Background[ShardStored | Restored] = Background("treefold-files", ring)
        self._savings: dict[tuple[int, int], Saving] = {}

    def begin(self, effect: SaveShard | RestoreShard, state: ShardState) -> list[ShardStored]:
        """Begin with a file; what cannot even begin is answered at once."""
        key = effect.table, effect.shard
        if isinstance(effect, RestoreShard):
            self._background.do(lambda: restore(effect, state))
            return []
        if key in self._savings:
            text = "the file before is still being written"
            return [ShardStored(*key, effect.version, effect.path, 0, b"", text)]
        saving = self._savings[key] = Saving(effect, state)
        self._background.do(saving.run)
        return []

    def keep(self, key: tuple[int, int], units: Iterable[int]) -> None:
        """Copy units that are about to change, if they are being saved."""
        saving = self._savings.get(key)
        for unit in units if saving is not None else ():
            if saving is not None:
                saving.keep(unit)

    def close(self, key: tuple[int, int]) -> None:
        """The shard is held elsewhere from now on; its file is finished with what there is."""
        self._savings.pop(key, None)

    def done(self) -> list[ShardStored | Restored]:
        """Files that are written or read since the last call."""
        found = self._background.events()
        for one in found:
            if isinstance(one, ShardStored):
                key = one.table, one.shard
                if key in self._savings and self._savings[key].path == one.path:
                    del self._savings[key]
        return found

    def end(self) -> None:
        """The process ends."""
        self._background.close(0.0)
