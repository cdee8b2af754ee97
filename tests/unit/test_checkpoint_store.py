"""A store gives back what was saved, says what is not, and removes nothing that is needed."""

import errno
import gc
import os
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from tests.unit import bucket
from tests.unit.checkpoint_files import file, frozen, manifest_of, save, trained, write
from treefold.checkpoint.store import Store
from treefold.common.errors import CheckpointError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store in a folder that is not there yet."""
    return Store(str(tmp_path / "a" / "b"))


@pytest.fixture(params=["disk", "memory", "bucket"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store on a disk, and some that are not."""
    is_disk = request.param == "disk"
    return Store(str(tmp_path / "a" / "b") if is_disk else f"{request.param}://{tmp_path.name}")


def names(store: Store) -> list[str]:
    """Every file of a store."""
    fs, root = fsspec.url_to_fs(store.url)
    fs.invalidate_cache()
    return sorted(name.removeprefix(f"{root}/") for name in fs.find(root))


def nobody(text: str) -> None:
    """Nothing is told to who does not expect it."""
    raise AssertionError(text)


# ---- saving and reading --------------------------------------------------------------------------


def test_what_was_saved_is_found_newest_first_on_any_filesystem(any_store: Store) -> None:
    assert any_store.versions() == []
    assert any_store.newest_whole(nobody) is None
    constant = frozen(any_store)
    made = {version: save(any_store, version, constant) for version in (10, 30, 20)}
    assert any_store.versions() == [30, 20, 10]
    assert [any_store.verify(version) for version in (30, 20, 10)] == [made[30], made[20], made[10]]
    assert any_store.newest_whole(nobody) == made[30]


def test_a_version_of_more_than_eight_digits_is_found_and_newest(any_store: Store) -> None:
    constant = frozen(any_store)
    for version in (99_999_999, 100_000_000):
        save(any_store, version, constant)
    assert any_store.versions() == [100_000_000, 99_999_999]


def test_files_without_a_manifest_do_not_count(any_store: Store) -> None:
    made = save(any_store, 10, frozen(any_store))
    trained(any_store, 20)
    assert any_store.versions() == [10]
    assert any_store.newest_whole(nobody) == made
    with pytest.raises(CheckpointError, match=r"00000020/manifest.json: it is not there"):
        any_store.manifest(20)


def test_a_file_is_read_whole_and_only_if_it_is_what_was_saved(any_store: Store) -> None:
    entry = file(any_store, "00000010/x.safetensors", (0, 1))
    assert len(any_store.read(entry)) == entry.nbytes
    fs, root = fsspec.url_to_fs(any_store.url)
    fs.pipe_file(f"{root}/{entry.path}", bytes(entry.nbytes))
    with pytest.raises(CheckpointError, match="checksum"):
        any_store.read(entry)


def test_nothing_is_ever_written_over(any_store: Store) -> None:
    constant = frozen(any_store)
    made = save(any_store, 10, constant)
    before = names(any_store)
    with pytest.raises(CheckpointError, match="is there already") as caught:
        any_store.commit(made)
    assert caught.value.path == "00000010/manifest.json"
    with pytest.raises(CheckpointError, match="is there already") as caught:
        write(any_store, constant.files[0].path, b"other")
    assert caught.value.path == constant.files[0].path
    assert names(any_store) == before
    assert any_store.verify(10) == made


def test_a_manifest_whose_files_are_elsewhere_is_not_written(any_store: Store) -> None:
    """Servers and scheduler have folders of one name on different machines, say."""
    elsewhere = Store("memory://elsewhere-entirely")
    manifest = manifest_of(10, trained(elsewhere, 10), frozen(elsewhere))
    with pytest.raises(CheckpointError, match=r"model-0-1.safetensors: it is not there"):
        any_store.commit(manifest)
    assert any_store.versions() == []
    fsspec.url_to_fs(elsewhere.url)[0].rm(fsspec.url_to_fs(elsewhere.url)[1], recursive=True)


def test_a_manifest_that_could_not_be_read_is_not_written(any_store: Store) -> None:
    manifest = manifest_of(10, frozen(any_store))
    with pytest.raises(CheckpointError, match="not numbered from 0"):
        any_store.commit(manifest)
    assert any_store.versions() == []


@pytest.mark.parametrize("path", ["../x", "x", "00000010/../x", "10/x", "00000010/.x", "/etc/x"])
def test_no_name_leads_out_of_the_folder(any_store: Store, path: str) -> None:
    with pytest.raises(CheckpointError, match="no file of a checkpoint has such a name"):
        write(any_store, path, b"x")
    assert names(any_store) == []


