"""What is exported is the model's own state dict, as its workers have it."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.unit.checkpoint_files import manifest_of
from tests.unit.shard_jobs import is_same
from treefold.checkpoint.export import FORMATS, export, left_out, state_dict
from treefold.checkpoint.manifest import FileEntry, Manifest, TableEntry
from treefold.checkpoint.shards import write_shard
from treefold.checkpoint.store import Store
from treefold.cli import checkpoint as command
from treefold.common.errors import CheckpointError, ConfigError
from treefold.common.layout import Layout
from treefold.common.round_state import ModelRecord, OpaqueTensor, RoundState, Schedule
from treefold.common.spec import Dtype, Rule, TableSpec
from treefold.common.unit_state import pack
from treefold.torch.binding import BoundTensor, bind, flat_values, frozen_spec, table_spec
from treefold.torch.record import record_of

# Loads an exported file as anybody would who does not know treefold.
LOAD = """
import sys, torch
found = torch.load(sys.argv[1], weights_only=True)
assert found["tied.weight"].data_ptr() == found["first.weight"].data_ptr()
print(*sorted(found))
"""


class Net(nn.Module):
    """Everything that a state dict may have in it, and something that it has not."""

    mask: Tensor
    scratch: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(6, 3)
        self.frozen.requires_grad_(requires_grad=False)
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.register_buffer("mask", torch.rand(5) > 0.5)
        self.register_buffer("scratch", torch.rand(4), persistent=False)
        self.norm.running_mean = torch.randn(6)
        self.norm.num_batches_tracked = torch.tensor(seed)


class Saved:
    """Tables of models, written to a store as a job of several servers would."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(str(folder))
        self.tables: list[TableEntry] = []
        self.taken: list[int] = []

    def model(self, model: nn.Module, optimizer: torch.optim.Optimizer, **how: Dtype) -> None:
        """Save a model as `ps.DistributedOptimizer` declares it."""
        numbers = sum(table.spec.rule is Rule.OPTIMIZER for table in self.tables)
        name = f"model-{numbers}" if numbers else "model"
        bound = bind(optimizer, model, lambda tensor: id(tensor) in self.taken)
        tensors = [*bound.parameters, *bound.buffers]
        spec = table_spec(name, optimizer, tensors, how.get("wire", Dtype.FLOAT32))
        record = record_of(name, model, tensors, bound.opaque)
        self.table(spec, tensors, record)
        if bound.frozen:
            spec = frozen_spec(f"{name}.frozen", bound.frozen)
            self.table(spec, bound.frozen, record_of(name, model, bound.frozen, []))

    def table(self, spec: TableSpec, tensors: list[BoundTensor], record: bytes) -> None:
        """Save a table."""
        layout = Layout(spec)
        flat = flat_values(tensors, layout.starts, layout.elements)
        version = 30 if spec.rule is Rule.OPTIMIZER else 0
        files = []
        for shard, span in enumerate(layout.cut(2)):
            path = f"{version:08d}/{spec.name}-{shard}.safetensors"
            units = [pack(start, flat[start:stop], []) for start, stop in layout.parts(span)]
            nbytes, digest = write_shard(self.store, path, spec, units)
            files.append(FileEntry(path, span.first_block, span.blocks, nbytes, digest))
        number = len(self.tables)
        self.tables.append(TableEntry(number, spec, record, version, b"", None, files))

    def change(self, number: int, **fields: object) -> None:
        """Let an entry of a table be another one."""
        self.tables[number] = msgspec.structs.replace(self.tables[number], **fields)

    def manifest(self) -> Manifest:
        """Commit, and read the manifest."""
        self.store.commit(manifest_of(30, *self.tables))
        return self.store.verify(30)


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """Nothing yet."""
    return Saved(tmp_path / "checkpoints")


