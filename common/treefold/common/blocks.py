"""Sums over the blocks of a table, in an order that does not depend on how it is cut.

The blocks are the leaves of the tree of `treefold.common.tree`. A shard adds up what its own blocks
make of it, a few nodes, and whoever has those of all shards adds up the rest.
"""

from collections.abc import Iterable, Sequence

from treefold.common.tree import FoldSet, Node

Row = list[float]
"""What is summed, several sums side by side."""
Sums = tuple[int, int, Row]
"""Level and index of a node, and its sums."""


def of_shard(first_block: int, rows: Sequence[Row]) -> list[Sums]:
    """The largest nodes that a run of blocks makes up.

    Parameters
    ----------
    first_block : int
        Number of the first of them in the table.
    rows : sequence of list of float
        What they have, block by block.
    """
    found: list[Sums] = []
    level, first, rest = 0, first_block, list(rows)
    while rest:
        if first & 1:
            found.append((level, first, rest.pop(0)))
            first += 1
        if len(rest) & 1:
            found.append((level, first + len(rest) - 1, rest.pop()))
        rest = [_added(*pair) for pair in zip(rest[::2], rest[1::2], strict=True)]
        level, first = level + 1, first >> 1
    return found


def of_table(blocks: int, nodes: Iterable[Sums]) -> Row | None:
    """The sums over a table of so many blocks; None if nodes are missing."""
    tree: FoldSet[Row] = FoldSet(blocks)
    for level, index, row in sorted(nodes, key=lambda node: node[1] << node[0]):
        for merge in (tree.add(Node(level, index), list(row)) or ([], []))[0]:
            merge.left[:] = _added(merge.left, merge.right)
    return tree.root


def _added(left: Row, right: Row) -> Row:
    return [one + other for one, other in zip(left, right, strict=True)]
