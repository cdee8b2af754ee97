"""A table that was saved by some servers and restored by others goes on with the same bits."""

import hashlib
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path

import msgspec
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.checkpoint_files import manifest_of
from tests.unit.shard_jobs import (
    Cluster,
    Job,
    Plain,
    blocks_of,
    differences,
    is_same,
    jobs,
    make_job,
)
from tests.unit.test_shard import CASES, FUSED, MIXED, TENSORWISE, _ids
from treefold.checkpoint import manifest as manifests
from treefold.checkpoint.manifest import FileEntry, TableEntry
from treefold.checkpoint.shards import ShardReader, write_shard
from treefold.checkpoint.store import Store
from treefold.common.errors import CheckpointError, DataError
from treefold.common.layout import Layout, ShardSpan
from treefold.common.optim import ELEMENTWISE
from treefold.common.optim import TENSORWISE as WHOLE
from treefold.common.spec import Dtype, Hyper, Placement, Rule, TableSpec, TensorSpec
from treefold.common.unit_state import Scalar, UnitState, pack
from treefold.server.shard import ShardState

NUMBERS = count()
SOMETIMES = [[1] * len(MIXED), [0, 1, 1, 1, 1, 0], [1] * len(MIXED)]
"""Rounds in one of which the first tensor and the last buffer have no gradient."""


def memory() -> Store:
    """A store of its own."""
    return Store(f"memory://shards-{next(NUMBERS)}")


def saved(store: Store, cluster: Cluster) -> TableEntry:
    """Save a table as its servers do, and read what its manifest says of it."""
    files = []
    for number, (span, shard) in enumerate(zip(cluster.spans, cluster.shards, strict=True)):
        path = f"00000030/t0-{number}.safetensors"
        units = [shard.export_unit(unit) for unit in range(len(shard.units()))]
        nbytes, digest = write_shard(store, path, cluster.spec, units)
        files.append(FileEntry(path, span.first_block, span.blocks, nbytes, digest))
    version = 30 if cluster.spec.rule is Rule.OPTIMIZER else 0
    table = TableEntry(0, cluster.spec, b"", version, b"", None, files)
    return manifests.decode(manifests.encode(manifest_of(30, table)), "it").tables[0]


def restored(store: Store, table: TableEntry, spans: list[ShardSpan]) -> Cluster:
    """The table on other servers."""
    shards = [ShardState(table.spec, span) for span in spans]
    for shard in shards:
        for unit, state in enumerate(ShardReader(store, table).units(shard.units())):
            shard.import_unit(unit, state)
    return Cluster(table.spec, spans, shards)


def moved(cluster: Cluster, spans: list[ShardSpan]) -> Cluster:
    """The table, after it was saved by some servers and restored by others."""
    store = memory()
    return restored(store, saved(store, cluster), spans)


def gone_on(job: Job, cuts: Sequence[list[ShardSpan]]) -> tuple[Plain, Cluster]:
    """A job that changes its servers before every round, and plain torch that does not."""
    plain, cluster = Plain(job.spec, job.initial), Cluster(job.spec, cuts[0])
    cluster.start(job.initial)
    for number, round_ in enumerate(job.rounds):
        cluster = moved(cluster, cuts[number % len(cuts)])
        plain.step(round_)
        cluster.step(round_)
    return plain, moved(cluster, cuts[0])


def spans_of(borders: Sequence[int], blocks: int) -> list[ShardSpan]:
    """Shards that begin with these blocks, as far as there are such blocks."""
    begins = sorted({0} | {border % blocks for border in borders})
    ends = [*begins[1:], blocks]
    return [ShardSpan(begin, end - begin) for begin, end in zip(begins, ends, strict=True)]


def cuts_of(spec: TableSpec, borders: Sequence[Sequence[int]]) -> list[list[ShardSpan]]:
    """Cuts of a table: into one, into three, and at odd borders where that may be."""
    layout = Layout(spec)
    cuts = [layout.cut(1), layout.cut(3)]
    if spec.placement is Placement.ELEMENTWISE:
        cuts += [spans_of(some, layout.blocks) for some in borders]
    return cuts


BORDERS = st.lists(st.lists(st.integers(0, 1000), max_size=4), min_size=2, max_size=2)


