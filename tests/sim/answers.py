"""What peers have asked a simulated server for, and whether it gives just that."""

from dataclasses import dataclass

from tests.sim.world import Violation
from treefold.server.holding import Shard
from treefold.wire.messages import Published, Pull, Pulled
from treefold.wire.words import INITIAL_ROUND


@dataclass(slots=True)
class _Asked:
    """A pull, and the parts of it that were not sent yet."""

    version: int
    parts: dict[int, None]


class Answers:
    """What every peer has asked a server for: each part is sent once, before word of the whole.

    A pull that is late may ask for a version that is there, while a newer one waits.
    """

    def __init__(self) -> None:
        self._waiting: dict[tuple[object, int, int], _Asked] = {}
        self._due: dict[tuple[object, int, int], _Asked] = {}

    def ask(self, peer: object, pull: Pull, shard: Shard) -> None:
        """A pull is taken in."""
        parts = dict.fromkeys(pull.parts or range(shard.parts_count))
        is_due = pull.version <= shard.version and shard.can_tell(pull.version)
        if shard.spec.is_asynchronous and shard.version > INITIAL_ROUND:
            is_met = pull.need is None or pull.need.is_met(shard.applied.clocks)
            is_due = shard.is_settled and is_met
        asked = self._due if is_due else self._waiting
        asked[peer, pull.table, pull.shard] = _Asked(pull.version, parts)

    def keep(self, shards: set[tuple[int, int]]) -> None:
        """Forget what was asked for of other shards, which are led elsewhere by now."""
        for asked in (self._waiting, self._due):
            for key in [key for key in asked if key[1:] not in shards]:
                del asked[key]

    def send(self, peer: object, pulled: Pulled, parts_count: int) -> None:
        """A run of parts is sent."""
        key = (peer, pulled.table, pulled.shard)
        asked = self._due.get(key) or self._waiting.get(key)
        if asked is None or pulled.version < asked.version:
            raise Violation(f"{peer!r} is sent {pulled}, but asked for {asked}")
        if pulled.version > asked.version:  # what was asked for is not kept any more
            asked.version, asked.parts = pulled.version, dict.fromkeys(range(parts_count))
        for part in range(pulled.part, pulled.part + pulled.count):
            if part not in asked.parts:
                raise Violation(f"{peer!r} is sent part {part} again: {pulled}")
            del asked.parts[part]

    def finish(self, peer: object, published: Published) -> None:
        """Word is sent that a version is whole."""
        key = (peer, published.table, published.shard)
        asked = self._due.pop(key, None) or self._waiting.pop(key, None)
        if asked is None or asked.version != published.version or asked.parts:
            raise Violation(f"{peer!r} is told {published}, but has not got {asked}")
