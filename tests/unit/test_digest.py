"""Digests of a job's end: the same however tables are cut, another one for any other bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.unit.shard_jobs import Cluster, Job, blocks_of, make_job
from treefold.common.ledger import StateRecord, Writer, state_digest
from treefold.common.spec import BUFFER_GROUP, Hyper
from treefold.server.digest import block_digests

TENSORS = [([3, 5], 0), ([40], 0), ([7], 0), ([20], 1), ([30], BUFFER_GROUP)]
PATTERNS = [[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [1, 1, 1, 1, 1]]
CASES: list[tuple[str, Hyper]] = [
    ("SGD", {"momentum": 0.9}),
    ("AdamW", {}),
    ("Adagrad", {}),
    ("Adafactor", {}),
]


def run(name: str, hyper: Hyper, shards: int) -> tuple[Job, Cluster]:
    """A job of three rounds on so many shards."""
    job = replace(make_job(name, hyper, TENSORS, PATTERNS, 5), shards=shards)
    return job, job.run()[1]


def digests(job: Job, cluster: Cluster) -> list[bytes]:
    """The digests of all shards, one after the other."""
    with blocks_of(job.block):
        return [digest for shard in cluster.shards for digest in block_digests(shard)]


@pytest.mark.parametrize(("name", "hyper"), CASES)
def test_digests_of_blocks_do_not_depend_on_the_cuts(name: str, hyper: Hyper) -> None:
    ends = [digests(*run(name, hyper, shards)) for shards in (1, 2, 3)]
    assert ends[0] == ends[1] == ends[2]
    assert len(dict.fromkeys(ends[0])) == len(ends[0])


def test_a_changed_value_changes_the_digest_of_its_block_only() -> None:
    job, cluster = run("AdamW", {}, 2)
    before = digests(job, cluster)
    cluster.shards[0]._master[20] += 1.0
    changed = [n for n, digest in enumerate(digests(job, cluster)) if digest != before[n]]
    assert changed == [20 // job.block]


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_a_changed_optimizer_state_changes_a_digest(key: str) -> None:
    job, cluster = run("AdamW", {}, 2)
    before = digests(job, cluster)
    state = cluster.shards[0].state_pieces()[0].state[key]
    assert isinstance(state, torch.Tensor)
    state[0] = -state[0]
    assert digests(job, cluster)[0] != before[0]


def test_a_changed_step_counter_changes_a_digest() -> None:
    job, cluster = run("AdamW", {}, 1)
    before = digests(job, cluster)
    optimizer = cluster.shards[0]._units[0]._optimizer
    assert optimizer is not None
    next(iter(optimizer.state.values()))["step"] += 1
    assert digests(job, cluster) != before


def write(folder: Path, *records: StateRecord) -> str:
    """The digest of a ledger with these records."""
    writer = Writer(str(folder), "server")
    for record in records:
        writer.add(record)
    writer.close()
    return state_digest(str(folder))


def test_the_ledgers_digest_is_that_of_the_blocks_in_order(tmp_path: Path) -> None:
    a, b, c = b"a", b"b", b"c"
    whole = write(tmp_path / "1", StateRecord(0, 0, 9, 0, [a, b, c]))
    cut = write(tmp_path / "2", StateRecord(0, 1, 9, 1, [b, c]), StateRecord(0, 0, 9, 0, [a]))
    other = write(tmp_path / "3", StateRecord(0, 0, 9, 0, [a, c, b]))
    assert whole == cut != other


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([], r"digests of \(table, version\) \[\]"),
        ([StateRecord(0, 1, 9, 1, [b"b"])], "block 1 follows 0"),
        ([StateRecord(0, 0, 9, 0, [b"a"]), StateRecord(0, 1, 8, 1, [b"b"])], r"\[\(0, 8\), "),
    ],
)
def test_a_ledger_that_lacks_a_block_or_mixes_versions_has_no_digest(
    tmp_path: Path, records: list[StateRecord], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        write(tmp_path, *records)
