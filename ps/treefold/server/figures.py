"""What a server can be asked for: the state of its core, and what its tally has counted."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from treefold.common.metrics import Durations, Reading, staleness
from treefold.common.spec import Rule
from treefold.server.core import ServerCore
from treefold.server.effects import SaveShard, ShardStored
from treefold.server.holding import Shard
from treefold.server.published import BUFFERS
from treefold.server.shard import ShardState
from treefold.transport.body import Body
from treefold.transport.tally import Tally, of_traffic
from treefold.transport.traffic import Traffic
from treefold.wire.chain import ChainApplied, ChainRound, UnitCopy
from treefold.wire.messages import Pull, Push, Refused, RoundHyper, RoundMeta

if TYPE_CHECKING:
    from treefold.wire.words import Code

CONTRIBUTIONS = (Push, RoundHyper, RoundMeta)
SPANS: dict[type, str] = {
    Push: "push", Pull: "pull", RoundHyper: "hyper", RoundMeta: "hyper",
    ChainRound: "chain", ChainApplied: "chain", UnitCopy: "chain",
}  # fmt: skip
"""What a server's timeline shows of the messages that it gets."""
ELEMENT_BYTES = 4
Key = tuple[int, int]
"""Table and shard."""


class ServerTally(Tally):
    """A server's metrics.

    Parameters
    ----------
    core : ServerCore
        Decides.
    body : Body
        What members have alike.
    states : mapping of (table, shard) to ShardState
        The tensors.
    traffic : Traffic
        What went by the sockets.
    """

    def __init__(
        self, core: ServerCore, body: Body, states: Mapping[Key, ShardState], traffic: Traffic
    ) -> None:
        super().__init__(SPANS, body.spent)
        self._core = core
        self._body = body
        self._states = states
        self._traffic = traffic
        self._rejected: dict[Code, int] = {}
        self._began_ns: dict[tuple[int, int, int], int] = {}
        self._saves = Durations()
        self._saved_bytes = 0

    def offered(self, address: str) -> None:
        """Tell the scheduler, with the next heartbeat."""
        self._body.membership.vitals.metrics = address

    def rank(self) -> int:
        """The member's rank."""
        return self._body.rank

    def see(self, event: object, effects: Sequence[object], began_ns: int, ended_ns: int) -> None:
        """Count messages, and files of checkpoints."""
        super().see(event, effects, began_ns, ended_ns)
        if isinstance(event, ShardStored):
            begun_ns = self._began_ns.pop((event.table, event.shard, event.version), None)
            if begun_ns is not None and not event.text:
                self._saves.add(began_ns - begun_ns)
                self._saved_bytes += event.nbytes
        for effect in effects:
            if isinstance(effect, SaveShard):
                self._began_ns[effect.table, effect.shard, effect.version] = ended_ns

    def refuse(self, kind: type, refusal: Refused) -> None:
        """Count why a contribution does not count."""
        if kind in CONTRIBUTIONS:
            self._rejected[refusal.code] = self._rejected.get(refusal.code, 0) + 1

    def readings(self) -> Iterator[Reading]:
        """Everything that a server can be asked for."""
        yield from super().readings()
        yield from self._body.readings()
        yield from of_traffic(self._traffic)
        shards = list(self._core.shards.values())
        waits = sum(len(shard.waits) for shard in shards)
        yield Reading("queue_depth", waits, ("pulls",))
        yield Reading("queue_depth", sum(len(shard.staged) for shard in shards), ("staged",))
        yield from self._of_parts(shards)
        for shard in shards:
            yield from self._of_shard(shard)
        yield from self._of_tables(shards)
        yield from self._of_contributions()
        yield Reading("checkpoint_duration_seconds", self._saves.counts())
        yield Reading("checkpoint_written_bytes_total", self._saved_bytes)

    def _of_parts(self, shards: list[Shard]) -> Iterator[Reading]:
        joining = sum(shard.chain.is_joining for shard in shards)
        leading = sum(shard.chain.is_primary for shard in shards)
        yield Reading("shards", leading, ("primary",))
        yield Reading("shards", len(shards) - leading - joining, ("backup",))
        yield Reading("shards", joining, ("joining",))

    def _of_shard(self, shard: Shard) -> Iterator[Reading]:
        chain, labels = shard.chain, (shard.spec.name, str(shard.number))
        yield Reading("shard_version", shard.version, labels)
        if chain.is_primary and chain.backups:
            held = min(chain.applied.get(who, shard.version) for who in chain.backups)
            yield Reading("replication_lag_updates", max(0, shard.version - held), labels)

    def _of_tables(self, shards: list[Shard]) -> Iterator[Reading]:
        sizes: dict[str, list[int]] = {}
        for shard in shards:
            elements = shard.parts[-1][1] - shard.parts[0][0] if shard.parts else 0
            state = self._states.get((shard.table, shard.number))
            total = sizes.setdefault(shard.spec.name, [0, 0, 0])
            total[0] += elements
            total[1] += elements * (1 if shard.spec.rule is Rule.CONSTANT else BUFFERS)
            total[2] += 0 if state is None else state.optimizer_bytes
        for table, (elements, published, optimizer) in sizes.items():
            yield Reading("table_elements", elements, (table,))
            yield Reading("table_bytes", elements * ELEMENT_BYTES, (table, "values"))
            yield Reading("table_bytes", published * ELEMENT_BYTES, (table, "published"))
            yield Reading("table_bytes", optimizer, (table, "optimizer"))

    def _of_contributions(self) -> Iterator[Reading]:
        exchange, specs = self._core.exchange, self._core.specs
        own = exchange.asynchronous
        for (table, shard), (updates, contributions) in exchange.made.items():
            labels = (specs[table].name, str(shard))
            yield Reading("updates_applied_total", updates, labels)
            yield Reading("contributions_applied_total", contributions, labels)
        yield Reading("contributions_duplicate_total", exchange.duplicates + own.duplicates)
        yield Reading("contributions_late_total", exchange.quorum.late)
        for code, count in self._rejected.items():
            yield Reading("updates_rejected_total", count, (code.name.lower(),))
        if any(spec.consistency.staleness_max for spec in specs.values()):
            yield Reading("updates_rejected_total", own.too_stale, ("too_stale",))
        for labels, (classes, total) in self._staleness().items():
            yield Reading("staleness_steps", staleness(classes, total), labels)

    def _staleness(self) -> dict[tuple[str, str], tuple[list[int], int]]:
        """By table and worker; one that took the place of another goes on counting there."""
        own, members = self._core.exchange.asynchronous, self._core.members
        found: dict[tuple[str, str], tuple[list[int], int]] = {}
        for (table, worker), classes in own.stale.items():
            labels = self._core.specs[table].name, members.get(worker, str(worker))
            known, total = found.get(labels, ([0] * len(classes), 0))
            counts = [sum(pair) for pair in zip(known, classes, strict=True)]
            found[labels] = counts, total + own.sums[table, worker]
        return found
