"""The fold tree: which partial sums exist over the slots of a round, and how they meet.

Node ``(level, index)`` stands for slots ``[index * 2**level, (index + 1) * 2**level)``, clipped to
the ``active`` slots of the round, and is always ``left + right`` of its two children. Because the
tree depends on the number of active slots alone, the sum has the same bits wherever its parts were
made.

A node whose right half lies beyond the last active slot equals its left child; `canonical` names
such equal nodes alike. This module knows no tensors: what a node holds is an opaque handle.
"""

from typing import Generic, NamedTuple, TypeVar

Handle = TypeVar("Handle")


class Node(NamedTuple):
    """One node of the fold tree, level 0 being a single slot."""

    level: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs


class Merge(NamedTuple, Generic[Handle]):
    """Two siblings that met: the parent is ``left + right`` and takes over ``left``'s handle."""

    left: Handle
    right: Handle
    parent: Node


def root_level(active: int) -> int:
    """Level of the root over ``active`` slots (0 for one slot)."""
    return (active - 1).bit_length()


def span(node: Node, active: int) -> tuple[int, int]:
    """Slots ``[start, stop)`` under ``node``, clipped to the active ones; empty if none is left."""
    start = node.index << node.level
    return start, max(start, min((node.index + 1) << node.level, active))


def is_valid(node: Node, active: int) -> bool:
    """Whether the tree over ``active`` slots has this node and it covers at least one slot."""
    if node.level < 0 or node.index < 0 or node.level > root_level(active):
        return False
    return (node.index << node.level) < active


def parent(node: Node) -> Node:
    """The node one level up."""
    return Node(node.level + 1, node.index >> 1)


def sibling(node: Node) -> Node:
    """The other child of the same parent."""
    return Node(node.level, node.index ^ 1)


def canonical(node: Node, active: int) -> Node:
    """The highest node with the same slots: climbs while the sibling covers no active slot."""
    level, index = node
    top = root_level(active)
    while level < top and (index ^ 1) << level >= active:
        level, index = level + 1, index >> 1
    return node if level == node.level else Node(level, index)


def contains(outer: Node, inner: Node) -> bool:
    """Whether ``inner`` lies in the subtree of ``outer`` (or is it)."""
    return inner.level <= outer.level and inner.index >> (outer.level - inner.level) == outer.index


class FoldSet(Generic[Handle]):
    """The maximal nodes held for one part of one round, folded as siblings meet.

    Parameters
    ----------
    active : int
        Slots of the round that contribute, at least 1.

    Notes
    -----
    A node already covered is a duplicate and changes nothing. A node that covers held ones replaces
    them; since nodes of one tree are nested or disjoint, nothing can overlap in part.
    """

    def __init__(self, active: int) -> None:
        self.active = active
        self.nodes: dict[Node, Handle] = {}

    def covers(self, node: Node) -> bool:
        """Whether the slots under ``node`` are all held in one node already."""
        level, index = canonical(node, self.active)
        for up in range(root_level(self.active) + 1 - level):
            if (level + up, index >> up) in self.nodes:
                return True
        return False

    def add(self, node: Node, handle: Handle) -> tuple[list[Merge[Handle]], list[Handle]] | None:
        """Take in one node.

        Returns
        -------
        tuple of (merges, dropped), or None
            The merges to carry out, in this order, and the handles that ``node`` made superfluous.
            None if the node is a duplicate, in which case its handle is the caller's to free.
        """
        node = canonical(node, self.active)
        if self.covers(node):
            return None
        covered = [held for held in self.nodes if contains(node, held)] if node.level else []
        dropped = [self.nodes.pop(held) for held in covered]
        merges: list[Merge[Handle]] = []
        while (beside := sibling(node)) in self.nodes:
            other = self.nodes.pop(beside)
            left, right = (other, handle) if node.index & 1 else (handle, other)
            node = canonical(parent(node), self.active)
            merges.append(Merge(left, right, node))
            handle = left
        self.nodes[node] = handle
        return merges, dropped

    @property
    def root(self) -> Handle | None:
        """The handle of the whole sum, once every active slot is in it."""
        return self.nodes.get(Node(root_level(self.active), 0))

    def missing(self) -> list[int]:
        """Active slots that no held node covers, in ascending order."""
        held = {slot for node in self.nodes for slot in range(*span(node, self.active))}
        return [slot for slot in range(self.active) if slot not in held]
