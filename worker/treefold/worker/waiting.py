"""What a worker waits for, in words."""

from collections.abc import Iterable

from treefold.wire.messages import View
from treefold.wire.words import Need
from treefold.worker.pulls import ShardPull, Table


def describe(tables: Iterable[Table], view: View | None) -> str:
    """What the first pull that is not answered waits for; empty if there is none."""
    for table in tables:
        for shard, pull in table.pulls.items():
            if not pull.is_complete:
                return _describe(view, table, shard, pull)
    return ""


def _describe(view: View | None, table: Table, shard: int, pull: ShardPull) -> str:
    names = {m.incarnation: f"server-{m.rank}" for m in view.members} if view else {}
    place = table.shard(shard)
    server = names.get(place.server, "a server that is gone") if place else "no server yet"
    what = f"version {pull.version}" if pull.need is None else _need(pull.need)
    text = f"{what} of table {table.spec.name} shard {shard} from {server}"
    if pull.status is None:
        return text
    is_whole = not pull.status.missing and not pull.status.is_meta_missing
    if is_whole and pull.need is not None and pull.need.floor:
        return f"{text}, which lacks slots of other workers"
    if is_whole:
        whom = "the scheduler or its chain" if table.spec.is_quorum else "its chain"
        return f"{text}, which has all of round {pull.status.round} and waits for {whom}"
    slots = sorted({slot: None for missing in pull.status.missing for slot in missing.slots})
    lacks = ", ".join(map(str, slots)) or "all"
    return f"{text}, which lacks slots {lacks} of round {pull.status.round}"


def _need(need: Need) -> str:
    """What must be in a version."""
    own = f"slot {need.slot} of round {need.clock - 1}" if need.clock else ""
    others = f"all slots up to round {need.floor - (not need.active)}" if need.slots else ""
    return f"a version with {' and '.join(text for text in (own, others) if text)}"