def test_a_file_whose_writer_fails_is_not_left_behind(any_store: Store) -> None:
    def fail() -> None:
        with any_store.create("00000010/x.safetensors") as stream:
            stream.write(b"half of it")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    gc.collect()  # a file of a cloud's is finished when nobody refers to it any more
    assert names(any_store) == []


def test_a_half_written_file_would_be_finished_by_the_collector() -> None:
    stream = bucket.Bucket().open("bucket://left/x", "wb")
    stream.write(b"half of it")
    assert "left/x" not in bucket.OBJECTS
    del stream
    gc.collect()
    assert bucket.OBJECTS.pop("left/x") == b"half of it"


def test_what_was_listed_before_does_not_hide_what_another_process_wrote() -> None:
    here, there = Store("bucket://here"), Store("bucket://there")
    save(here, 10, frozen(here))
    made = save(there, 20, frozen(there))
    assert here.versions() == [10]
    theirs = {k: v for k, v in bucket.OBJECTS.items() if k.startswith("there/")}
    bucket.OBJECTS.update({k.replace("there", "here"): v for k, v in theirs.items()})
    assert here.versions() == [20, 10]
    assert here.newest_whole(nobody) == made


def test_files_and_folders_are_for_their_owner_alone(store: Store) -> None:
    save(store, 10, frozen(store))
    for path in Path(store.url).rglob("*"):
        assert path.stat().st_mode & 0o077 == 0


def test_a_symbolic_link_is_not_written_through(store: Store, tmp_path: Path) -> None:
    folder = Path(store.url) / "00000010"
    folder.mkdir(parents=True)
    (folder / "x.safetensors").symlink_to(tmp_path / "target")
    with pytest.raises(CheckpointError):
        write(store, "00000010/x.safetensors", b"x")
    assert not (tmp_path / "target").exists()


def test_other_things_in_the_folder_are_left_in_peace(store: Store) -> None:
    save(store, 10, frozen(store))
    save(store, 20, frozen(store, job=2), job=2)
    for name in ("notes.txt", "0000001x/y", "00000010/notes.txt", "15/manifest.json"):
        path = Path(store.url) / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    store.prune(1)
    assert store.versions() == [20]
    left = names(store)
    assert {"notes.txt", "0000001x/y", "00000010/notes.txt", "15/manifest.json"} <= set(left)


# ---- the order of what a disk is told ------------------------------------------------------------


