"""``treefold checkpoint`` as a person calls it."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from tests.unit.checkpoint_files import FROZEN, TRAINED, frozen, manifest_of, save
from treefold.checkpoint.manifest import FileEntry, TableEntry
from treefold.checkpoint.shards import write_shard
from treefold.checkpoint.store import Store
from treefold.cli.contents import size_of
from treefold.common.layout import Layout
from treefold.common.spec import TableSpec
from treefold.common.unit_state import pack

# Runs the command in this process, and says whether it imported torch.
WITHOUT_TORCH = """
import sys
from treefold.cli.main import main
sys.argv = ["treefold", *sys.argv[1:]]
code = main()
assert "torch" not in sys.modules and "numpy" not in sys.modules
sys.exit(code)
"""


def called(*words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What ``treefold checkpoint WORDS`` says."""
    command = [sys.executable, "-m", "treefold.cli", "checkpoint", *words]
    if words[:1] != ("export",):
        command = [sys.executable, "-c", WITHOUT_TORCH, "checkpoint", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of rounds 10, 20 and 30, the newest of them damaged."""
    folder = tmp_path_factory.mktemp("checkpoints")
    store = Store(str(folder))
    constant = frozen(store)
    for version in (10, 20, 30):
        save(store, version, constant)
    path = folder / "00000030" / "t0.model-1-1.safetensors"
    path.write_bytes(path.read_bytes()[::-1])
    return folder


def test_ls_lists_checkpoints_newest_first(folder: Path) -> None:
    done = called("ls", str(folder))
    assert done.returncode == 0, done.stderr
    heading, *lines = [line.split() for line in done.stdout.splitlines()]
    assert heading == ["round", "written", "size", "tables", "files"]
    assert [line[0] for line in lines] == ["30", "20", "10"]
    assert lines[0][1:] == ["2026-11-27T03:00:00+00:00", "470", "B", "model", "model.frozen", "3"]


def test_ls_lists_a_damaged_manifest_with_what_is_wrong(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    save(store, 10, frozen(store))
    (tmp_path / "00000010" / "manifest.json").write_bytes(b"{}")
    done = called("ls", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "10" in done.stdout
    assert "damaged: 00000010/manifest.json: it is no manifest" in done.stdout


def test_inspect_says_what_is_in_a_checkpoint(folder: Path) -> None:
    done = called("inspect", str(folder), "--version", "20")
    assert done.returncode == 0, done.stderr
    for text in (
        "round 20 of job 1, written 2026-11-27T03:00:00+00:00 by treefold 0.1.0",
        "8 slots, seed -5",
        "epoch 0, from round 0 to 4, 40 samples in batches of 10, shuffled",
        "table model: SGD; 1 tensor; 196608 elements; group 0: lr=0.1 nesterov=False",
        "weight  3 x 65536  float32  0",
        "00000020/t0.model-1-1.safetensors  2-2",
        "table model.frozen: constant; 1 tensor;",
    ):
        assert text in done.stdout, f"{text} in {done.stdout}"
    assert called("inspect", str(folder)).stdout.startswith("round 30 "), "the newest by default"


def test_verify_names_what_is_damaged_and_fails(folder: Path) -> None:
    done = called("verify", str(folder))
    assert done.returncode == 1, done.stderr
    damaged = "00000030/t0.model-1-1.safetensors: its checksum is wrong: it is not what was saved"
    assert done.stdout.splitlines() == [
        f"00000030  damaged: {damaged}",
        "00000020  whole: 3 files, 470 B",
        "00000010  whole: 3 files, 470 B",
    ]


def test_verify_of_one_checkpoint_says_how_that_one_is(folder: Path) -> None:
    assert called("verify", str(folder), "--version", "20").returncode == 0
    assert called("verify", str(folder), "--version", "30").returncode == 1


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["ls", "nowhere"], "there is no checkpoint in nowhere"),
        (["verify", "nowhere"], "there is no checkpoint in nowhere"),
        (["verify", ".", "--version", "7"], "there is no checkpoint of version 7 in ."),
        (["ls", "file"], "there is no checkpoint in file"),
        (["ls", "no-such-protocol://x"], "Protocol not known: no-such-protocol"),
        (["ls", ".", "target"], "takes no TARGET"),
        (["export", "."], "needs a TARGET"),
        (["delete", "."], "invalid choice: 'delete'"),
        (["ls", ".", "--vers", "3"], "unrecognized arguments: --vers"),
    ],
)
def test_wrong_usage_is_said_with_exit_code_2(tmp_path: Path, words: list[str], text: str) -> None:
    (tmp_path / "file").touch()
    done = called(*words, folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr


# ---- export --------------------------------------------------------------------------------------


def real(store: Store, number: int, version: int, spec: TableSpec) -> TableEntry:
    """A table of one file whose elements count from 0."""
    layout = Layout(spec)
    [span] = layout.cut(1)
    flat = torch.arange(float(layout.elements)) + version
    units = [pack(start, flat[start:stop], []) for start, stop in layout.parts(span)]
    path = f"{version:08d}/t{number}.safetensors"
    nbytes, digest = write_shard(store, path, spec, units)
    file = FileEntry(path, span.first_block, span.blocks, nbytes, digest)
    return TableEntry(number, spec, b"", version, b"", None, [file])


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Checkpoints of a model at rounds 1 and 2."""
    store = Store(str(tmp_path / "models"))
    constant = real(store, 1, 0, FROZEN)
    for version in (1, 2):
        store.commit(manifest_of(version, real(store, 0, version, TRAINED), constant))
    return tmp_path / "models"


def first_weight(target: Path) -> float:
    """The first element of the exported weight."""
    found = load_file(target)
    assert {name: list(value.shape) for name, value in found.items()} == {
        "weight": [3, 65536],
        "table": [65536],
    }
    return found["weight"][0, 0].item()


def test_export_writes_the_newest_checkpoint_that_is_whole(models: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    done = called("export", str(models), str(target), "--format", "safetensors")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"2 tensors of round 2 are in {target}\n"
    assert first_weight(target) == 2.0
    (models / "00000002" / "t0.safetensors").write_bytes(b"")
    done = called("export", str(models), str(target), "--format", "safetensors")
    assert done.returncode == 0, done.stderr
    assert "version 2 is damaged and passed over: 00000002/t0.safetensors" in done.stderr
    assert first_weight(target) == 1.0


def test_export_of_a_damaged_checkpoint_names_the_file_and_writes_nothing(
    models: Path, tmp_path: Path
) -> None:
    (models / "00000002" / "t0.safetensors").write_bytes(b"")
    done = called("export", str(models), str(tmp_path / "m.pt"), "--version", "2")
    assert done.returncode == 1
    assert "00000002/t0.safetensors: it has 0 bytes" in done.stderr
    (models / "00000001" / "manifest.json").write_bytes(b"")
    done = called("export", str(models), str(tmp_path / "m.pt"))
    assert done.returncode == 1
    assert "no checkpoint in it is whole" in done.stderr
    assert not (tmp_path / "m.pt").exists()


def test_names_in_a_manifest_are_not_taken_for_markup(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    manifest = save(store, 20, frozen(store))
    (tmp_path / "00000020" / "manifest.json").unlink()
    store.commit(msgspec.structs.replace(manifest, created="[red]now[/red]"))
    assert "[red]now[/red]" in called("ls", str(tmp_path)).stdout
    assert "[red]now[/red]" in called("inspect", str(tmp_path)).stdout


def test_sizes_are_said_in_words() -> None:
    assert [size_of(n) for n in (0, 1023, 1024, 1536 << 20, 1 << 60)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 GiB", "1048576.0 TiB",
    ]  # fmt: skip
