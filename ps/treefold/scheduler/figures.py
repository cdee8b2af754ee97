"""What a scheduler can be asked for: the state of its core, and what its tally has counted."""

import calendar
import time
from collections.abc import Iterator, Sequence

from treefold.common.metrics import NS, Reading
from treefold.scheduler.core import SchedulerCore
from treefold.scheduler.effects import ManifestWritten, WriteManifest
from treefold.scheduler.robust import Fault
from treefold.transport.tally import Tally, of_traffic
from treefold.transport.traffic import Traffic
from treefold.wire.decisions import HealthReport, NormReport, QuorumReport
from treefold.wire.exchange import Received
from treefold.wire.messages import (
    DeclarePlan,
    DeclareTable,
    DrainRequest,
    Heartbeat,
    Leave,
    Register,
    RoundLate,
    ShardSaved,
)
from treefold.wire.words import Role

MEMBERS = (Role.SERVER, Role.WORKER)
SPANS: dict[type, str] = {
    Heartbeat: "heartbeat", Register: "register", DeclareTable: "declare", DeclarePlan: "declare",
    RoundLate: "late round", NormReport: "norm", QuorumReport: "quorum", HealthReport: "health",
    ShardSaved: "checkpoint",
    Leave: "leave", DrainRequest: "drain", ManifestWritten: "checkpoint",
}  # fmt: skip
"""What a scheduler's timeline shows of the messages that it gets."""


class SchedulerTally(Tally):
    """A scheduler's metrics.

    Parameters
    ----------
    core : SchedulerCore
        Decides.
    traffic : Traffic
        What went by the sockets.
    """

    def __init__(self, core: SchedulerCore, traffic: Traffic) -> None:
        super().__init__(SPANS)
        self._core = core
        self._traffic = traffic
        self._bytes: dict[int, int] = {}
        self._newest_bytes = 0
        self._newest_s = 0.0
        self._written = {"ok": 0, "failed": 0}
        self._beats_ns: dict[int, int] = {}
        self._missed: dict[Role, int] = dict.fromkeys(MEMBERS, 0)

    def offered(self, address: str) -> None:
        """Say it to those who ask for the status."""
        self._core.metrics = address

    def see(self, event: object, effects: Sequence[object], began_ns: int, ended_ns: int) -> None:
        """Count messages, beats that did not come, and checkpoints."""
        super().see(event, effects, began_ns, ended_ns)
        if isinstance(event, Received) and isinstance(event.message, Heartbeat):
            self._hear(event.message.incarnation, began_ns)
        if isinstance(event, ManifestWritten):
            size = self._bytes.pop(event.version, 0)
            self._written["failed" if event.text else "ok"] += 1
            if not event.text:
                self._newest_bytes = size
                self._newest_s = float(calendar.timegm(time.gmtime()))  # nothing is decided by it
        for effect in effects:
            if isinstance(effect, WriteManifest):
                files = [file for table in effect.manifest.tables for file in table.files]
                self._bytes[effect.manifest.version] = sum(file.nbytes for file in files)

    def _hear(self, who: int, now_ns: int) -> None:
        """Count the beats that should have come since the last one of a member."""
        state = self._core.roster.by_incarnation.get(who)
        if state is None or not state.is_live:
            self._beats_ns.pop(who, None)
            return
        quiet_ns = now_ns - self._beats_ns.get(who, now_ns)
        self._beats_ns[who] = now_ns
        self._missed[state.member.role] += max(0, quiet_ns // self._core.limits.heartbeat_ns - 1)

    def readings(self) -> Iterator[Reading]:
        """Everything that a scheduler can be asked for."""
        yield from super().readings()
        yield from of_traffic(self._traffic)
        core = self._core
        yield Reading("cluster_view", core.view.number)
        yield Reading("cluster_slots", len(core.view.leases.workers))
        beats = [state.beat for state in core.roster.live(Role.WORKER)]
        newest = max((beat.round for beat in beats if beat is not None), default=0)
        yield Reading("cluster_round", newest)
        yield Reading("slots_late_total", core.quorums.missed)
        yield from self._of_health()
        yield Reading("failovers_total", core.chains.promotions, ("server",))
        yield Reading("rollbacks_total", core.rollback.count)
        yield from self._of_members()
        if core.limits.checkpoint:
            yield from self._of_checkpoints()

    def _of_health(self) -> Iterator[Reading]:
        """Of tables that look at contributions."""
        for number, tally in self._core.health.tallies.items():
            table = self._core.tables[number].spec.name
            for worker, counts in tally.faults.items():
                for reason, count in counts.items():
                    yield Reading("gradients_unhealthy_total", count, (table, worker, reason))
            for fault in Fault:
                count = tally.left_out.get(fault.value, 0)
                yield Reading("gradients_left_out_total", count, (table, fault.value))
            yield Reading("rounds_skipped_total", tally.skipped, (table,))

    def _of_members(self) -> Iterator[Reading]:
        roster, now_ns = self._core.roster, time.monotonic_ns()
        counts: dict[tuple[str, str], int] = {}
        for state in roster.by_incarnation.values():
            key = state.member.role.name.lower(), state.life.name.lower()
            counts[key] = counts.get(key, 0) + 1
        for role in MEMBERS:
            word = role.name.lower()
            for life in ("live", "dead", "left"):
                yield Reading("cluster_nodes", counts.get((word, life), 0), (word, life))
            yield Reading("members_lost_total", roster.lost[role], (word,))
            yield Reading("heartbeats_missed_total", self._missed[role], (word,))
        held: dict[int, int] = {}
        for holder in self._core.view.leases.workers:
            held[holder] = held.get(holder, 0) + 1
        for state in roster.live():
            silent_ns = max(0, now_ns - state.seen_ns)
            yield Reading("member_silence_seconds", silent_ns / NS, (state.name,))
            if state.member.role is Role.WORKER:
                yield Reading("slots", held.get(state.member.incarnation, 0), (state.name,))
                yield Reading("slot_duration_seconds", state.slot_time_ns / NS, (state.name,))

    def _of_checkpoints(self) -> Iterator[Reading]:
        for status, count in self._written.items():
            yield Reading("checkpoints_total", count, (status,))
        yield Reading("checkpoint_last_bytes", self._newest_bytes)
        yield Reading("checkpoint_last_success_timestamp_seconds", self._newest_s)
        if self._core.checkpoints.newest >= 0:
            yield Reading("checkpoint_version", self._core.checkpoints.newest)

    def targets(self) -> list[tuple[str, str]]:
        """Where live members offer their metrics."""
        return [
            (state.beat.metrics, state.name)
            for state in self._core.roster.live()
            if state.beat is not None and state.beat.metrics
        ]
