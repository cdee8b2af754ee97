"""When a round is late: what a server tells the scheduler, so that idle workers help.

Part of `treefold.server.core` in a file of its own; just as pure. A round begins for a server when
somebody waits for its version, and is open when the first of it has come. All shards are watched,
since a worker may hang between two of them, but a round is reported once for all of them.
"""

from collections.abc import Mapping

from treefold.common.spec import Rule
from treefold.server.holding import Shard
from treefold.wire.membership import MS
from treefold.wire.words import INITIAL_ROUND

LATE_AFTER_MS = 100  # a round is never called late before, so that tiny rounds cause no chatter


def begin(now_ns: int, shard: Shard) -> None:
    """Somebody waits for the round's version: late is half as long again as usual."""
    _arm(shard, now_ns + max(LATE_AFTER_MS * MS, shard.round_time_ns * 3 // 2))


def open_round(now_ns: int, shard: Shard) -> None:
    """The first contribution is here, so the others should not be far."""
    _arm(shard, now_ns + _period_ns(shard))


def reports(now_ns: int, shards: Mapping[tuple[int, int], Shard]) -> list[tuple[int, list[int]]]:
    """Rounds that are late now, with their missing slots; an empty list means all."""
    due = [s.version for s in shards.values() if s.late_ns is not None and now_ns >= s.late_ns]
    found = []
    for number in sorted(dict.fromkeys(due)):
        missing: dict[int, None] = {}
        is_late = is_unopened = False
        for shard in shards.values():
            if shard.late_ns is None or shard.version != number:
                continue
            current = shard.round
            is_open = current is not None and (current.active > 0 or bool(current.leaves))
            is_wanted = is_open or bool(shard.waits)
            if current is None or not current.is_collecting or not is_wanted:
                shard.late_ns = None
                continue
            shard.late_ns = now_ns + _period_ns(shard)
            is_late = True
            is_unopened |= not is_open
            missing |= dict.fromkeys(current.missing())
        if is_late:
            found.append((number, [] if is_unopened else sorted(missing)))
    return found


def _period_ns(shard: Shard) -> int:
    return max(LATE_AFTER_MS * MS, shard.round_time_ns // 2)


def _arm(shard: Shard, at_ns: int) -> None:
    if shard.spec.rule is Rule.OPTIMIZER and shard.version != INITIAL_ROUND:
        shard.late_ns = at_ns if shard.late_ns is None else min(at_ns, shard.late_ns)
