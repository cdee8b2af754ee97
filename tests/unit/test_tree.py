"""The fold tree: any arrival, any cut between worker and server, the same sum."""

import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treefold.common.tree import (
    FoldSet,
    Node,
    canonical,
    contains,
    is_valid,
    parent,
    root_level,
    sibling,
    span,
)

ACTIVE_MAX = 40  # over a power of two on both sides, small enough to try every node

Sum = int | tuple["Sum", "Sum"]
"""A slot, or the sum of two sums: what a real fold adds up, written down."""


def all_rows(active: int) -> list[list[Sum]]:
    """The reference: every level of the tree, made by pairing neighbours until one is left."""
    rows: list[list[Sum]] = [list(range(active))]
    while len(rows[-1]) > 1:
        below = rows[-1]
        pairs: list[Sum] = [(a, b) for a, b in zip(below[::2], below[1::2], strict=False)]
        rows.append(pairs if len(below) % 2 == 0 else [*pairs, below[-1]])
    return rows


def valid_nodes(active: int) -> list[Node]:
    """Every node of the tree over so many slots."""
    return [Node(level, i) for level, row in enumerate(all_rows(active)) for i in range(len(row))]


def slots_of(total: Sum) -> list[int]:
    """The slots in a sum, from left to right."""
    return [total] if isinstance(total, int) else slots_of(total[0]) + slots_of(total[1])


class Folder:
    """A `FoldSet` whose handles stand for written-down sums, as a server's stand for buffers."""

    def __init__(self, active: int) -> None:
        self.rows = all_rows(active)
        self.folds = FoldSet[int](active)
        self.sums: dict[int, Sum] = {}
        self.handles = itertools.count(1)

    def receive(self, node: Node, value: Sum | None = None) -> bool:
        """Take in a node and carry out the merges; False if it was a duplicate."""
        handle = next(self.handles)
        self.sums[handle] = self.rows[node.level][node.index] if value is None else value
        answer = self.folds.add(node, handle)
        if answer is None:
            del self.sums[handle]
            return False
        merges, dropped = answer
        for superfluous in dropped:
            del self.sums[superfluous]
        for left, right, _ in merges:
            self.sums[left] = (self.sums[left], self.sums.pop(right))
        return True

    @property
    def root(self) -> Sum | None:
        """The whole sum, once it is there."""
        handle = self.folds.root
        return None if handle is None else self.sums[handle]


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[int, list[Node]]:
    """A number of slots and nodes in any mixture, order and number, every slot among them."""
    active = draw(st.integers(1, ACTIVE_MAX))
    mixture = draw(st.lists(st.sampled_from(valid_nodes(active)), max_size=2 * active))
    leaves = [Node(0, slot) for slot in range(active)]
    return active, draw(st.permutations(mixture + leaves))


def in_order_of_arrival(nodes: Iterable[Node]) -> Sum:
    """What a fold without the tree would do: add what comes to what is there."""
    slots: list[Sum] = [node.index for node in nodes]
    return reduce(lambda total, slot: (total, slot), slots)


@given(deliveries())
def test_any_order_mixture_and_repetition_of_nodes_gives_the_same_sum(
    delivery: tuple[int, list[Node]],
) -> None:
    active, nodes = delivery
    folder = Folder(active)
    for node in nodes:
        folder.receive(node)
    assert folder.root == all_rows(active)[-1][0]
    assert slots_of(folder.root) == list(range(active))
    assert list(folder.sums) == [folder.folds.root], "a handle was lost or kept too long"


@given(deliveries())
def test_what_is_held_is_disjoint_and_what_is_missing_is_the_rest(
    delivery: tuple[int, list[Node]],
) -> None:
    active, nodes = delivery
    folder, seen = Folder(active), [False] * active
    for node in nodes:
        start, stop = span(node, active)
        was_there = all(seen[start:stop])
        assert folder.folds.covers(node) is was_there
        assert folder.receive(node) is not was_there
        seen[start:stop] = [True] * (stop - start)
        held = [slot for total in folder.sums.values() for slot in slots_of(total)]
        assert sorted(held) == [slot for slot in range(active) if seen[slot]]
        assert folder.folds.missing() == [slot for slot in range(active) if not seen[slot]]
        assert (folder.root is not None) is all(seen)