def sgd(model: nn.Module) -> torch.optim.SGD:
    """An optimizer of what is to be trained."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Whether two state dicts have the same names, dtypes, shapes and bits."""
    if found.keys() != wanted.keys():
        return False
    pairs = [(found[name], wanted[name]) for name in wanted]
    return all(
        (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(one, other)
        for one, other in pairs
    )


def test_a_model_is_exported_with_everything_that_its_state_dict_has(saved: Saved) -> None:
    model = Net(1)
    saved.model(model, sgd(model))
    found = state_dict(saved.store, saved.manifest())
    assert same(found, model.state_dict())
    assert found["tied.weight"] is found["first.weight"]
    fresh = Net(2)
    fresh.load_state_dict(found, strict=True)
    assert same(fresh.state_dict(), model.state_dict())


def test_a_buffer_that_training_changed_has_its_newest_value(saved: Saved) -> None:
    model = Net(1)
    saved.model(model, sgd(model))
    names = msgspec.msgpack.decode(saved.tables[0].record, type=ModelRecord).opaque
    number = [tensor.name for tensor in names].index("norm.num_batches_tracked")
    changed = {number: (4711).to_bytes(8, "little")}
    state = msgspec.msgpack.encode(RoundState(Schedule([], []), [], changed))
    saved.change(0, state=state)
    found = state_dict(saved.store, saved.manifest())
    assert found["norm.num_batches_tracked"].item() == 4711
    assert torch.equal(found["mask"], model.mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_model_is_exported_in_its_own_type(saved: Saved, dtype: torch.dtype) -> None:
    model = Net(1).to(dtype)
    saved.model(model, sgd(model))
    assert same(state_dict(saved.store, saved.manifest()), model.state_dict())


def test_with_a_narrow_wire_the_values_are_those_that_workers_compute_with(saved: Saved) -> None:
    model = Net(1)
    saved.model(model, sgd(model), wire=Dtype.BFLOAT16)
    found = state_dict(saved.store, saved.manifest())
    weight, mean = model.first.weight.detach(), model.norm.running_mean
    assert mean is not None
    assert is_same(found["first.weight"], weight.bfloat16().float())
    assert not is_same(found["first.weight"], weight)
    assert is_same(found["norm.running_mean"], mean), "buffers are never rounded"
    assert is_same(found["frozen.weight"], model.frozen.weight), "nor is what is frozen"


def test_several_models_stand_under_the_names_of_their_first_tables(saved: Saved) -> None:
    models = [Net(1), Net(2)]
    for model in models:
        saved.model(model, sgd(model))
    found = state_dict(saved.store, saved.manifest())
    first = {f"model.{name}": value for name, value in models[0].state_dict().items()}
    second = {f"model-1.{name}": value for name, value in models[1].state_dict().items()}
    assert same(found, first | second)


def test_a_model_with_two_optimizers_is_one_model(saved: Saved) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    for number, part in enumerate(model):
        optimizer = torch.optim.SGD(part.parameters(), lr=0.1)
        bound = bind(optimizer, model, lambda tensor: id(tensor) in saved.taken)
        buffers = bound.buffers if number == 0 else []
        tensors = [*bound.parameters, *buffers]
        record = record_of("model", model, tensors, bound.opaque if number == 0 else [])
        name = f"model-{number}" if number else "model"
        saved.table(table_spec(name, optimizer, tensors), tensors, record)
        saved.taken += [id(parameter) for parameter in part.parameters()]
    assert same(state_dict(saved.store, saved.manifest()), dict(model.state_dict()))


def test_without_a_record_what_the_tables_say_is_exported(saved: Saved) -> None:
    model = Net(1)
    saved.model(model, sgd(model))
    for number in range(2):
        saved.change(number, record=b"")
    found = state_dict(saved.store, saved.manifest())
    wanted = {**model.state_dict(), "scratch": model.scratch}
    for name in ("tied.weight", "mask", "norm.num_batches_tracked"):
        del wanted[name]
    assert same(found, wanted)


def test_a_value_that_was_too_large_to_be_kept_is_left_out_and_said(saved: Saved) -> None:
    model = Net(1)
    saved.model(model, sgd(model))
    record = msgspec.msgpack.decode(saved.tables[0].record, type=ModelRecord)
    empty = [msgspec.structs.replace(tensor, data=b"") for tensor in record.opaque]
    saved.change(0, record=msgspec.msgpack.encode(msgspec.structs.replace(record, opaque=empty)))
    manifest = saved.manifest()
    assert sorted(left_out(manifest)) == ["mask", "norm.num_batches_tracked"]
    found = state_dict(saved.store, manifest)
    assert model.state_dict().keys() - found.keys() == {"mask", "norm.num_batches_tracked"}


@pytest.mark.parametrize(
    "tensor",
    [
        OpaqueTensor("b", "int64", [2], bytes(8)),
        OpaqueTensor("b", "no_such_type", [1], bytes(8)),
        OpaqueTensor("b", "nn", [1], bytes(8)),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(saved: Saved, tensor: OpaqueTensor) -> None:
    model = nn.Linear(2, 2)
    saved.model(model, sgd(model))
    saved.change(0, record=msgspec.msgpack.encode(ModelRecord("model", [tensor], {}, [])))
    with pytest.raises(CheckpointError, match=r"00000030/manifest.json: 'b' "):
        state_dict(saved.store, saved.manifest())


@pytest.mark.parametrize("field", ["record", "state"])
def test_a_record_that_is_none_is_refused(saved: Saved, field: str) -> None:
    model = nn.BatchNorm1d(2)
    saved.model(model, sgd(model))
    saved.change(0, **{field: b"\xc1"})
    with pytest.raises(CheckpointError, match=r"00000030/manifest.json: the "):
        state_dict(saved.store, saved.manifest())


# ---- files ---------------------------------------------------------------------------------------


def test_a_torch_file_is_read_without_unpickling_and_ties_stay_ties(
    saved: Saved, tmp_path: Path
) -> None:
    model, target = Net(1), tmp_path / "model.pt"
    saved.model(model, sgd(model))
    assert export(saved.store, saved.manifest(), target) == len(model.state_dict())
    command = [sys.executable, "-c", LOAD, str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == sorted(model.state_dict())


def test_a_safetensors_file_has_the_same_in_it_and_names_its_round(
    saved: Saved, tmp_path: Path
) -> None:
    model, target = Net(1), tmp_path / "model.safetensors"
    saved.model(model, sgd(model))
    export(saved.store, saved.manifest(), target, "safetensors")
    assert same(load_file(target), model.state_dict())
    with safetensors.safe_open(target, "pt") as found:
        assert found.metadata() == {"format": "pt", "round": "30"}


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_file_appears_whole_or_not_at_all(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str
) -> None:
    model, folder = nn.Linear(2, 2), tmp_path / "out"
    folder.mkdir()
    saved.model(model, sgd(model))
    manifest = saved.manifest()
    target = folder / "model"
    target.write_text("older")

    def failing(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(CheckpointError, match="No space left") as caught:
            export(saved.store, manifest, target, file_format)
    assert caught.value.path == str(target)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("model", "older")]
    export(saved.store, manifest, target, file_format)
    assert [path.name for path in folder.iterdir()] == ["model"]
    assert target.stat().st_mode & 0o777 == (folder.stat().st_mode & 0o666)


def test_a_damaged_file_is_named_and_nothing_is_written(saved: Saved, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    saved.model(model, sgd(model))
    manifest = saved.manifest()
    path = saved.tables[0].files[0].path
    file = tmp_path / "checkpoints" / path
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(CheckpointError) as caught:
        export(saved.store, manifest, tmp_path / "model.pt")
    assert caught.value.path == path
    assert not (tmp_path / "model.pt").exists()


def test_what_cannot_be_a_target_is_refused(saved: Saved, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    saved.model(model, sgd(model))
    manifest = saved.manifest()
    with pytest.raises(ConfigError, match="there is no folder"):
        export(saved.store, manifest, tmp_path / "none" / "model.pt")
    with pytest.raises(ConfigError, match="it is a folder"):
        export(saved.store, manifest, tmp_path)
    with pytest.raises(ConfigError, match="it is one of torch, safetensors"):
        export(saved.store, manifest, tmp_path / "model.onnx", "onnx")


def test_the_command_knows_the_same_formats() -> None:
    assert command.FORMATS == FORMATS