@pytest.mark.parametrize(("name", "hyper"), [*CASES, *FUSED, *TENSORWISE], ids=_ids)
def test_a_table_goes_on_to_the_bits_of_plain_torch_on_other_servers_in_every_round(
    name: str, hyper: Hyper
) -> None:
    @settings(max_examples=3)
    @given(jobs(name, hyper), BORDERS)
    def check(job: Job, borders: list[list[int]]) -> None:
        with blocks_of(max(5, job.block)):
            assert differences(*gone_on(job, cuts_of(job.spec, borders))) == []

    check()


def test_every_optimizer_that_servers_run_is_among_them() -> None:
    assert {name for name, _ in [*CASES, *TENSORWISE]} == {*ELEMENTWISE, *WHOLE}


@pytest.mark.parametrize("wire", [Dtype.BFLOAT16, Dtype.FLOAT16])
def test_a_table_with_a_gap_before_its_buffers_goes_on_too(wire: Dtype) -> None:
    job = make_job("AdamW", {}, MIXED, SOMETIMES, 3)
    job.spec = msgspec.structs.replace(job.spec, wire=wire)
    with blocks_of(job.block):
        assert Layout(job.spec).elements > sum(tensor.elements for tensor in job.spec.tensors)
        assert differences(*gone_on(job, cuts_of(job.spec, [[2, 3], [1, 4, 5]]))) == []


def test_a_restored_table_is_seen_to_differ_when_a_counter_is_lost() -> None:
    job = make_job("AdamW", {}, MIXED, SOMETIMES, 0)
    with blocks_of(job.block):
        plain, cluster = gone_on(job, cuts_of(job.spec, []))
        shard = cluster.shards[0]
        header, flat = shard.export_unit(0)
        run = msgspec.structs.replace(header.runs[0], scalars={"step": Scalar("float32", 7.0)})
        changed = msgspec.structs.replace(header, runs=[run, *header.runs[1:]])
        cluster.shards[0] = ShardState(job.spec, cluster.spans[0])
        cluster.shards[0].import_unit(0, UnitState(changed, flat))
        for unit in range(1, len(shard.units())):
            cluster.shards[0].import_unit(unit, shard.export_unit(unit))
        assert differences(plain, cluster) != []


def test_constants_are_saved_and_restored_on_any_cut() -> None:
    spec = TableSpec(
        "t", Rule.CONSTANT, Placement.ELEMENTWISE, [TensorSpec("w", [9, 9], Dtype.FLOAT32, 0)], None
    )
    with blocks_of(16):
        cluster = Cluster(spec, Layout(spec).cut(2))
        cluster.start([torch.arange(81.0).view(9, 9)])
        found = moved(moved(cluster, spans_of([1, 4], 6)), spans_of([5], 6))
        assert found.values()[0].flatten().tolist() == list(range(81))


def test_a_table_without_elements_has_a_file_and_is_restored() -> None:
    tensors = [([0], 0), ([0, 3], 0)]
    job = make_job("SGD", {"momentum": 0.9}, tensors, [[1, 1]], 0)
    with blocks_of(16):
        cluster = job.run()[1]
        assert [tensor.numel() for tensor in moved(cluster, Layout(job.spec).cut(2)).values()] == [
            0,
            0,
        ]


# ---- cuts do not accumulate ----------------------------------------------------------------------


def runs_of(cluster: Cluster) -> list[tuple[int, int]]:
    """The runs of a table on its servers."""
    states = [s.export_unit(unit) for s in cluster.shards for unit in range(len(s.units()))]
    return [(run.start, run.stop) for state in states for run in state.header.runs]


def test_borders_of_older_clusters_leave_no_trace() -> None:
    job = make_job("Adam", {}, [([200], 0), ([90], 1)], [[1, 1]] * 6, 0)
    with blocks_of(16):
        blocks = Layout(job.spec).blocks
        one = [ShardSpan(0, blocks)]
        cuts = [one, *[spans_of([number], blocks) for number in range(1, 6)]]
        assert runs_of(gone_on(job, cuts)[1]) == runs_of(gone_on(job, [one])[1])


def test_runs_that_count_differently_stay_apart() -> None:
    job = make_job("Adam", {}, [([20], 0), ([20], 0)], [[1, 1], [0, 1]], 0)
    with blocks_of(64):
        one = Layout(job.spec).cut(1)
        assert runs_of(gone_on(job, [one])[1]) == [(0, 20), (20, 40)]


