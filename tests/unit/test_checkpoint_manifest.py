"""A manifest gives back what was saved, or is refused: no byte of its file is without meaning."""

import math
from pathlib import Path

import msgspec
import pytest

from tests.unit.checkpoint_files import FROZEN, TRAINED, frozen, manifest_of, trained
from treefold.checkpoint import manifest as manifests
from treefold.checkpoint.manifest import FileEntry, Manifest, TableEntry, decode, encode
from treefold.checkpoint.store import Store
from treefold.common.errors import CheckpointError
from treefold.common.spec import (
    BUFFER_GROUP,
    Hyper,
    OptimizerSpec,
    Placement,
    TableSpec,
    TensorSpec,
)

NAME = "00000030/manifest.json"


@pytest.fixture
def made(tmp_path: Path) -> Manifest:
    """A manifest of two tables."""
    store = Store(str(tmp_path))
    return manifest_of(30, trained(store, 30), frozen(store))


def changed(made: Manifest, **fields: object) -> Manifest:
    """A manifest whose first table is another one."""
    table = msgspec.structs.replace(made.tables[0], **fields)
    return msgspec.structs.replace(made, tables=[table, *made.tables[1:]])


def moved(entry: FileEntry, **fields: object) -> FileEntry:
    """Another entry for a file."""
    return msgspec.structs.replace(entry, **fields)


def test_a_manifest_is_read_as_it_was_written(made: Manifest) -> None:
    assert decode(encode(made), NAME) == made


def test_its_file_says_what_it_is_to_whoever_opens_it(made: Manifest) -> None:
    found = msgspec.json.decode(encode(made))
    assert list(found) == ["sha256", "manifest"]
    assert found["manifest"]["format"] == manifests.FORMAT
    assert found["manifest"]["tables"][0]["files"][1]["first_block"] == 2


@pytest.mark.parametrize("norm", [math.inf, -math.inf, 0.0, 1e-300, None])
def test_numbers_that_json_has_no_words_for_are_kept(made: Manifest, norm: float | None) -> None:
    groups: list[Hyper] = [
        {"lr": math.inf, "steps": [1.0, -math.inf], "n": 3, "x": None, "word": "inf"}
    ]
    spec = msgspec.structs.replace(TRAINED, optimizer=OptimizerSpec("Rprop", groups))
    kept = changed(made, spec=spec, norm=norm)
    assert decode(encode(kept), NAME) == kept
    assert b"null" not in encode(changed(made, norm=math.nan)).partition(b'"norm":')[2][:20]
    found = decode(encode(changed(made, norm=math.nan)), NAME).tables[0].norm
    assert found is not None
    assert math.isnan(found)


def test_every_flipped_bit_of_the_file_is_noticed(made: Manifest) -> None:
    data = encode(made)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CheckpointError) as caught:
            decode(bytes(flipped), NAME)
        assert caught.value.path == NAME


def test_a_file_that_is_shorter_or_longer_by_anything_is_noticed(made: Manifest) -> None:
    data = encode(made)
    others = [data[:size] for size in range(len(data))]
    others += [data + more for more in (b" ", b"\n", b"\x00", b"}", data)]
    others += [b" " + data, data.replace(b'","manifest":', b'", "manifest":')]
    for other in others:
        with pytest.raises(CheckpointError):
            decode(other, NAME)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "0030/x", "00000030/.x", "00000030/a/b", "a"])
@pytest.mark.parametrize("end", ["", "\n"])
def test_names_that_lead_elsewhere_are_refused(made: Manifest, name: str, end: str) -> None:
    files = [moved(made.tables[0].files[0], path=name + end), made.tables[0].files[1]]
    with pytest.raises(CheckpointError, match="no manifest"):
        decode(encode(changed(made, files=files)), NAME)
    assert not manifests.is_path(name + end)
    assert not manifests.is_path("00000030/a" + end) or not end


def test_a_manifest_of_another_format_is_refused(made: Manifest) -> None:
    newer = msgspec.structs.replace(made, format=2)
    with pytest.raises(CheckpointError, match="format 2, this package reads 1"):
        decode(encode(newer), NAME)


def wrong_manifests(made: Manifest) -> dict[str, Manifest]:
    """Manifests that contradict themselves, by what is said of them."""
    first, second = made.tables[0].files
    constant = made.tables[1]
    stale = moved(first, path="00000020/t0.model-0-1.safetensors")
    later = moved(constant.files[0], path="00000031/later.safetensors")
    constant_later = msgspec.structs.replace(constant, files=[later])
    return {
        "begins with block 2": changed(made, files=[second]),
        "begins with block 0": changed(made, files=[first, first, second]),
        "begins with block 1, not 2": changed(made, files=[first, moved(second, first_block=1)]),
        "has 3 blocks, its files 2": changed(made, files=[first]),
        "has 3 blocks, its files 4": changed(made, files=[first, moved(second, blocks=2)]),
        "stands in it twice": changed(made, files=[first, moved(second, path=first.path)]),
        "is of version 29": changed(made, version=29),
        "00000020/.* is not of version 30": changed(made, files=[stale, second]),
        "00000031/.* is not of version 30": msgspec.structs.replace(
            made, tables=[made.tables[0], constant_later]
        ),
        "not numbered": msgspec.structs.replace(made, tables=made.tables[::-1]),
    }


def test_a_manifest_that_contradicts_itself_is_refused(made: Manifest) -> None:
    for text, wrong in wrong_manifests(made).items():
        with pytest.raises(CheckpointError, match=text):
            decode(encode(wrong), NAME)


def test_files_that_cut_a_tensor_which_stays_whole_are_refused(made: Manifest) -> None:
    spec = msgspec.structs.replace(TRAINED, placement=Placement.TENSORWISE)
    with pytest.raises(CheckpointError, match="cuts a tensor"):
        decode(encode(changed(made, spec=spec)), NAME)


def test_a_spec_that_no_table_may_have_is_refused(made: Manifest) -> None:
    data = encode(made).partition(b'"manifest":')[2][:-1].replace(b'"SGD",[', b'"SGD",[],[')
    sealed = manifests._seal(data)
    with pytest.raises(CheckpointError, match="no manifest"):
        decode(sealed, NAME)


def test_a_constant_table_keeps_its_file_in_an_older_folder(made: Manifest) -> None:
    found = decode(encode(made), NAME)
    assert found.tables[1].spec == FROZEN
    assert found.tables[1].files[0].folder == 0
    assert found.nbytes == sum(file.nbytes for table in found.tables for file in table.files)


def test_a_table_of_buffers_alone_has_no_optimizer_to_be_kept(made: Manifest) -> None:
    tensors = [TensorSpec("mean", [3], TRAINED.tensors[0].dtype, BUFFER_GROUP)]
    spec = TableSpec("model", TRAINED.rule, TRAINED.placement, tensors, None)
    file = moved(made.tables[0].files[0], blocks=1)
    table = TableEntry(0, spec, b"", 30, b"", None, [file])
    kept = msgspec.structs.replace(made, tables=[table])
    assert decode(encode(kept), NAME) == kept
