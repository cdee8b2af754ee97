"""Whatever fails while a checkpoint is saved, and whenever: one that is whole can be read."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.unit.checkpoint_files import frozen, save
from treefold.checkpoint.manifest import Manifest
from treefold.checkpoint.store import Store
from treefold.common.errors import CheckpointError
from treefold.common.failpoints import POINTS

ROOT = Path(__file__).parents[2]
CALLS = ("mkdir", "open", "write", "fsync", "close", "rename", "replace", "ftruncate")
LATE = ("write", "fsync", "rename")  # may have had their effect and fail nevertheless
STEPS_MAX = 200  # a save has some dozens

# Saves round 20 beside round 10, and removes round 10.
SAVE = """
import sys
from tests.unit.checkpoint_files import save
from treefold.checkpoint.store import Store
from treefold.common.failpoints import arm
arm("server")
store = Store(sys.argv[1])
save(store, 20, store.manifest(10).tables[1])
store.prune(1)
"""


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


class Steps:
    """Lets the n-th call that changes the disk go wrong, and counts.

    Parameters
    ----------
    patch : pytest.MonkeyPatch
        Puts them in the place of the system's.
    at : int
        Which one; counted from 1.
    fault : BaseException
        What it raises.
    is_done : bool
        Whether it has had its effect before.
    """

    def __init__(
        self, patch: pytest.MonkeyPatch, at: int, fault: BaseException, *, is_done: bool
    ) -> None:
        self.count = 0
        self.failed = ""
        self._at = at
        self._fault = fault
        self._is_done = is_done
        for name in CALLS:
            patch.setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, call: Callable[..., object]) -> Callable[..., object]:
        def step(*args: object, **kwargs: object) -> object:
            self.count += 1
            if self.count != self._at:
                return call(*args, **kwargs)
            self.failed = name
            if name == "close" or (self._is_done and name in LATE):
                call(*args, **kwargs)  # a descriptor is closed in any case
            raise self._fault

        return step


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint of round 10."""
    folder = tmp_path_factory.mktemp("template")
    store = Store(str(folder))
    save(store, 10, frozen(store))
    return folder


@pytest.fixture
def fresh(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Store]:
    """Makes copies of that folder. No power fails here, so that nobody waits for disks."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    numbers = iter(range(10_000))

    def make() -> Store:
        folder = tmp_path / str(next(numbers))
        shutil.copytree(template, folder)
        return Store(str(folder))

    return make


def names(store: Store) -> list[str]:
    """Every file of a store."""
    folder = Path(store.url)
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def loadable(store: Store) -> Manifest:
    """The newest checkpoint, which is whole."""
    told: list[str] = []
    found = store.newest_whole(told.append)
    assert told == [], "nothing that counts is damaged"
    assert found is not None
    return found


def faults() -> list[tuple[BaseException, bool]]:
    """What goes wrong, and whether after its effect."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    broken = OSError(errno.EIO, os.strerror(errno.EIO))
    return [(full, False), (broken, False), (broken, True), (Killed(), False), (Killed(), True)]


@pytest.mark.parametrize(("fault", "is_done"), faults(), ids=["full", "io", "late", "kill", "dead"])
def test_a_save_that_fails_at_any_step_leaves_what_was_there(
    fresh: Callable[[], Store], fault: BaseException, is_done: bool
) -> None:
    store = fresh()
    before = names(store)
    seen: list[str] = []
    for at in range(1, STEPS_MAX):
        store = fresh()
        ten = store.manifest(10)
        with pytest.MonkeyPatch.context() as patch:
            steps = Steps(patch, at, fault, is_done=is_done)
            with suppress(CheckpointError, Killed):
                save(store, 20, ten.tables[1])
        if not steps.failed:
            break
        seen.append(steps.failed)
        assert loadable(store) == ten, f"{steps.failed}, step {at}"
        assert store.versions() == [10], f"{steps.failed}, step {at}"
        left = [name for name in names(store) if name not in before]
        assert all(name.startswith("00000020/t0") for name in left), "no temporary file"
        assert len(left) <= 2
        store.prune(1)
        saved_again(store, ten)
    assert loadable(store).version == 20, "the last one went through"
    assert {"mkdir", "open", "write", "fsync", "close", "rename"} <= set(seen)
    assert seen.count("fsync") >= 10
    assert seen.count("write") == 5, "two for each file, one for the manifest"


