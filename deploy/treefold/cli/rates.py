"""One status after the other as rates and shares of time: what ``treefold top`` shows.

Rates need two reports of a member, so the first status has none. Times are those at which the
scheduler heard of a member, not those at which it was asked.
"""

from collections import deque
from dataclasses import dataclass, field

import msgspec

from treefold.cli.display import RATE_NS, Meter, WorkerRow
from treefold.launch.link import (
    CheckpointStatus,
    Ending,
    EventStatus,
    Expected,
    MemberStatus,
    Status,
    TableStatus,
)

MS_NS = 1_000_000
WAITS = ("wait", "await")  # for a slot and its version, and in the loop body for parts of one
ACTIVITIES = {
    "worker": ("compute", "push", "pull", "wait"),
    "server": ("fold", "optimizer", "publish", "checkpoint"),
}
"""What the time of the thread that does the work goes into, by role."""


class WorkerLook(msgspec.Struct, frozen=True):
    """A live worker; ``shares`` of its time add up to 1 at most."""

    name: str
    host: str
    slots: list[int]
    round: int
    samples_per_second: float
    loss: float | None
    shares: dict[str, float]
    waiting: str
    rss_bytes: int
    cpu_percent: float
    is_draining: bool


class ServerLook(msgspec.Struct, frozen=True):
    """A live server: of how many shards it is the primary or a backup, and how many blocks."""

    name: str
    host: str
    primaries: int
    backups: int
    joining: int
    blocks: int
    round: int
    shares: dict[str, float]
    waiting: str
    rss_bytes: int
    cpu_percent: float
    is_draining: bool


class TableLook(msgspec.Struct, frozen=True):
    """A table; ``staleness`` is the worst p99 of a worker, None where there is none."""

    name: str
    consistency: str
    elements: int
    shards: int
    joining: int
    missed: int
    staleness: int | None


class Look(msgspec.Struct, frozen=True):
    """A cluster at one time; ``docs/cli.md`` describes the fields."""

    at: float
    scheduler: str
    silent_s: float
    phase: str
    view: int
    job: int
    round: int
    end_round: int | None
    epoch: int | None
    epoch_progress: float | None
    rounds_per_second: float
    samples_per_second: float
    loss: float | None
    slots: int
    expected: Expected
    gone: list[str]
    workers: list[WorkerLook]
    servers: list[ServerLook]
    tables: list[TableLook]
    checkpoint: CheckpointStatus | None
    events: list[EventStatus]
    ending: Ending | None


@dataclass(slots=True)
class Shares:
    """Shares of one member's time in the last seconds, from what it says that it spent."""

    role: str
    _seen: deque[tuple[int, dict[str, float]]] = field(default_factory=deque)

    def see(self, at_ns: int, spent_s: dict[str, float]) -> dict[str, float]:
        """Take in a report that was made at ``at_ns``; returns the shares, by activity."""
        known = self._by_activity(spent_s)
        if not self._seen or self._seen[-1][1] != known or at_ns - self._seen[-1][0] > RATE_NS:
            self._seen.append((at_ns, known))
        while len(self._seen) > 2 and at_ns - self._seen[1][0] > RATE_NS:
            self._seen.popleft()
        (then_ns, then), (newest_ns, newest) = self._seen[0], self._seen[-1]
        took_s = (newest_ns - then_ns) / 1e9
        if took_s <= 0:
            return {}
        shares = {what: max(0.0, newest[what] - then[what]) / took_s for what in newest}
        over = max(1.0, sum(shares.values()))  # reports are not made at the instant they name
        return {what: round(share / over, 3) for what, share in shares.items()}

    def _by_activity(self, spent_s: dict[str, float]) -> dict[str, float]:
        found = {what: spent_s.get(what, 0.0) for what in ACTIVITIES[self.role]}
        if "wait" in found:
            found["wait"] = sum(spent_s.get(what, 0.0) for what in WAITS)
        return found


class Lens:
    """Turns one status after the other into looks.

    Parameters
    ----------
    scheduler : str
        The address that is asked.
    """

    def __init__(self, scheduler: str) -> None:
        self._scheduler = scheduler
        self._meter = Meter()
        self._shares: dict[int, Shares] = {}

    def look(self, now_ns: int, at: float, status: Status) -> Look:
        """What a status says.

        Parameters
        ----------
        now_ns : int
            When it came, by the monotonic clock.
        at : float
            The same in seconds since 1970.
        status : Status
            The scheduler's.
        """
        progress = self._meter.read(now_ns, status, {})
        rows = {row.name: row for row in progress.rows}
        is_counted = progress.end_round > 0
        return Look(
            at=round(at, 3),
            scheduler=self._scheduler,
            silent_s=0.0,
            phase=status.phase,
            view=status.view,
            job=status.job,
            round=status.round,
            end_round=progress.end_round if is_counted else None,
            epoch=progress.epoch if is_counted else None,
            epoch_progress=_epoch_progress(status),
            rounds_per_second=status.rounds_per_second,
            samples_per_second=round(progress.speed, 3),
            loss=progress.loss,
            slots=status.slots,
            expected=status.expected,
            gone=[member.name for member in status.members if member.state == "dead"],
            workers=[self._worker(now_ns, one, rows[one.name]) for one in status.live("worker")],
            servers=[self._server(now_ns, one, status) for one in status.live("server")],
            tables=[_table(table) for table in status.tables],
            checkpoint=status.checkpoint,
            events=status.events,
            ending=status.ending,
        )

    def _seen(self, now_ns: int, member: MemberStatus) -> dict[str, float]:
        known = self._shares.setdefault(member.incarnation, Shares(member.role))
        return known.see(now_ns - member.seen_ms_ago * MS_NS, member.spent_s)

    def _worker(self, now_ns: int, member: MemberStatus, row: WorkerRow) -> WorkerLook:
        return WorkerLook(
            name=member.name,
            host=member.host,
            slots=member.slots,
            round=member.round,
            samples_per_second=round(row.speed, 3),
            loss=member.loss,
            shares=self._seen(now_ns, member),
            waiting=member.waiting,
            rss_bytes=member.rss_bytes,
            cpu_percent=member.cpu_percent,
            is_draining=member.is_draining,
        )

    def _server(self, now_ns: int, member: MemberStatus, status: Status) -> ServerLook:
        shards = [shard for table in status.tables for shard in table.shards]
        held = [s for s in shards if member.name in (s.server, *s.backups, *s.joining)]
        return ServerLook(
            name=member.name,
            host=member.host,
            primaries=sum(shard.server == member.name for shard in held),
            backups=sum(member.name in shard.backups for shard in held),
            joining=sum(member.name in shard.joining for shard in held),
            blocks=sum(shard.blocks for shard in held),
            round=member.round,
            shares=self._seen(now_ns, member),
            waiting=member.waiting,
            rss_bytes=member.rss_bytes,
            cpu_percent=member.cpu_percent,
            is_draining=member.is_draining,
        )


def _epoch_progress(status: Status) -> float | None:
    plan = status.plan
    if plan is None or plan.kind != "slots" or plan.end_round <= plan.first_round:
        return None
    done = (status.round - plan.first_round) / (plan.end_round - plan.first_round)
    return round(min(1.0, max(0.0, done)), 4)


def _table(table: TableStatus) -> TableLook:
    return TableLook(
        name=table.name,
        consistency=table.consistency,
        elements=table.elements,
        shards=len(table.shards),
        joining=sum(bool(shard.joining) for shard in table.shards),
        missed=table.missed,
        staleness=max((one.p99 for one in table.staleness.values()), default=None),
    )
