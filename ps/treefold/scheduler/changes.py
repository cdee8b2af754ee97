"""What a new view changes, in plain words: who computes which slots, and who holds which shards.

Part of `treefold.scheduler.core` in a file of its own; just as pure. Both views say everything, so
that no step of a chain can be forgotten here.
"""

from collections.abc import Callable, Iterator, Mapping

from treefold.common.spans import spans
from treefold.scheduler.chains import Key
from treefold.scheduler.eventlog import SHARDS, SLOTS
from treefold.wire.exchange import Level, Note
from treefold.wire.messages import View
from treefold.wire.words import ShardPlace, TablePlace

HOLDERS_NAMED_MAX = 8  # in one sentence, which has to be read
Naming = Callable[[int], str]
Step = tuple[str, str]
"""A sentence, before and after the shards that it is about."""


def changes(
    old: View, new: View, name: Naming, moving: Mapping[Key, int], why: str = ""
) -> list[Note]:
    """What is to be told of a new view.

    Parameters
    ----------
    old, new : View
        The one before and the new one.
    name : callable
        Name of a member, by its incarnation.
    moving : mapping of (table, shard) to int
        Shards that are to leave a server as soon as another one has them.
    why : str
        What happened to a worker that made this view, told in one sentence with what follows.
    """
    given = _given(old, new, name)
    sentences = [f"{why}, {given}" if why and given else why or given]
    notes = [Note(Level.INFO, text, "" if why else SLOTS) for text in sentences if text]
    before = {place.table: place for place in old.tables} if old.era == new.era else {}
    for place in new.tables:
        known = before.get(place.table)
        texts = [_placed(place, name)] if known is None else _moved(known, place, name, moving, new)
        notes += [Note(Level.INFO, text, SHARDS) for text in texts]
    return notes


def _given(old: View, new: View, name: Naming) -> str:
    """Who has slots that another one had, or nobody."""
    was, now = old.leases.workers, new.leases.workers
    is_first = len(was) != len(now)
    found: dict[int, list[int]] = {}
    for slot, who in enumerate(now):
        if is_first or was[slot] != who:
            found.setdefault(who, []).append(slot)
    if not found:
        return ""
    parts = [f"{_named('slot', slots)} given to {name(who)}" for who, slots in found.items()]
    begin = new.leases.from_round
    return _few(parts) + (f" from round {begin} on" if begin else "")


def _placed(place: TablePlace, name: Naming) -> str:
    """Where a table lies that lay nowhere."""
    found: dict[tuple[int, ...], list[int]] = {}
    for shard in place.shards:
        found.setdefault((shard.server, *shard.backups), []).append(shard.shard)
    parts = [
        f"{_named('shard', shards)} on {' and '.join(name(who) for who in chain)}"
        for chain, shards in found.items()
    ]
    return f"table {place.name} is placed: {_few(parts)}"


def _moved(
    old: TablePlace, new: TablePlace, name: Naming, moving: Mapping[Key, int], view: View
) -> list[str]:
    """Steps of a table's chains; the shards that take the same one share a sentence."""
    live = {member.incarnation: None for member in view.members}
    found: dict[Step, list[int]] = {}
    for was, now in zip(old.shards, new.shards, strict=False):
        source = moving.get((new.table, now.shard))
        for step in _steps(was, now, live, name, source) if was != now else ():
            found.setdefault(step, []).append(now.shard)
    return [
        f"{before}{_named('shard', shards)} of {new.name}{after}"
        for (before, after), shards in found.items()
    ]


def _steps(
    old: ShardPlace, new: ShardPlace, live: Mapping[int, None], name: Naming, source: int | None
) -> Iterator[Step]:
    was, now = (old.server, *old.backups), (new.server, *new.backups)
    if new.server != old.server and old.server in live:
        yield f"{name(new.server)} is made the primary of ", f" in the place of {name(old.server)}"
    elif new.server != old.server:
        yield f"{name(new.server)} is promoted to primary of ", f", {name(old.server)} being gone"
    for who in now:
        if who not in was:
            yield "", f" copied to {name(who)}, which is in sync"
    for who in new.joining:
        if who in old.joining:
            continue
        if who in was:
            yield "the copy of ", f" on {name(who)} is made again"
        elif source is not None:
            yield "", f" on the way from {name(source)} to {name(who)}"
        else:
            yield "", f" on the way to {name(who)}, a new backup"
    for who in was:
        if who in live and who not in (*now, *new.joining):
            yield f"{name(who)} holds ", " no more"


def _named(word: str, numbers: list[int]) -> str:
    return f"{word}{'s' if len(numbers) > 1 else ''} {spans(numbers)}"


def _few(parts: list[str]) -> str:
    more = len(parts) - HOLDERS_NAMED_MAX
    return ", ".join(parts[:HOLDERS_NAMED_MAX]) + (f" and {more} more" if more > 0 else "")
