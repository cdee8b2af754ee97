"""A unit that was copied to another server goes on with the same bits."""

from dataclasses import replace

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.shard_jobs import Cluster, Job, blocks_of, jobs, make_job
from tests.unit.test_shard import CASES, FOREACH, FUSED, MIXED, TENSORWISE, _ids
from treefold.common.errors import DataError, UnsupportedError
from treefold.common.layout import Layout
from treefold.common.spec import (
    Dtype,
    Hyper,
    Placement,
    Rule,
    TableSpec,
    TensorSpec,
)
from treefold.common.unit_state import (
    RunState,
    Scalar,
    UnitHeader,
    UnitState,
    decode_header,
    encode_header,
    flat_elements,
    pack,
)
from treefold.server.digest import checksum
from treefold.server.shard import ShardState


@pytest.mark.parametrize(("name", "hyper"), [*CASES, *FOREACH, *FUSED, *TENSORWISE], ids=_ids)
def test_a_table_that_is_copied_between_rounds_goes_on_to_the_bits_of_plain_torch(
    name: str, hyper: Hyper
) -> None:
    @settings(max_examples=8)
    @given(jobs(name, hyper), st.integers(0, 3))
    def check(job: Job, after: int) -> None:
        assert replace(job, moved_after=min(after, len(job.rounds))).differences() == []

    check()


def test_constants_are_copied_too() -> None:
    tensors = [TensorSpec("w", [40], Dtype.FLOAT32, 0)]
    spec = TableSpec("t", Rule.CONSTANT, Placement.ELEMENTWISE, tensors, None)
    with blocks_of(16):
        cluster = Cluster(spec, Layout(spec).cut(2))
        cluster.start([torch.arange(40.0)])
        before = cluster.shards
        cluster.move()
        assert cluster.shards is not before
        assert cluster.values()[0].tolist() == list(range(40))


def moving() -> tuple[ShardState, UnitState]:
    """A shard that nothing was done to yet, and the state of its first unit after two rounds."""
    job = make_job("AdamW", {}, MIXED, [[1] * len(MIXED), [0] + [1] * (len(MIXED) - 1)], 0)
    cluster = job.run()[1]
    with blocks_of(job.block):
        return ShardState(job.spec, cluster.spans[0]), cluster.shards[0].export_unit(0)


def test_the_header_says_where_the_runs_are_and_what_is_kept_of_them() -> None:
    _, state = moving()
    assert [(run.start, run.stop) for run in state.header.runs] == [(0, 15), (15, 32)]
    assert all(set(run.tensors) == {"exp_avg", "exp_avg_sq"} for run in state.header.runs)
    assert [run.scalars["step"].value for run in state.header.runs] == [1.0, 2.0]
    assert flat_elements(state.header) == state.flat.numel() == 3 * 32


def wrong_states() -> dict[str, UnitState]:
    """States that are not that of the unit, by what is wrong with them."""
    _, (header, flat) = moving()
    first, second = header.runs
    shape = msgspec.structs.replace(first, tensors={**first.tensors, "exp_avg": [5, 3]})
    short = msgspec.structs.replace(first, tensors={"exp_avg": [14], "exp_avg_sq": [16]})
    odd = msgspec.structs.replace(first, scalars={"step": Scalar("int8", 1)})
    inside = msgspec.structs.replace(first, start=1)
    return {
        "flat": UnitState(header, flat[:-1]),
        "dtype": UnitState(header, flat.double()),
        "place": UnitState(msgspec.structs.replace(header, start=32, stop=64, runs=[]), flat[:32]),
        "runs": UnitState(msgspec.structs.replace(header, runs=[second]), flat[: 3 * 32 - 30]),
        "gap": UnitState(msgspec.structs.replace(header, runs=[inside, second]), flat),
        "shape": UnitState(msgspec.structs.replace(header, runs=[shape, second]), flat),
        "length": UnitState(msgspec.structs.replace(header, runs=[short, second]), flat),
        "counter": UnitState(msgspec.structs.replace(header, runs=[odd, second]), flat),
    }


@pytest.mark.parametrize("wrong", wrong_states())
def test_a_state_that_does_not_fit_changes_nothing(wrong: str) -> None:
    shard, state = moving()
    before = shard.export_unit(0)
    with pytest.raises(DataError):
        shard.import_unit(0, wrong_states()[wrong])
    after = shard.export_unit(0)
    assert after.header == before.header
    assert torch.equal(after.flat, before.flat)
    shard.import_unit(0, state)
    assert torch.equal(shard.export_unit(0).flat, state.flat)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\x93",
        encode_header(UnitHeader(0, 8, [RunState(4, 9, {}, {})])),
        encode_header(UnitHeader(0, 8, [RunState(4, 6, {}, {}), RunState(5, 8, {}, {})])),
        encode_header(UnitHeader(0, 8, [RunState(6, 4, {}, {})])),
        encode_header(UnitHeader(0, 8, [RunState(-1, 4, {}, {})])),
        encode_header(UnitHeader(0, 8, [RunState(0, 8, {}, {"m": [-8]})])),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(header: bytes) -> None:
    with pytest.raises(DataError, match=r"unit"):
        decode_header(header)


def test_what_cannot_be_copied_exactly_is_refused() -> None:
    values = torch.zeros(4)
    for kept in (torch.zeros(4, dtype=torch.float64), torch.zeros((), dtype=torch.int8), "text"):
        with pytest.raises(UnsupportedError, match="keeps 'it'"):
            pack(0, values, [(0, 4, {"it": kept})])


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adafactor", "NAdam"])
def test_a_checksum_is_that_of_the_copy_and_sees_every_bit(name: str) -> None:
    hyper: Hyper = {"momentum": 0.9} if name == "SGD" else {}
    job = make_job(name, hyper, MIXED, [[1] * len(MIXED)] * 2, 0)
    cluster = job.run()[1]
    with blocks_of(job.block):
        before = [checksum(shard) for shard in cluster.shards]
        cluster.move()
    assert [checksum(shard) for shard in cluster.shards] == before
    shard = cluster.shards[0]
    for tensor in shard.tensors():
        flat = tensor.view(-1).view(torch.int32)
        for place in (0, len(flat) // 2, len(flat) - 1):
            flat[place] ^= 1
            assert checksum(shard) != before[0]
            flat[place] ^= 1
    assert checksum(shard) == before[0]
    assert len(list(shard.tensors())) + len(list(shard.counters())) > 1