# ---- the file ------------------------------------------------------------------------------------


@pytest.fixture
def small() -> Iterator[Cluster]:
    """A table of several groups, with different counters, on three servers."""
    job = make_job("AdamW", {}, MIXED, SOMETIMES, 0)
    cluster = job.run()[1]
    with blocks_of(job.block):
        yield cluster


def test_the_safetensors_library_reads_the_file(small: Cluster, tmp_path: Path) -> None:
    table = saved(Store(str(tmp_path)), small)
    shard, entry = small.shards[0], table.files[0]
    path = tmp_path / entry.path
    found = safetensors.torch.load_file(path)
    assert path.stat().st_size == entry.nbytes
    for unit in range(len(shard.units())):
        header, flat = shard.export_unit(unit)
        length = header.stop - header.start
        assert is_same(found.pop(f"values/{header.start}-{header.stop}"), flat[:length])
        at = length
        for run in header.runs:
            for key, shape in run.tensors.items():
                tensor = found.pop(f"{key}/{run.start}-{run.stop}")
                assert list(tensor.shape) == shape
                assert is_same(tensor, flat[at : at + math.prod(shape)])
                at += math.prod(shape)
    assert found == {}


def test_counters_are_readable_in_the_files_metadata(small: Cluster, tmp_path: Path) -> None:
    table = saved(Store(str(tmp_path)), small)
    with safetensors.safe_open(tmp_path / table.files[0].path, "pt") as found:
        metadata = found.metadata()
    assert metadata["table"] == "net"
    start, stop, runs = msgspec.json.decode(metadata["units"])[0]
    assert (start, stop) == (0, 32)
    assert [run[2] for run in runs] == [{"step": ["float32", 2.0]}, {"step": ["float32", 3.0]}]


def test_counters_that_are_no_numbers_are_kept() -> None:
    spec = TableSpec(
        "t", Rule.CONSTANT, Placement.ELEMENTWISE, [TensorSpec("w", [8], Dtype.FLOAT32, 0)], None
    )
    kept: dict[str, object] = {"a": torch.tensor(math.inf), "b": -math.inf, "c": 3, "d": 1.0}
    unit = pack(0, torch.zeros(8), [(0, 8, {**kept, "e": torch.tensor(math.nan)})])
    store = memory()
    nbytes, digest = write_shard(store, "00000000/x", spec, [unit])
    table = TableEntry(0, spec, b"", 0, b"", None, [FileEntry("00000000/x", 0, 1, nbytes, digest)])
    [found] = ShardReader(store, table).units([(0, 8)])
    assert repr(found.header) == repr(unit.header)


def test_two_tensors_of_one_name_are_refused_and_nothing_is_left() -> None:
    spec = TableSpec(
        "t", Rule.CONSTANT, Placement.ELEMENTWISE, [TensorSpec("w", [8], Dtype.FLOAT32, 0)], None
    )
    unit = pack(0, torch.zeros(8), [(0, 8, {"values": torch.zeros(8)})])
    store = memory()
    with pytest.raises(DataError, match="two tensors of a checkpoint would be 'values/0-8'"):
        write_shard(store, "00000010/x", spec, [unit])
    assert store._folders() == []


# ---- reading -------------------------------------------------------------------------------------


class Tracked(bytearray):
    """A file in memory, of which one can see when it is gone."""


