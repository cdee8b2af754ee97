"""Shards that a server writes to checkpoints: when, and that the scheduler hears of it.

Part of `treefold.server.core` in a file of its own; just as pure. Effects are appended to the
core's list.
"""

import re
from collections.abc import Mapping

from treefold.common.spec import Rule, TableSpec
from treefold.server.effects import Effect, SaveShard, ShardStored
from treefold.server.holding import Kept, Shard
from treefold.wire.exchange import SCHEDULER, Send
from treefold.wire.membership import MS, Membership
from treefold.wire.messages import SavedSeen, ShardSaved
from treefold.wire.words import Need

RETRY_MS = 500
AGAIN_MS = (
    10_000  # a table without rounds has one version, whose file is tried again after a failure
)
Key = tuple[int, int, int]
"""Table, shard and version."""


class Saves:
    """What is being saved, or is saved and the scheduler does not know it yet.

    Parameters
    ----------
    membership : Membership
        Who this server is, and how often shards are saved.
    out : list of Effect
        The core's effects.
    """

    def __init__(self, membership: Membership, out: list[Effect]) -> None:
        self._membership = membership
        self._out = out
        self._begun: dict[Key, Kept] = {}
        self._told: dict[Key, ShardSaved] = {}
        self._retry_ns: int | None = None
        self._again: dict[tuple[int, int], int] = {}
        self._is_any_apart = self._is_any_folded = False

    @property
    def is_busy(self) -> bool:
        """Whether something is to be finished before this server may go."""
        return bool(self._begun or self._told)

    def know(self, spec: TableSpec) -> None:
        """The job has this table."""
        self._is_any_apart |= spec.is_asynchronous
        self._is_any_folded |= spec.rule is Rule.OPTIMIZER and not spec.is_asynchronous

    def save(self, shard: Shard) -> None:
        """A version is whole here: save it, if one is due."""
        version = shard.version
        is_due = version % max(1, self._membership.checkpoint_every) == 0
        if self._is_any_apart and shard.spec.rule is Rule.OPTIMIZER and version > 0:
            # Within a pass shards have other contributions in them.
            is_due = not shard.spec.is_asynchronous and version == shard.pass_floor + 1
        if is_due:
            self._save(shard)

    def end_pass(self, shard: Shard, need: Need | None) -> None:
        """Somebody asks for the version of a shard with which a pass over the data ends.

        Of an asynchronous table that is the newest one, if nobody has said so of this pass before.
        """
        if need is None or not need.active or need.floor <= shard.pass_floor:
            return
        shard.pass_floor = need.floor
        if shard.spec.is_asynchronous and shard.applied.front == need.floor:  # not of a later pass
            self._save(shard)
        elif not shard.spec.is_asynchronous and shard.version > 0 and shard.is_settled:
            self.save(shard)

    def _save(self, shard: Shard) -> None:
        if not self._membership.checkpoint_every or not shard.chain.is_primary:
            return
        version = shard.version
        key = (shard.table, shard.number, version)
        if key in self._begun or key in self._told:
            return
        self._begun[key] = shard.kept[version]
        self._count()
        name = re.sub(r"[^A-Za-z0-9.-]", "_", shard.spec.name)
        who = f"{self._membership.job:x}-{self._membership.incarnation}"
        is_beside = shard.spec.is_asynchronous and self._is_any_folded and version > 0
        checkpoint = shard.pass_floor + 1 if is_beside else version
        path = f"{checkpoint:08d}/t{shard.table}.{name}-{shard.number}-{who}.safetensors"
        folder = self._membership.checkpoint
        self._out.append(SaveShard(shard.table, shard.number, version, folder, path))

    def on_stored(self, now_ns: int, event: ShardStored, shard: Shard | None) -> None:
        """The file is written, or could not be: tell the scheduler."""
        key = (event.table, event.shard, event.version)
        kept = self._begun.pop(key, None)
        if kept is None:
            return
        if event.text and shard is not None and shard.spec.rule is Rule.CONSTANT:
            self._again[event.table, event.shard] = now_ns + AGAIN_MS * MS
        is_needed = event.shard == 0 or (shard is not None and shard.spec.is_asynchronous)
        state = kept.state if is_needed else b""
        self._told[key] = ShardSaved(
            self._membership.incarnation, event.table, event.shard, event.version, event.path,
            event.nbytes, event.sha256, state, kept.norm, event.text,
        )  # fmt: skip
        self._tell(now_ns)

    def on_seen(self, message: SavedSeen) -> None:
        """The scheduler knows."""
        self._told.pop((message.table, message.shard, message.version), None)
        self._count()

    def forget(self) -> None:
        """This server is another one now."""
        self._begun.clear()
        self._told.clear()
        self._again.clear()
        self._count()

    def next_deadline_ns(self) -> int | None:
        """When the scheduler is to be told again."""
        times = list(self._again.values())
        if self._told and self._retry_ns is not None:
            times.append(self._retry_ns)
        return min(times, default=None)

    def retry(self, now_ns: int, shards: Mapping[tuple[int, int], Shard]) -> None:
        """Tell again what was not answered, and try again what has to be there."""
        for key in [key for key, due_ns in self._again.items() if now_ns >= due_ns]:
            del self._again[key]
            if key in shards:
                self.save(shards[key])
        if self._told and self._retry_ns is not None and now_ns >= self._retry_ns:
            self._tell(now_ns)

    def _tell(self, now_ns: int) -> None:
        self._retry_ns = now_ns + RETRY_MS * MS
        self._out += [Send(SCHEDULER, message) for message in self._told.values()]

    def _count(self) -> None:
        self._membership.vitals.saving = len(self._begun) + len(self._told)
