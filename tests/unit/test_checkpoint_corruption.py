"""A thousand ways to spoil a checkpoint: each is noticed, its file named, the one before taken."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest

from tests.unit.checkpoint_files import frozen, save
from treefold.checkpoint import store as module
from treefold.checkpoint.manifest import Manifest
from treefold.checkpoint.store import Store
from treefold.common.errors import CheckpointError

SEED = 20_261_127
CASES = 1_000
NEW, OLD = "00000030", "00000020"
MANIFEST = f"{NEW}/manifest.json"


@dataclass(frozen=True)
class Spoilt:
    """What becomes of files, None for one that is gone, and which of them may be named."""

    kind: str
    files: dict[str, bytes | None]
    culprits: list[str]


@dataclass(frozen=True)
class Job:
    """A folder of checkpoints of rounds 10, 20 and 30, and its files."""

    folder: Path
    files: dict[str, bytes]
    before: Manifest

    def own(self, version: str = NEW) -> list[str]:
        """The files of one checkpoint, those left out that it shares with others."""
        return [path for path in self.files if path.startswith(version)]


def make_job(folder: Path, number: int) -> Job:
    """A job of this number."""
    store = Store(str(folder))
    constant = frozen(store, number)
    made = {version: save(store, version, constant, number) for version in (10, 20, 30)}
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return Job(folder, files, made[20])


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The job whose files are spoilt."""
    return make_job(tmp_path_factory.mktemp("job"), 1)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Another job, whose files have the same sizes."""
    return make_job(tmp_path_factory.mktemp("other"), 2)


def one(path: str, data: bytes | None, kind: str) -> Spoilt:
    """A single file is spoilt."""
    return Spoilt(kind, {path: data}, [path])


def flipped(job: Job, draw: random.Random) -> Spoilt:
    """A bit anywhere in any file."""
    path = draw.choice(job.own())
    data = bytearray(job.files[path])
    bit = draw.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    return one(path, bytes(data), "flipped")


def truncated(job: Job, draw: random.Random) -> Spoilt:
    """A file that ends too soon, perhaps at once."""
    path = draw.choice(job.own())
    return one(path, job.files[path][: draw.randrange(len(job.files[path]))], "truncated")


def extended(job: Job, draw: random.Random) -> Spoilt:
    """Something behind the end of a file."""
    path = draw.choice(job.own())
    more = draw.choice([b"\x00", b"\n", b" ", b"}", bytes(512), draw.randbytes(9)])
    return one(path, job.files[path] + more, "extended")


def zeroed(job: Job, draw: random.Random) -> Spoilt:
    """Zeros where a disk lost some sectors."""
    path = draw.choice(job.own())
    data = bytearray(job.files[path])
    start = draw.randrange(len(data) - 16)
    stop = draw.randrange(start + 16, len(data) + 1)
    data[start:stop] = bytes(stop - start)
    return one(path, bytes(data), "zeroed")


def swapped(job: Job, draw: random.Random) -> Spoilt:
    """Two files under each other's names."""
    left, right = draw.sample(job.own(), 2)
    changed: dict[str, bytes | None] = {left: job.files[right], right: job.files[left]}
    return Spoilt("swapped", changed, [left, right])


def missing(job: Job, draw: random.Random) -> Spoilt:
    """A file that is gone."""
    return one(draw.choice(job.own()), None, "missing")


def stale(job: Job, draw: random.Random) -> Spoilt:
    """A file, or the manifest, of the checkpoint before under the new one's name."""
    path = draw.choice(job.own())
    return one(path, job.files[path.replace(NEW, OLD)], "stale")


def foreign(job: Job, draw: random.Random, other: Job) -> Spoilt:
    """A file of another job, or its manifest with the names of its files."""
    number = draw.randrange(len(job.own()))
    path, theirs = job.own()[number], other.own()[number]
    culprits = other.own() + other.own("00000000") if path == MANIFEST else [path]
    return Spoilt("foreign", {path: other.files[theirs]}, culprits)


def drawn(job: Job, other: Job) -> Iterator[Spoilt]:
    """All cases."""
    draw = random.Random(SEED)
    kinds: list[Callable[[], Spoilt]] = [
        lambda: flipped(job, draw),
        lambda: truncated(job, draw),
        lambda: extended(job, draw),
        lambda: zeroed(job, draw),
        lambda: swapped(job, draw),
        lambda: missing(job, draw),
        lambda: stale(job, draw),
        lambda: foreign(job, draw, other),
    ]
    for number in range(CASES):
        yield kinds[number % len(kinds)]()


@contextmanager
def spoiling(job: Job, spoilt: Spoilt) -> Iterator[Store]:
    """The store while files of it are spoilt."""
    try:
        for path, data in spoilt.files.items():
            if data is None:
                (job.folder / path).unlink()
            else:
                (job.folder / path).write_bytes(data)
        yield Store(str(job.folder))
    finally:
        for path in spoilt.files:
            (job.folder / path).write_bytes(job.files[path])


def unnoticed(job: Job, spoilt: Spoilt) -> list[str]:
    """What the store does not notice, or does wrong."""
    told: list[str] = []
    found: list[str] = []
    with spoiling(job, spoilt) as store:
        try:
            store.verify(30)
            found.append(f"{spoilt.kind} {spoilt.culprits} is not noticed")
        except CheckpointError as error:
            if error.path not in spoilt.culprits or error.path not in str(error):
                found.append(f"{spoilt.kind} {spoilt.culprits} is taken for {error}")
        if store.newest_whole(told.append) != job.before:
            found.append(f"{spoilt.kind} {spoilt.culprits}: not the checkpoint before")
    is_unfinished = spoilt.files.get(MANIFEST, b"") is None  # then there is no such checkpoint
    if len(told) != (0 if is_unfinished else 1):
        found.append(f"{spoilt.kind} {spoilt.culprits}: told {told}")
    elif told and not any(culprit in told[0] for culprit in spoilt.culprits):
        found.append(f"{spoilt.kind} {spoilt.culprits}: {told[0]} names another")
    return found


def test_a_thousand_corruptions_of_every_kind_are_noticed_and_named(job: Job, other: Job) -> None:
    cases = list(drawn(job, other))
    assert len(cases) == CASES
    assert min(Counter(case.kind for case in cases).values()) == CASES // 8
    assert all(data != job.files[path] for case in cases for path, data in case.files.items())
    assert [text for case in cases for text in unnoticed(job, case)] == []
    assert Store(str(job.folder)).verify(30).version == 30, "what was restored is whole"


def test_without_the_hash_some_of_them_go_unnoticed(
    job: Job, other: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_compare", lambda *_: None)
    cases = islice(drawn(job, other), CASES // 10)
    kinds = {case.kind for case in cases if unnoticed(job, case)}
    assert {"flipped", "zeroed", "stale", "foreign"} <= kinds
    assert "truncated" not in kinds, "sizes are still compared"


def test_a_file_that_all_share_and_that_is_damaged_leaves_none(job: Job) -> None:
    [path] = job.own("00000000")
    told: list[str] = []
    with spoiling(job, one(path, job.files[path][::-1], "flipped")) as store:
        assert store.newest_whole(told.append) is None
    assert [path in text for text in told] == [True] * 3
