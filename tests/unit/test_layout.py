"""Layouts: every element of every tensor in one part of one shard, whatever the cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treefold.common.layout import BLOCK_ELEMENTS, PART_BLOCKS_MAX, Layout, Piece, ShardSpan
from treefold.common.spec import (
    BUFFER_GROUP,
    Dtype,
    OptimizerSpec,
    Placement,
    Rule,
    TableSpec,
    TensorSpec,
)
from treefold.wire.words import FRAME_BYTES_MAX

SIZES = st.one_of(
    st.integers(0, 200), st.integers(1, 9).map(lambda n: n * BLOCK_ELEMENTS // 2), st.just(700_001)
)


def table(sizes: list[int], placement: Placement = Placement.ELEMENTWISE) -> TableSpec:
    """A table of one-dimensional tensors of these sizes."""
    tensors = [TensorSpec(f"t{n}", [size], Dtype.FLOAT32, 0) for n, size in enumerate(sizes)]
    return TableSpec("net", Rule.CONSTANT, placement, tensors, None)


layouts = st.builds(table, st.lists(SIZES, min_size=1, max_size=8), st.sampled_from(Placement)).map(
    Layout
)


@given(layouts, st.integers(1, 9))
def test_shards_are_runs_of_blocks_that_make_the_table(layout: Layout, servers: int) -> None:
    shards = layout.cut(servers)
    assert 1 <= len(shards) <= servers
    assert all(shard.blocks > 0 for shard in shards)
    borders = [0, *(shard.first_block + shard.blocks for shard in shards)]
    assert borders[:-1] == [shard.first_block for shard in shards]
    assert borders[-1] == layout.blocks


@given(layouts, st.integers(1, 9))
def test_parts_follow_each_other_without_gap_or_overlap(layout: Layout, servers: int) -> None:
    parts = [part for shard in layout.cut(servers) for part in layout.parts(shard)]
    assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])]
    assert parts[-1][1] == layout.elements
    for start, stop in parts:
        assert start % BLOCK_ELEMENTS == 0
        assert (stop - start) * Dtype.FLOAT32.itemsize <= FRAME_BYTES_MAX


@given(layouts, st.integers(1, 9))
def test_pieces_of_all_parts_are_all_tensors_once(layout: Layout, servers: int) -> None:
    reached = [0] * len(layout.sizes)
    for shard in layout.cut(servers):
        for start, stop in layout.parts(shard):
            for piece in layout.pieces(start, stop):
                assert start <= piece.start < piece.stop <= stop
                assert piece.offset == reached[piece.tensor]
                assert piece.start == layout.starts[piece.tensor] + piece.offset
                reached[piece.tensor] += piece.stop - piece.start
    assert reached == layout.sizes


@given(st.lists(SIZES, min_size=1, max_size=8), st.integers(1, 9))
def test_with_tensorwise_placement_no_tensor_lies_on_two_shards(
    sizes: list[int], servers: int
) -> None:
    layout = Layout(table(sizes, Placement.TENSORWISE))
    homes: dict[int, int] = {}
    for number, shard in enumerate(layout.cut(servers)):
        for piece in layout.pieces(*layout.shard_range(shard)):
            assert homes.setdefault(piece.tensor, number) == number


def test_with_elementwise_placement_a_tensor_may_lie_on_two_shards() -> None:
    """The negative control: the check above does find a tensor that was cut."""
    layout = Layout(table([4 * BLOCK_ELEMENTS]))
    tensors = [layout.pieces(*layout.shard_range(shard))[0].tensor for shard in layout.cut(2)]
    assert tensors == [0, 0]


@given(st.integers(1, 40 * BLOCK_ELEMENTS), st.integers(1, 9))
def test_elementwise_shards_differ_by_at_most_one_block(elements: int, servers: int) -> None:
    blocks = [shard.blocks for shard in Layout(table([elements])).cut(servers)]
    assert max(blocks) - min(blocks) <= 1
    assert len(blocks) == min(servers, -(-elements // BLOCK_ELEMENTS))


def test_the_tensors_of_a_small_table_stand_one_after_the_other() -> None:
    layout = Layout(table([10, 0, 5]))
    assert layout.starts == [0, 10, 10]
    assert (layout.elements, layout.blocks) == (15, 1)
    assert layout.pieces(4, 15) == [Piece(0, 4, 10, 4), Piece(2, 10, 15, 0)]


def test_tensorwise_placement_begins_every_tensor_in_a_new_block() -> None:
    layout = Layout(table([10, 5], Placement.TENSORWISE))
    assert layout.starts == [0, BLOCK_ELEMENTS]
    assert layout.pieces(0, layout.elements) == [
        Piece(0, 0, 10, 0),
        Piece(1, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 5, 0),
    ]


def test_a_part_holds_at_most_so_many_blocks() -> None:
    layout = Layout(table([(PART_BLOCKS_MAX + 1) * BLOCK_ELEMENTS + 3]))
    [shard] = layout.cut(1)
    step = PART_BLOCKS_MAX * BLOCK_ELEMENTS
    assert layout.parts(shard) == [(0, step), (step, layout.elements)]


@pytest.mark.parametrize("sizes", [[0], [0, 0]])
def test_a_table_without_elements_has_one_empty_part(sizes: list[int]) -> None:
    layout = Layout(table(sizes))
    assert layout.cut(3) == [ShardSpan(0, 1)]
    assert layout.parts(ShardSpan(0, 1)) == [(0, 0)]
    assert layout.pieces(0, 0) == []


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_what_is_narrow_does_not_depend_on_the_cut(shards: int) -> None:
    tensors = [
        TensorSpec("w", [5 * BLOCK_ELEMENTS + 7], Dtype.FLOAT32, 0),
        TensorSpec("b", [3], Dtype.FLOAT32, BUFFER_GROUP),
    ]
    optimizer = OptimizerSpec("SGD", [{}])
    spec = TableSpec("t", Rule.OPTIMIZER, Placement.ELEMENTWISE, tensors, optimizer, Dtype.BFLOAT16)
    layout = Layout(spec)
    parts = [part for span in layout.cut(shards) for part in layout.parts(span)]
    narrow = [part for part in parts if layout.wire(part) is Dtype.BFLOAT16]
    assert sum(stop - start for start, stop in narrow) == 6 * BLOCK_ELEMENTS
    for part in parts:
        kinds = {piece.tensor for piece in layout.pieces(*part)}
        assert kinds == ({0} if part in narrow else {1})
