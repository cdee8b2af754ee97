"""Which server holds which shard: greedy, largest first, onto the server with the least load.

Source: longest-processing-time list scheduling (Graham 1969), at most 4/3 of the best makespan.
"""

from treefold.common import layout as layouts
from treefold.common.layout import Layout, ShardSpan
from treefold.common.spec import TableSpec

SHARDS_PER_SERVER = 2  # more balance better and cost more messages
SHARDS_MIN = 8  # of a table that is large enough, so that later servers can take their share


def cut(spec: TableSpec, servers: int) -> list[ShardSpan]:
    """The shards of a table for so many servers."""
    layout = Layout(spec)
    large = min(SHARDS_MIN, layout.blocks // layouts.PART_BLOCKS_MAX)  # of whole parts each
    return layout.cut(max(servers * SHARDS_PER_SERVER, large))


def place(blocks: list[int], load: dict[int, int], replicas: int = 1) -> list[list[int]]:
    """Give each shard to servers: its primary, then its backups.

    Parameters
    ----------
    blocks : list of int
        Size of each shard.
    load : dict of int to int
        Blocks that each server (by incarnation) holds already; updated.
    replicas : int
        Servers for each shard, at most as many as there are.

    Returns
    -------
    list of list of int
        The servers of each shard, in the order of ``blocks``.

    Notes
    -----
    Primaries are dealt first, so that they are spread as if there were no backups. Ties go to the
    smaller incarnation and the earlier shard, so that the same input gives the same answer.
    """
    chains: list[list[int]] = [[] for _ in blocks]
    for _ in range(replicas):
        for shard in sorted(range(len(blocks)), key=lambda number: (-blocks[number], number)):
            free = [who for who in load if who not in chains[shard]]
            server = min(free, key=lambda who: (load[who], who))
            chains[shard].append(server)
            load[server] += blocks[shard]
    return chains