def saved_again(store: Store, ten: Manifest) -> None:
    """The next save is of another round, and goes well."""
    made = save(store, 30, ten.tables[1])
    assert loadable(store) == made
    store.prune(1)
    assert [name for name in names(store) if name.startswith(("00000010", "00000020"))] == []


def test_an_error_says_which_file_could_not_be_written_and_that_the_disk_is_full(
    fresh: Callable[[], Store],
) -> None:
    store = fresh()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(full))
        with pytest.raises(CheckpointError, match=r"No space left.*disk is full: make") as caught:
            save(store, 20, store.manifest(10).tables[1])
    assert caught.value.path == "00000020/t0.model-0-1.safetensors"


def test_a_system_that_writes_little_at_a_time_writes_everything(
    fresh: Callable[[], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, real = fresh(), os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:7]))
    made = save(store, 20, store.manifest(10).tables[1])
    assert store.verify(20) == made


def test_a_removal_that_fails_at_any_step_leaves_the_newest(
    fresh: Callable[[], Store],
) -> None:
    for at in range(1, STEPS_MAX):
        store = fresh()
        made = save(store, 20, store.manifest(10).tables[1])
        with pytest.MonkeyPatch.context() as patch:
            count = iter(range(1, STEPS_MAX))

            def failing(name: str, count: Iterator[int] = count, at: int = at) -> None:
                real = getattr(os, name)

                def call(*args: object, **kwargs: object) -> object:
                    if next(count) == at:
                        raise Killed
                    return real(*args, **kwargs)

                patch.setattr(os, name, call)

            for name in ("remove", "unlink", "rmdir", "fsync"):
                failing(name)
            try:
                store.prune(1)
            except Killed:
                assert loadable(store) == made
            else:
                break
        store.prune(1)
        assert loadable(store) == made
        assert [name for name in names(store) if name.startswith("00000010")] == []
    assert at >= 5, "manifest, its folder, two files, their folder"


POINTS_HERE = [point for point in POINTS if point.startswith("checkpoint.")]
# Two files of a checkpoint in two writes each; two files are removed.
HITS = {"before_file": 2, "mid_file": 4, "after_file_before_sync": 2, "after_file": 2} | {
    "mid_prune": 3
}


@pytest.mark.parametrize("point", POINTS_HERE)
def test_a_process_that_is_killed_at_any_point_leaves_one_that_is_whole(
    fresh: Callable[[], Store], point: str
) -> None:
    for hit in range(1, HITS.get(point.partition(".")[2], 1) + 1):
        store = fresh()
        ten = store.manifest(10)
        environment = {**os.environ, "TREEFOLD_FAILPOINT": f"{point}:kill@{hit}"}
        command = [sys.executable, "-c", SAVE, store.url]
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
        assert done.returncode == -signal.SIGKILL
        found = loadable(store)
        is_made = point in ("checkpoint.manifest.after_rename", "checkpoint.mid_prune")
        assert found.version == (20 if is_made else 10)
        assert is_made or found == ten
        saved_again(store, ten)


def test_the_points_are_passed_no_more_often_than_that(fresh: Callable[[], Store]) -> None:
    texts = [f"{point}:kill@{HITS.get(point.partition('.')[2], 1) + 1}" for point in POINTS_HERE]
    environment = {**os.environ, "TREEFOLD_FAILPOINT": ",".join(texts)}
    store = fresh()
    command = [sys.executable, "-c", SAVE, store.url]
    assert subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0
    assert loadable(store).version == 20