def test_each_file_is_read_once_and_is_gone_before_the_next_one(
    small: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = memory()
    table = saved(store, small)
    alive: list[weakref.ref[Tracked]] = []
    read: list[str] = []
    real = Store.read

    def reading(self: Store, file: FileEntry) -> bytearray:
        assert [one for one in alive if one() is not None] == []
        found = Tracked(real(self, file))
        alive.append(weakref.ref(found))
        read.append(file.path)
        return found

    monkeypatch.setattr(Store, "read", reading)
    elements = Layout(small.spec).elements
    bounds = [(at, min(at + 7, elements)) for at in range(0, elements, 7)]
    assert len(bounds) > 3 * len(table.files)
    wanted = [file.path for file in table.files]
    for units in (
        ShardReader(store, table).units(bounds),
        ShardReader(store, table).values(bounds),
    ):
        read.clear()
        assert len(list(units)) == len(bounds)
        del units
        assert read == wanted
        assert [one for one in alive if one() is not None] == []


def test_only_files_that_are_needed_are_read(
    small: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = memory()
    table = saved(store, small)
    read: list[str] = []
    real = Store.read

    def reading(self: Store, file: FileEntry) -> bytearray:
        read.append(file.path)
        return real(self, file)

    monkeypatch.setattr(Store, "read", reading)
    start, stop = small.shards[1].units()[0]
    assert len(list(ShardReader(store, table).units([(start, start), (start, stop)]))) == 2
    assert read == [table.files[1].path]


def test_values_alone_are_those_of_the_units(small: Cluster) -> None:
    store = memory()
    table = saved(store, small)
    bounds = [(3, 20), (20, 20), (31, 70)]
    reader = ShardReader(store, table)
    for values, unit in zip(reader.values(bounds), reader.units(bounds), strict=True):
        assert is_same(values, unit.flat[: unit.header.stop - unit.header.start])


def test_nothing_of_a_damaged_file_is_believed(small: Cluster, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    table = saved(store, small)
    path = tmp_path / table.files[1].path
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    units = ShardReader(store, table).units([shard.units()[0] for shard in small.shards])
    assert next(units).header.start == 0
    with pytest.raises(CheckpointError, match="checksum") as caught:
        next(units)
    assert caught.value.path == table.files[1].path


Change = Callable[[TableEntry], TableEntry]


def swapped(table: TableEntry) -> TableEntry:
    """Two shards in each other's place, in the manifest too."""
    first, second, *rest = table.files
    change = msgspec.structs.replace
    one = change(first, path=second.path, nbytes=second.nbytes, sha256=second.sha256)
    other = change(second, path=first.path, nbytes=first.nbytes, sha256=first.sha256)
    return change(table, files=[one, other, *rest])


def renamed(table: TableEntry) -> TableEntry:
    """Another table of the same shape."""
    return msgspec.structs.replace(table, spec=msgspec.structs.replace(table.spec, name="other"))


@pytest.mark.parametrize(
    ("change", "text"), [(swapped, "a unit begins at"), (renamed, "not one of table 'other'")]
)
def test_a_file_that_is_not_the_one_for_its_place_is_refused(
    small: Cluster, change: Change, text: str
) -> None:
    store = memory()
    table = change(saved(store, small))
    with pytest.raises(CheckpointError, match=text) as caught:
        list(ShardReader(store, table).units([(0, 10)]))
    assert caught.value.path == table.files[0].path


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\x02" + bytes(7) + b"{}", bytes(64)])
def test_a_file_of_another_kind_is_refused_even_if_its_checksum_is_right(data: bytes) -> None:
    store, digest = memory(), hashlib.sha256(data).hexdigest()
    with store.create("00000000/x") as stream:
        stream.write(data)
    spec = TableSpec(
        "t", Rule.CONSTANT, Placement.ELEMENTWISE, [TensorSpec("w", [8], Dtype.FLOAT32, 0)], None
    )
    entry = FileEntry("00000000/x", 0, 1, len(data), digest)
    with pytest.raises(CheckpointError, match="00000000/x: "):
        list(ShardReader(store, TableEntry(0, spec, b"", 0, b"", None, [entry])).units([(0, 8)]))


@pytest.mark.parametrize("bounds", [[(5, 4)], [(0, 9), (8, 12)], [(0, 10_000)], [(-1, 2)]])
def test_stretches_that_are_out_of_order_are_refused(
    small: Cluster, bounds: list[tuple[int, int]]
) -> None:
    store = memory()
    table = saved(store, small)
    with pytest.raises(DataError, match="is asked for"):
        list(ShardReader(store, table).units(bounds))


def test_a_tensor_that_stays_whole_is_not_cut() -> None:
    job = make_job("Adafactor", {}, [([8, 8], 0), ([20], 0)], [[1, 1]], 0)
    cluster = job.run()[1]
    with blocks_of(job.block):
        store = memory()
        table = saved(store, cluster)
        with pytest.raises(DataError, match=r"of \[0, 64\) cannot be cut at 0 and 32"):
            list(ShardReader(store, table).units([(0, 32)]))
