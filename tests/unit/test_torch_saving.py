"""The parameters of one version, as a dict and as a file."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import treefold.torch as ps
from tests.support.reference import ReferenceJob, bits
from tests.support.sessions import (
    BATCH,
    backward,
    bare,
    dataset,
    joined,
    loss_of,
    network,
    parameters_of,
    sgd,
    state_bits,
)
from treefold.common.errors import ConfigError, LocalProtocolError, UnsupportedError
from treefold.torch import saving


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight


def test_a_saved_model_loads_into_a_fresh_one(tmp_path: Path) -> None:
    with joined(ReferenceJob(slots=2)):
        model = network()
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        for batch in ps.batches(dataset(), BATCH):
            optimizer.zero_grad()
            backward(loss_of(model, batch))
            optimizer.step()
        ps.save(tmp_path / "model.safetensors")
        trained = state_bits(model)
    fresh = network()
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert state_bits(fresh) == trained
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "round": "4"}


def test_tied_weights_are_saved_under_each_name(tmp_path: Path) -> None:
    with joined(ReferenceJob()):
        model = _Tied()
        ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        ps.save(tmp_path / "tied.safetensors")
    fresh = _Tied()
    fresh.load_state_dict(load_file(tmp_path / "tied.safetensors"))
    assert state_bits(fresh) == state_bits(model)


def test_in_a_body_the_buffers_are_those_of_the_round() -> None:
    with joined(ReferenceJob(slots=2)):
        model = network()
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        before = state_bits(model)
        batch = next(ps.batches(dataset(), BATCH))
        backward(loss_of(model, batch))
        optimizer.step()
        saved = {name: bits(value) for name, value in ps.state_dict().items()}
        assert saved == before
        assert state_bits(model) != before


def test_the_state_is_a_copy() -> None:
    with joined(ReferenceJob()):
        model = bare()
        ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        before = state_bits(model)
        for value in ps.state_dict().values():
            value.zero_()
        assert state_bits(model) == before


def test_several_models_keep_their_names_apart() -> None:
    with joined(ReferenceJob()):
        models = [bare(), bare()]
        for model in models:
            ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        state = ps.state_dict()
    assert bits(state["model.0.weight"]) == bits(parameters_of(models[0])[0])
    assert bits(state["model-1.0.weight"]) == bits(parameters_of(models[1])[0])
    assert len(state) == 8


def test_two_optimizers_of_one_model_save_it_once() -> None:
    with joined(ReferenceJob()):
        model = bare()
        ps.DistributedOptimizer(sgd(parameters_of(model)[:2]), model)
        ps.DistributedOptimizer(sgd(parameters_of(model)[2:]), model)
        assert list(ps.state_dict()) == list(model.state_dict())


def test_a_file_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_tensors: object, path: Path, _metadata: object) -> None:
        path.write_bytes(b"half of it")
        text = "disk full"
        raise OSError(text)

    target = tmp_path / "model.safetensors"
    target.write_bytes(b"the version before")
    with joined(ReferenceJob()):
        model = bare()
        ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        monkeypatch.setattr(saving, "save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            ps.save(target)
    assert target.read_bytes() == b"the version before"
    assert list(tmp_path.iterdir()) == [target]


def test_a_body_that_does_not_count_saves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with joined(ReferenceJob()) as client:
        model = bare()
        ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        monkeypatch.setattr(client, "is_void", True)
        ps.save(tmp_path / "model.safetensors")
        assert list(tmp_path.iterdir()) == []
        monkeypatch.setattr(client, "is_void", False)
        ps.save(tmp_path / "model.safetensors")
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_saving_into_no_folder_is_refused(tmp_path: Path) -> None:
    with joined(ReferenceJob()):
        model = bare()
        ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        with pytest.raises(ConfigError, match="no folder"):
            ps.save(tmp_path / "nowhere" / "model.safetensors")


def test_there_is_nothing_to_save_before_the_first_optimizer() -> None:
    with joined(ReferenceJob()), pytest.raises(LocalProtocolError, match="no parameters yet"):
        ps.state_dict()


def test_a_saved_file_can_be_read_by_others(tmp_path: Path) -> None:
    with joined(ReferenceJob()):
        model = nn.Linear(2, 2).to(torch.bfloat16)
        ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        ps.save(tmp_path / "model.safetensors")
    mode = (tmp_path / "model.safetensors").stat().st_mode & 0o777
    (tmp_path / "plain").touch()
    assert mode == (tmp_path / "plain").stat().st_mode & 0o777
    assert load_file(tmp_path / "model.safetensors")["weight"].dtype == torch.bfloat16


def test_synchronous_tables_are_consistent_as_they_are_and_bodies_are_no_place_to_ask() -> None:
    with joined(ReferenceJob(slots=2)):
        model = bare()
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        before = ps.state_dict(consistent=True)
        assert all(before[name].equal(value) for name, value in ps.state_dict().items())
        for batch in ps.batches(dataset(), batch_size=4):
            with pytest.raises(LocalProtocolError, match="belongs between two loops"):
                ps.state_dict(consistent=True)
            optimizer.zero_grad()
            backward(loss_of(model, batch))
            optimizer.step()


def test_own_loaders_beside_a_synchronous_table_leave_no_moment_to_read_alike() -> None:
    with joined(ReferenceJob(slots=2)):
        model, beside = bare(), bare()
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        ps.DistributedOptimizer(sgd(parameters_of(beside)), beside, consistency="async")
        batch = [torch.stack([dataset()[n][0] for n in range(4)]), torch.arange(4) % 3]
        backward(loss_of(model, batch))
        optimizer.step()
        with pytest.raises(UnsupportedError, match=r"needs ps.batches\(\) beside a synchronous"):
            ps.state_dict(consistent=True)