def test_files_are_synced_before_the_manifest_gets_its_name_and_folders_after(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def noted(name: str) -> Callable[..., object]:
        real = getattr(os, name)

        def call(target: object, *rest: object, **more: object) -> object:
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target  # noqa: PTH115 - a descriptor
            calls.append(f"{name} {Path(str(path)).name}")
            return real(target, *rest, **more)

        return call

    for name in ("mkdir", "fsync", "rename"):
        monkeypatch.setattr(os, name, noted(name))
    entry = file(store, "00000010/x.safetensors", (0, 1))
    assert calls[-2:] == ["fsync x.safetensors", "fsync 00000010"]
    assert calls.index("mkdir b") < calls.index("fsync a")
    assert calls.index("mkdir 00000010") < calls.index("fsync b", calls.index("mkdir 00000010"))
    calls.clear()
    constant = frozen(store)
    manifest = manifest_of(10, trained(store, 10), constant)
    calls.clear()
    store.commit(manifest)
    assert [call for call in calls if not call.startswith("mkdir")] == [
        f"fsync {Path(store.url).parent.name}",
        "fsync b",
        "fsync manifest.json.unfinished",
        "fsync 00000010",
        "rename manifest.json.unfinished",
        "fsync 00000010",
    ]
    assert entry.nbytes


def test_a_sync_that_fails_is_a_failed_file_and_the_next_try_is_another_file(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = os.fsync, iter([errno.EIO])

    def fsync(descriptor: int) -> None:
        code = 0 if os.path.isdir(f"/proc/self/fd/{descriptor}") else next(left, 0)  # noqa: PTH112 - a descriptor
        if code:
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match=r"could not be written: .*Input/output error"):
        write(store, "00000010/x.safetensors", b"data")
    assert names(store) == [], "what was written is gone: a second sync would find nothing to do"
    write(store, "00000010/x.safetensors", b"data")


# ---- removing ------------------------------------------------------------------------------------


def test_the_newest_are_kept_with_everything_that_they_need(any_store: Store) -> None:
    constant = frozen(any_store)
    made = {version: save(any_store, version, constant) for version in (10, 20, 30, 40)}
    any_store.prune(2)
    assert any_store.versions() == [40, 30]
    assert [any_store.verify(version) for version in (40, 30)] == [made[40], made[30]]
    wanted = {file.path for one in (made[30], made[40]) for t in one.tables for file in t.files}
    assert names(any_store) == sorted(wanted | {"00000030/manifest.json", "00000040/manifest.json"})
    any_store.prune(2)
    assert any_store.versions() == [40, 30]


def test_what_is_being_made_is_not_touched(any_store: Store) -> None:
    constant = frozen(any_store)
    made = save(any_store, 20, constant)
    later = trained(any_store, 30)
    any_store.prune(1)
    any_store.commit(manifest_of(30, later, constant))
    assert any_store.newest_whole(nobody) is not None
    assert any_store.versions() == [30, 20]
    assert any_store.verify(20) == made


def test_a_constant_table_may_be_written_before_the_first_manifest_names_it(
    any_store: Store,
) -> None:
    """Servers that begin anew write it again while an older checkpoint is still the newest."""
    old = frozen(any_store)
    save(any_store, 10, old)
    save(any_store, 20, old)
    new = frozen(any_store, job=2)
    any_store.prune(1)
    save(any_store, 30, new, job=2)
    any_store.prune(1)
    assert any_store.newest_whole(nobody) == any_store.manifest(30)
    assert old.files[0].path not in names(any_store), "no manifest names it any more"


def test_what_was_never_finished_is_removed_once_it_is_older(any_store: Store) -> None:
    constant = frozen(any_store)
    trained(any_store, 10)
    fs, root = fsspec.url_to_fs(any_store.url)
    fs.pipe_file(f"{root}/00000010/manifest.json.unfinished", b"{")
    save(any_store, 20, constant)
    file(any_store, "00000020/t0.model-0-of-a-server-that-died.safetensors", (0, 1))
    any_store.prune(5)
    assert names(any_store) == [
        "00000000/t1.model.frozen-0-1.safetensors",
        "00000020/manifest.json",
        "00000020/t0.model-0-1.safetensors",
        "00000020/t0.model-1-1.safetensors",
    ]


def spoil(store: Store, path: str, data: bytes = b"") -> None:
    """Write over a file, as nobody else does."""
    fs, root = fsspec.url_to_fs(store.url)
    fs.pipe_file(f"{root}/{path}", data)


@pytest.mark.parametrize("path", ["00000040/manifest.json", "00000040/t0.model-0-1.safetensors"])
def test_damaged_checkpoints_do_not_count_as_kept_ones(any_store: Store, path: str) -> None:
    constant = frozen(any_store)
    made = [save(any_store, version, constant) for version in (10, 20, 30, 40)]
    spoil(any_store, path)
    any_store.prune(1)
    assert any_store.versions() == [40, 30]
    told: list[str] = []
    assert any_store.newest_whole(told.append) == made[2]
    assert len(told) == 1
    assert path in told[0]


def test_nothing_is_removed_when_every_checkpoint_is_damaged(any_store: Store) -> None:
    constant = frozen(any_store)
    for version in (10, 20):
        save(any_store, version, constant)
        spoil(any_store, f"{version:08d}/manifest.json")
    before = names(any_store)
    any_store.prune(1)
    assert names(any_store) == before


def test_keeping_none_is_refused_before_anything_is_removed(any_store: Store) -> None:
    save(any_store, 10, frozen(any_store))
    with pytest.raises(ValueError, match="at least 1"):
        any_store.prune(0)
    assert any_store.versions() == [10]


def test_what_comes_after_a_version_is_set_aside_and_may_be_made_again(any_store: Store) -> None:
    constant = frozen(any_store)
    made = [save(any_store, version, constant) for version in (10, 20)]
    trained(any_store, 30)
    assert any_store.set_aside(10) == ["00000030", "00000020"]
    assert any_store.versions() == [10]
    assert "00000020.aside-0/manifest.json" in names(any_store)
    again = save(any_store, 20, constant)
    assert again.tables == made[1].tables
    assert any_store.set_aside(10) == ["00000020"]
    assert "00000020.aside-1/manifest.json" in names(any_store)
    assert any_store.newest_whole(nobody) == made[0]


def test_setting_aside_removes_what_no_manifest_names(any_store: Store) -> None:
    constant = frozen(any_store)
    save(any_store, 10, constant)
    orphan = frozen(any_store, job=2)
    assert any_store.set_aside(10) == []
    assert orphan.files[0].path not in names(any_store)
    assert any_store.newest_whole(nobody) == any_store.manifest(10)
