"""What a server sends to those who pull: parts as they are made, and word of a version.

The word comes twice: when the version has begun, and when it is whole.

Part of `treefold.server.core` in a file of its own; just as pure.
"""

from collections.abc import Sequence

from treefold.common.spec import Dtype
from treefold.server.effects import PartsRef
from treefold.server.holding import Shard, Wait
from treefold.server.rounds import Round
from treefold.wire.exchange import Peer, Send
from treefold.wire.messages import Published, Pulled
from treefold.wire.words import RUN_PARTS_MAX


def wait(peer: Peer, shard: Shard, new: Wait) -> list[Send]:
    """Let a worker wait for the next version; parts of it that exist already are sent at once."""
    shard.waits[peer] = new
    current = shard.round
    if current is None or new.version != current.number + 1:
        return []
    sends = _take(peer, shard, new, [part for part in new.parts if part in current.made])
    return [_begun(peer, shard, current), *sends] if current.is_told else sends


def made(shard: Shard, current: Round) -> list[Send]:
    """Parts that were made since the last call, for those who wait for them."""
    fresh, current.fresh = current.fresh, []
    sends: list[Send] = []
    if current.is_begun and not current.is_told and not current.is_complete:
        current.is_told = True
        sends += [
            _begun(peer, shard, current)
            for peer, waiting in shard.waits.items()
            if waiting.version == current.number + 1
        ]
    for peer, waiting in shard.waits.items() if fresh else ():
        if waiting.version == current.number + 1:
            wanted = [part for part in fresh if part in waiting.parts]
            sends += _take(peer, shard, waiting, wanted)
    return sends


def published(shard: Shard) -> list[Send]:
    """The shard's new version is whole: what is left of it, for those who wait for it."""
    sends: list[Send] = []
    for peer, waiting in list(shard.waits.items()):
        if waiting.version <= shard.version and waiting.is_met(shard.applied.clocks):
            del shard.waits[peer]
            sends += _parts(peer, shard, shard.version, list(waiting.parts))
            sends.append(_whole(peer, shard, shard.version))
    return sends


def of_version(peer: Peer, shard: Shard, version: int, parts: list[int]) -> list[Send]:
    """Parts of a version that is whole, or all of the current one if it is not kept any more."""
    if version not in shard.kept:
        version, parts = shard.version, list(range(shard.parts_count))
    return [*_parts(peer, shard, version, parts), _whole(peer, shard, version)]


def _take(peer: Peer, shard: Shard, waiting: Wait, parts: list[int]) -> list[Send]:
    for part in parts:
        del waiting.parts[part]
    return _parts(peer, shard, waiting.version, parts)


def _parts(peer: Peer, shard: Shard, version: int, parts: list[int]) -> list[Send]:
    return [
        Send(
            peer,
            Pulled(shard.table, shard.number, first, count, version, shard.frame(first, count)),
            PartsRef(shard.table, shard.number, version, first, count),
        )
        for first, count in runs_of(parts, shard.wires)
    ]


def _begun(peer: Peer, shard: Shard, current: Round) -> Send:
    state = current.meta.state if current.meta is not None else b""
    version = current.number + 1
    return Send(
        peer, Published(shard.table, shard.number, version, state, current.norm, is_whole=False)
    )


def _whole(peer: Peer, shard: Shard, version: int) -> Send:
    kept = shard.kept[version]
    return Send(peer, Published(shard.table, shard.number, version, kept.state, kept.norm))


def runs_of(parts: Sequence[int], wires: Sequence[Dtype]) -> list[tuple[int, int]]:
    """Part numbers as ``(first, count)`` of runs of adjacent ones, in the order given."""
    found: list[tuple[int, int]] = []
    for part in parts:
        is_next = bool(found) and found[-1][0] + found[-1][1] == part
        if is_next and found[-1][1] < RUN_PARTS_MAX and wires[part] is wires[part - 1]:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((part, 1))
    return found