@given(st.integers(1, ACTIVE_MAX), st.data())
def test_workers_that_fold_their_own_slots_first_change_nothing(
    active: int, data: st.DataObject
) -> None:
    owners = data.draw(st.lists(st.integers(0, 3), min_size=active, max_size=active))
    server = Folder(active)
    for owner in data.draw(st.permutations(range(4))):
        worker = Folder(active)
        for slot in data.draw(st.permutations([s for s in range(active) if owners[s] == owner])):
            worker.receive(Node(0, slot))
        for node, handle in worker.folds.nodes.items():
            server.receive(node, worker.sums[handle])
    assert server.root == all_rows(active)[-1][0]


def test_adding_in_order_of_arrival_would_depend_on_that_order() -> None:
    """The negative control: the same orders, folded without the tree, give many sums."""
    orders = list(itertools.permutations([Node(0, slot) for slot in range(4)]))
    with_tree = set()
    for order in orders:
        folder = Folder(4)
        for node in order:
            folder.receive(node)
        with_tree.add(folder.root)
    assert with_tree == {((0, 1), (2, 3))}
    assert len({in_order_of_arrival(order) for order in orders}) == len(orders)


def float32_sums(values: Sequence[np.float32], fold: Callable[[list[int]], np.float32]) -> int:
    """How many different sums all orders of the values give."""
    orders = itertools.permutations(range(len(values)))
    return len({fold(list(order)).tobytes() for order in orders})


def test_float32_bits_depend_on_the_order_of_arrival_but_not_with_the_tree() -> None:
    values = [np.float32(v) for v in (1e8, 1.0, -1e8, 0.1, 3.0)]

    def evaluate(total: Sum) -> np.float32:
        if isinstance(total, int):
            return values[total]
        return np.float32(evaluate(total[0]) + evaluate(total[1]))

    def along_the_tree(order: list[int]) -> np.float32:
        folder = Folder(len(values))
        for slot in order:
            folder.receive(Node(0, slot))
        assert folder.root is not None
        return evaluate(folder.root)

    def as_it_comes(order: list[int]) -> np.float32:
        return reduce(operator.add, (values[slot] for slot in order))

    assert float32_sums(values, along_the_tree) == 1
    assert float32_sums(values, as_it_comes) > 1


def test_a_node_that_covers_held_ones_replaces_them() -> None:
    folds = FoldSet[str](4)
    folds.add(Node(0, 0), "first")
    folds.add(Node(0, 2), "third")
    assert folds.add(Node(1, 0), "first two") == ([], ["first"])
    assert folds.nodes == {Node(0, 2): "third", Node(1, 0): "first two"}


def test_a_whole_sum_makes_every_node_a_duplicate() -> None:
    folds = FoldSet[str](3)
    folds.add(Node(2, 0), "all")
    assert folds.root == "all"
    assert [folds.add(node, "late") for node in valid_nodes(3)] == [None] * len(valid_nodes(3))


@pytest.mark.parametrize("active", range(1, ACTIVE_MAX + 1))
def test_names_of_nodes_agree_with_the_tree_that_pairing_makes(active: int) -> None:
    rows = all_rows(active)
    assert root_level(active) == len(rows) - 1
    for level, row in enumerate(rows):
        assert not is_valid(Node(level, len(row)), active)
        for index, total in enumerate(row):
            node, slots = Node(level, index), slots_of(total)
            assert is_valid(node, active)
            assert span(node, active) == (slots[0], slots[-1] + 1)
            highest = canonical(node, active)
            assert rows[highest.level][highest.index] == total
            assert highest.level == root_level(active) or is_valid(sibling(highest), active)


@pytest.mark.parametrize("active", [1, 2, 5, 8, 13])
def test_a_node_contains_another_exactly_if_its_slots_do(active: int) -> None:
    for outer, inner in itertools.product(valid_nodes(active), repeat=2):
        (low, high), (start, stop) = span(outer, active), span(inner, active)
        if outer.level >= inner.level:
            assert contains(outer, inner) is (low <= start and stop <= high)
        else:
            assert not contains(outer, inner)


@pytest.mark.parametrize("node", [Node(-1, 0), Node(0, -1), Node(4, 0), Node(0, 5), Node(3, 1)])
def test_nodes_outside_the_tree_are_not_valid(node: Node) -> None:
    assert not is_valid(node, 5)


def test_relatives_are_one_step_away() -> None:
    assert parent(Node(0, 5)) == Node(1, 2)
    assert sibling(Node(2, 3)) == Node(2, 2)
    assert sibling(Node(2, 2)) == Node(2, 3)
    assert span(Node(1, 9), 5) == (18, 18)
