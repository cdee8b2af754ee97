"""What a server writes down of its versions, if it is asked to: its part of the ledger."""

from collections.abc import Mapping

from treefold.common.ledger import AppliedRecord, StateRecord, VersionRecord, Writer
from treefold.server.core import ServerCore
from treefold.server.digest import block_digests
from treefold.server.effects import RecordVersion
from treefold.server.shard import ShardState


class Recording:
    """The ledger of one server.

    Parameters
    ----------
    folder : str
        Where it lies; empty: nothing is written.
    core : ServerCore
        Knows what is held.
    """

    def __init__(self, folder: str, core: ServerCore) -> None:
        self._folder = folder
        self._core = core
        self._writer: Writer | None = None

    def record(self, effect: RecordVersion) -> None:
        """Write down what went into a version."""
        if not self._folder:
            return
        if self._writer is None:
            name = f"server-{self._core.membership.incarnation}"
            self._writer = Writer(self._folder, name)
        if not effect.is_primary or (effect.version > 0 and not effect.contributors):
            return  # what came as a copy was recorded by whoever made it
        of = (effect.table, effect.shard, effect.version)
        if self._core.specs[effect.table].is_asynchronous and effect.version > 0:
            for round_, slot, who in effect.contributors:
                self._writer.add(AppliedRecord(*of, round_, slot, who))
            return
        self._writer.add(VersionRecord(*of, effect.contributors))

    def end(self, states: Mapping[tuple[int, int], ShardState]) -> None:
        """Write down what the server holds at the end of a job; nothing comes after that."""
        if self._writer is None:
            return
        for (table, shard), state in states.items():
            if self._core.shards[table, shard].chain.is_joining:
                continue  # not all of it is here
            version = self._core.shards[table, shard].version
            first = self._core.places[table, shard].first_block
            digests = block_digests(state)
            self._writer.add(StateRecord(table, shard, version, first, digests))
        self._writer.close()
