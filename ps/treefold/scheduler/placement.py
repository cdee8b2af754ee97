"""Which server holds which shard: greedy, largest first, onto the server with the least load.

Source: longest-processing-time list scheduling (Graham 1969), at most 4/3 of the best makespan.
"""

from treefold.common.layout import Layout, ShardSpan
from treefold.common.spec import TableSpec

SHARDS_PER_SERVER = (
    2  # more balance better and cost more messages; two let a later server take its share
)


def cut(spec: TableSpec, servers: int) -> list[ShardSpan]:
    """The shards of a table for so many servers."""
    return Layout(spec).cut(servers * SHARDS_PER_SERVER)


def place(blocks: list[int], load: dict[int, int]) -> list[int]:
    """Give each shard to a server.

    Parameters
    ----------
    blocks : list of int
        Size of each shard.
    load : dict of int to int
        Blocks that each server (by incarnation) holds already; updated.

    Returns
    -------
    list of int
        The server of each shard, in the order of ``blocks``.

    Notes
    -----
    Ties go to the smaller incarnation and the earlier shard, so that the same input gives the same
    answer.
    """
    owners = [0] * len(blocks)
    for shard in sorted(range(len(blocks)), key=lambda number: (-blocks[number], number)):
        server = min(load, key=lambda who: (load[who], who))
        owners[shard] = server
        load[server] += blocks[shard]
    return owners
