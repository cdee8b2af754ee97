"""A status as tables that a person reads."""

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from treefold.common.spans import spans
from treefold.launch.link import CheckpointStatus, MemberStatus, ShardStatus, Status, TableStatus

MIB = 1 << 20


def print_status(status: Status, console: Console) -> None:
    """Print who is there, what is where, and what is waited for.

    Parameters
    ----------
    status : Status
        The scheduler's.
    console : Console
        Where to.
    """
    parts: list[RenderableType] = [Text(_summary(status), style="bold"), _members(status)]
    parts += [_table(table) for table in status.tables]
    waiting = [member for member in status.members if member.waiting]
    waits = [f"{member.name} waits for {member.waiting}" for member in waiting]
    if status.phase == "forming":
        waits.insert(0, _missing(status))
    parts += [Text(line) for line in waits]
    if status.metrics:
        parts.append(Text(f"metrics at http://{status.metrics}/metrics, of all at /targets"))
    console.print(Group(*parts))


def checkpoint_words(known: CheckpointStatus | None) -> list[str]:
    """What there is to say of the checkpoints of a job.

    Parameters
    ----------
    known : CheckpointStatus or None
        What the scheduler says of them.
    """
    if known is None:
        return []
    words = [f"checkpoint of version {known.newest} in {known.folder}"]
    if known.newest is None:
        words = [f"no checkpoint in {known.folder} yet"] if known.folder else []
    if known.source is not None:
        words.append(f"began from version {known.source.version} in {known.source.folder}")
    return words + ([f"{known.saving} shards are being saved"] if known.saving else [])


def _summary(status: Status) -> str:
    words = [f"{status.phase}, view {status.view}, round {status.round}"]
    if status.plan is not None and status.plan.kind == "slots":
        words[0] += f" of {status.plan.end_round} (epoch {status.plan.epoch})"
    if status.slots:
        words.append(f"{status.slots} slots, {status.rounds_per_second:.1f} rounds/s")
    words += checkpoint_words(status.checkpoint)
    if status.ending is not None:
        words.append(f"{status.ending.outcome}: {status.ending.text}")
    return "; ".join(words)


def _missing(status: Status) -> str:
    there = {role: len(status.live(role)) for role in ("server", "worker")}
    expected = status.expected
    return (
        f"the cluster waits for members: {there['server']} of {expected.servers} servers and "
        f"{there['worker']} of {expected.workers} workers are there"
    )


def _members(status: Status) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("member", "state", "process"):
        table.add_column(title)
    for title in ("seen", "round", "ms/slot", "samples", "loss", "MiB", "cpu %"):
        table.add_column(title, justify="right")
    table.add_column("slots or shards")
    for member in status.members:
        table.add_row(*_cells(member), _held(status, member))
    return table


def _cells(member: MemberStatus) -> tuple[str, ...]:
    is_worker = member.role == "worker"
    return (
        member.name,
        "draining" if member.is_live and member.is_draining else member.state,
        f"{member.host}:{member.pid}",
        f"{member.seen_ms_ago / 1000:.1f} s ago",
        str(member.round),
        f"{member.slot_time_ms:.1f}" if is_worker else "",
        f"{member.samples:,}" if is_worker else "",
        "" if member.loss is None else f"{member.loss:.4f}",
        f"{member.rss_bytes / MIB:.0f}",
        f"{member.cpu_percent:.0f}",
    )


def _held(status: Status, member: MemberStatus) -> str:
    if member.role == "worker":
        return spans(member.slots)
    found = [
        f"{table.name} {spans(shards)}"
        for table in status.tables
        if (shards := [shard.shard for shard in table.shards if shard.server == member.name])
    ]
    return ", ".join(found) if member.is_live else ""


def _chain(shard: ShardStatus) -> str:
    """The servers of a shard: its primary, those in sync, and those that are being copied to."""
    synced = "+".join([shard.server, *shard.backups])
    return synced + "".join(f" copying to {name}" for name in shard.joining)


def _table(table: TableStatus) -> Text:
    optimizer = f", {table.optimizer}" if table.optimizer else ""
    shards = [f"{s.shard} on {_chain(s)} ({s.blocks} blocks)" for s in table.shards]
    text = f"table {table.name}: {table.tensors} tensors, {table.elements:,} elements{optimizer}"
    text += f"; shards {', '.join(shards) or 'not placed yet'}"
    if table.consistency.startswith("quorum"):
        text += f"; {table.consistency}, {table.missed} slots came too late"
    elif table.consistency != "sync":
        stale = [f"{who} {one.median} (p99 {one.p99})" for who, one in table.staleness.items()]
        text += f"; {table.consistency}, staleness {', '.join(stale) or 'not known yet'}"
    if (table.health, table.aggregation) != ("off", "mean"):
        text += f"; health {table.health}, {table.aggregation}: {_unhealthy(table)}"
    return Text(text)


def _unhealthy(table: TableStatus) -> str:
    """How many gradients of which workers were not what is usual."""
    found = [
        f"{who} {', '.join(f'{count} {reason}' for reason, count in counts.items())}"
        for who, counts in table.unhealthy.items()
    ]
    skipped = f"; {table.rounds_skipped} rounds skipped" if table.rounds_skipped else ""
    return ("; ".join(found) or "all usual") + skipped
