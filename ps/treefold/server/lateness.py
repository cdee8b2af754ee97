"""When a round is late: what a server tells the scheduler, so that idle workers help.

Part of `treefold.server.core` in a file of its own; just as pure. A round begins for a server when
somebody waits for its version, and is open when the first of it has come. All shards are watched,
since a worker may hang between two of them, but a round is reported once for all of them. Those of
an asynchronous table have no rounds; they are late with what somebody waits for to go on.
"""

from collections.abc import Mapping
from typing import NamedTuple

from treefold.common.spec import Rule
from treefold.server.holding import Shard
from treefold.wire.membership import MS
from treefold.wire.words import INITIAL_ROUND

LATE_AFTER_MS = 100  # a round is never called late before, so that tiny rounds cause no chatter


def begin(now_ns: int, shard: Shard) -> None:
    """Somebody waits for the round's version: late is half as long again as usual."""
    _arm(shard, now_ns + max(LATE_AFTER_MS * MS, _round_ns(shard) * 3 // 2))


def open_round(now_ns: int, shard: Shard) -> None:
    """The first contribution is here, so the others should not be far."""
    _arm(shard, now_ns + _period_ns(shard))


def reports(now_ns: int, shards: Mapping[tuple[int, int], Shard]) -> list[tuple[int, list[int]]]:
    """Rounds that are late now, with their missing slots; an empty list means all."""
    armed = [(_round_of(one), one) for one in shards.values() if one.late_ns is not None]
    due = [n for n, one in armed if one.late_ns is not None and now_ns >= one.late_ns]
    found = []
    for number in sorted(dict.fromkeys(due)):
        missing: dict[int, None] = {}
        is_late = is_unopened = False
        for shard in [shard for own, shard in armed if own == number]:
            lacking = _lacking(shard)
            if lacking is None:
                shard.late_ns = None
                continue
            shard.late_ns = now_ns + _period_ns(shard)
            is_late = True
            is_unopened |= not lacking.is_open
            missing |= dict.fromkeys(lacking.slots)
        if is_late:
            found.append((number, [] if is_unopened else sorted(missing)))
    return found


class _Lacking(NamedTuple):
    """Slots that a shard waits for, and whether the first one has come."""

    slots: list[int]
    is_open: bool


def _lacking(shard: Shard) -> _Lacking | None:
    """What a shard waits for; None if it is not late after all."""
    if _is_apart(shard):
        slots = [slot for slot, _ in _owed(shard)]
        return _Lacking(slots, is_open=True) if slots else None
    current = shard.round
    if current is None or not current.is_collecting:
        return None
    is_open = current.active > 0 or bool(current.leaves)
    return _Lacking(current.missing(), is_open) if is_open or shard.waits else None


def _round_of(shard: Shard) -> int:
    """The round that a shard is late with."""
    if _is_apart(shard):
        return max((round_ for _, round_ in _owed(shard)), default=INITIAL_ROUND)
    return shard.version


def _owed(shard: Shard) -> list[tuple[int, int]]:
    """Slots that those who cannot go on wait for, of the furthest round among them."""
    needs = [wait.need for wait in shard.waits.values() if wait.need and not wait.need.clock]
    pairs = [pair for need in needs for pair in need.lacking(shard.applied.clocks)]
    last = max((round_ for _, round_ in pairs), default=0)
    return [(slot, round_) for slot, round_ in dict.fromkeys(pairs) if round_ == last]


def _is_apart(shard: Shard) -> bool:
    return shard.spec.is_asynchronous and shard.version != INITIAL_ROUND


def _round_ns(shard: Shard) -> int:
    """How long a round takes; in an asynchronous table every slot makes a version."""
    return shard.round_time_ns * (len(shard.applied.clocks) if _is_apart(shard) else 1)


def _period_ns(shard: Shard) -> int:
    return max(LATE_AFTER_MS * MS, _round_ns(shard) // 2)


def _arm(shard: Shard, at_ns: int) -> None:
    if shard.spec.rule is Rule.OPTIMIZER and shard.version != INITIAL_ROUND:
        shard.late_ns = at_ns if shard.late_ns is None else min(at_ns, shard.late_ns)
