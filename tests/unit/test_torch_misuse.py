"""What the training layer cannot do it refuses, with what happened and what to do."""

import contextlib
import sys
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

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
)
from treefold.common.errors import (
    ConfigError,
    JobFailedError,
    LocalProtocolError,
    UnsupportedError,
)
from treefold.torch.leaving import ExitWatch
from treefold.wire.words import Outcome
from treefold.worker.handed import LoopEnd

CALLS: list[Callable[[], object]] = [
    ps.rank,
    ps.size,
    ps.is_chief,
    ps.round,
    ps.state_dict,
    lambda: ps.save("model.safetensors"),
    lambda: ps.batches(dataset(), BATCH),
    lambda: ps.DistributedOptimizer(sgd(parameters_of(bare())), bare()),
    lambda: ps.clip_grad_norm([], 1.0),
]


@pytest.mark.parametrize("call", CALLS)
def test_nothing_works_before_init(call: Callable[[], object]) -> None:
    with pytest.raises(LocalProtocolError, match=r"call ps\.init\(\) first"):
        call()


def test_a_process_joins_once() -> None:
    with joined(ReferenceJob()), pytest.raises(LocalProtocolError, match="called already"):
        ps.init()


def test_a_negative_number_of_threads_is_refused() -> None:
    with pytest.raises(ConfigError, match="threads is -1"):
        ps.init(threads=-1)


def test_init_seeds_every_generator_with_the_jobs_seed() -> None:
    def draw(seed: int) -> bytes:
        with joined(ReferenceJob(), seed):
            return bits(parameters_of(bare())[0])

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    drawn = draw(3)
    torch.manual_seed(3)
    assert drawn == bits(parameters_of(bare())[0])


def test_shutdown_says_done_and_may_be_repeated() -> None:
    with joined(ReferenceJob()) as client:
        ps.shutdown()
        ps.shutdown()
    assert client.left == (Outcome.DONE, "")


def test_rank_size_and_chief_are_the_clients() -> None:
    with joined(ReferenceJob(workers=3)):
        assert (ps.rank(), ps.size(), ps.is_chief()) == (0, 3, True)


# ---- making an optimizer -------------------------------------------------------------------------


def test_a_parameter_outside_of_the_model_is_refused() -> None:
    with (
        joined(ReferenceJob()),
        pytest.raises(ConfigError, match=r"param group 0, shape .8, 6.*not"),
    ):
        ps.DistributedOptimizer(sgd(parameters_of(bare())), bare())


def test_a_parameter_of_two_optimizers_is_refused() -> None:
    with joined(ReferenceJob()):
        model = bare()
        ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        with pytest.raises(ConfigError, match="earlier"):
            ps.DistributedOptimizer(sgd(parameters_of(model)[:1]), model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_parameters_that_servers_cannot_hold_are_refused(dtype: torch.dtype) -> None:
    with joined(ReferenceJob()):
        model = nn.Module()
        model.weight = nn.Parameter(torch.zeros(3, dtype=dtype))
        with pytest.raises(UnsupportedError, match=f"'weight' is {dtype}"):
            ps.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)


def test_a_lazy_layer_is_refused_until_it_has_a_shape() -> None:
    with joined(ReferenceJob()):
        model = nn.LazyLinear(3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(UnsupportedError, match="run the model once"):
            ps.DistributedOptimizer(optimizer, model)


def test_a_model_without_values_is_refused() -> None:
    with joined(ReferenceJob()):
        model = nn.Linear(2, 2, device="meta")
        with pytest.raises(UnsupportedError, match="meta device"):
            ps.DistributedOptimizer(sgd(parameters_of(model)), model)


def test_an_optimizer_that_servers_do_not_run_is_refused() -> None:
    with joined(ReferenceJob()):
        model = bare()
        with pytest.raises(UnsupportedError, match="LBFGS"):
            ps.DistributedOptimizer(torch.optim.LBFGS(model.parameters()), model)


def test_an_optimizer_that_has_stepped_is_refused() -> None:
    with joined(ReferenceJob()):
        model = bare()
        optimizer = sgd(parameters_of(model))
        backward(loss_of(model, list(dataset().tensors)))
        optimizer.step()
        with pytest.raises(UnsupportedError, match="has state already"):
            ps.DistributedOptimizer(optimizer, model)


def test_an_unknown_treatment_of_buffers_is_refused() -> None:
    with joined(ReferenceJob()):
        model = bare()
        with pytest.raises(ConfigError, match="'mean', 'slot0', 'local'"):
            ps.DistributedOptimizer(sgd(parameters_of(model)), model, buffers="median")


def test_an_optimizer_made_after_training_began_is_refused() -> None:
    with joined(ReferenceJob()):
        model = bare()
        ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        list(ps.batches(dataset(), BATCH))
        with pytest.raises(LocalProtocolError, match="before the first loop"):
            ps.DistributedOptimizer(sgd(parameters_of(bare())), bare())


# ---- stepping ------------------------------------------------------------------------------------


def test_one_body_takes_one_step() -> None:
    with joined(ReferenceJob()):
        model = bare()
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        next(ps.batches(dataset(), BATCH))
        optimizer.step()
        with pytest.raises(LocalProtocolError, match="called twice"):
            optimizer.step()


def test_a_step_outside_of_the_body_is_refused() -> None:
    with joined(ReferenceJob()):
        model = bare()
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        list(ps.batches(dataset(), BATCH))
        with pytest.raises(LocalProtocolError, match="outside of the body"):
            optimizer.step()


def test_own_loader_and_batches_do_not_mix() -> None:
    with joined(ReferenceJob()):
        model = bare()
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        optimizer.step()
        with pytest.raises(LocalProtocolError, match="own loader"):
            ps.batches(dataset(), BATCH)


def test_an_own_loader_hears_that_the_job_is_over() -> None:
    with joined(ReferenceJob()) as client:
        model = bare()
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        optimizer.step()
        with (
            mock.patch.object(client, "next_task", return_value=LoopEnd(2, [])),
            pytest.raises(JobFailedError, match="ended while this worker still had data"),
        ):
            optimizer.step()


def test_a_closure_given_to_the_step_is_refused() -> None:
    with joined(ReferenceJob()):
        model = bare()
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        with pytest.raises(UnsupportedError, match="closure"):
            optimizer.step(lambda: 0.0)


def test_the_users_own_optimizer_refuses_to_step() -> None:
    with joined(ReferenceJob()):
        model = bare()
        inner = sgd(parameters_of(model))
        scheduler = StepLR(inner, 1)
        ps.DistributedOptimizer(inner, model)
        with pytest.raises(LocalProtocolError, match=r"step\(\) of the ps\.DistributedOptimizer"):
            inner.step()
        assert scheduler.last_epoch == 0


def test_state_and_groups_of_the_optimizer_are_the_servers() -> None:
    with joined(ReferenceJob()):
        model = bare()
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        for call in (
            optimizer.state_dict,
            lambda: optimizer.load_state_dict({}),
            lambda: optimizer.add_param_group({"params": []}),
        ):
            with pytest.raises(UnsupportedError):
                call()


def test_schedulers_and_hyper_parameters_see_the_same_groups_on_both() -> None:
    with joined(ReferenceJob()):
        model = bare()
        inner = sgd(parameters_of(model))
        optimizer = ps.DistributedOptimizer(inner, model)
        assert optimizer.param_groups is inner.param_groups
        optimizer.param_groups[0]["lr"] = 5.0
        assert inner.param_groups[0]["lr"] == 5.0


def _train_one(change: Callable[[nn.Sequential, torch.optim.Optimizer], object]) -> None:
    """One step after the script did something to its model or optimizer."""
    with joined(ReferenceJob()):
        model = network()
        inner = sgd(parameters_of(model))
        optimizer = ps.DistributedOptimizer(inner, model)
        change(model, inner)
        next(ps.batches(dataset(), BATCH))
        optimizer.step()


def _replace(model: nn.Sequential, _: torch.optim.Optimizer) -> None:
    model[0].weight = nn.Parameter(torch.zeros(8, 6))


def _convert(model: nn.Sequential, _: torch.optim.Optimizer) -> None:
    model.to(torch.bfloat16)


def _overwrite(model: nn.Sequential, _: torch.optim.Optimizer) -> None:
    model.load_state_dict(network().state_dict())


def _regroup(_: nn.Sequential, inner: torch.optim.Optimizer) -> None:
    inner.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_replace, "'0.weight' was replaced"),
        (_convert, "torch.bfloat16.*before making the optimizer"),
        (_overwrite, "wrote to parameter '0.weight'.*load checkpoints before"),
        (_regroup, "param groups were changed"),
    ],
)
def test_a_model_changed_under_the_optimizer_is_an_error(
    change: Callable[[nn.Sequential, torch.optim.Optimizer], object], message: str
) -> None:
    with pytest.raises(LocalProtocolError, match=message):
        _train_one(change)


def test_a_model_left_alone_is_no_error() -> None:
    _train_one(lambda *_: None)


# ---- clipping ------------------------------------------------------------------------------------


def test_the_global_norm_is_limited_over_all_slots() -> None:
    norms: list[float | None] = []
    with joined(ReferenceJob(slots=3)):
        model = bare().eval()
        before = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
        optimizer = ps.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model)
        for batch in ps.batches(dataset(), BATCH, max_rounds=1):
            optimizer.zero_grad()
            backward(loss_of(model, batch))
            ps.clip_grad_norm(model.parameters(), 0.01)
            norms.append(optimizer.grad_norm)
            optimizer.step()
        after = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
        norms.append(optimizer.grad_norm)
    assert torch.linalg.vector_norm(after - before).item() == pytest.approx(0.01, rel=1e-3)
    assert norms[:3] == [None, None, None]
    assert norms[3] is not None
    assert norms[3] > 0.01


def test_without_clipping_there_is_no_norm_and_no_limit() -> None:
    job = ReferenceJob()
    with joined(job):
        model = bare()
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        for number, batch in enumerate(ps.batches(dataset(), BATCH)):
            optimizer.zero_grad()
            backward(loss_of(model, batch))
            if number == 0:
                ps.clip_grad_norm(model.parameters(), 1.0)
            optimizer.step()
        assert optimizer.grad_norm is None
    assert [metas[0].norm_max for metas in job.history] == [1.0, 0.0, 0.0, 0.0]


def test_clipping_in_an_own_loader_counts_from_the_first_step() -> None:
    job = ReferenceJob()
    with joined(job):
        model = bare()
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        for limit in (0.5, 0.25):
            optimizer.zero_grad()
            backward(loss_of(model, list(dataset().tensors)))
            ps.clip_grad_norm(model.parameters(), limit)
            optimizer.step()
    assert [metas[0].norm_max for metas in job.history] == [0.5, 0.25]


@pytest.mark.parametrize("limit", [0.0, -1.0, float("inf"), float("nan")])
def test_a_limit_that_is_no_positive_number_is_refused(limit: float) -> None:
    with pytest.raises(ConfigError, match="max_norm is"):
        ps.clip_grad_norm([], limit)


def test_clipping_some_of_the_parameters_is_refused() -> None:
    with joined(ReferenceJob()):
        model = bare()
        ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        next(ps.batches(dataset(), BATCH))
        with pytest.raises(ConfigError, match=r"1 parameters given.*which have 4"):
            ps.clip_grad_norm(parameters_of(model)[0], 1.0)


def test_frozen_parameters_do_not_matter_for_clipping() -> None:
    job = ReferenceJob()
    with joined(job):
        model = bare()
        model[0].requires_grad_(False)
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)[2:]), model)
        for batch in ps.batches(dataset(), BATCH, max_rounds=1):
            backward(loss_of(model, batch))
            ps.clip_grad_norm(model.parameters(), 1.0)
            optimizer.step()
    assert job.history[0][0].norm_max == 1.0


def test_clipping_after_the_step_or_outside_of_the_body_is_refused() -> None:
    with joined(ReferenceJob()):
        model = bare()
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        for _ in ps.batches(dataset(), BATCH, max_rounds=1):
            optimizer.step()
            with pytest.raises(LocalProtocolError, match="not after it"):
                ps.clip_grad_norm(model.parameters(), 1.0)
        with pytest.raises(LocalProtocolError, match="belongs into the body"):
            ps.clip_grad_norm(model.parameters(), 1.0)


# ---- how a script ends ---------------------------------------------------------------------------


def _ended(script: Callable[[ExitWatch], object]) -> tuple[Outcome, str]:
    said: list[tuple[Outcome, str]] = []
    watch = ExitWatch(lambda outcome, text: said.append((outcome, text)))
    shown: list[BaseException] = []
    with mock.patch.object(sys, "excepthook", lambda _kind, error, _trace: shown.append(error)):
        watch.install()
        try:
            with contextlib.suppress(SystemExit):
                script(watch)
        except ValueError as error:
            sys.excepthook(type(error), error, error.__traceback__)
        watch.on_end()
        watch.remove()
    assert len(shown) == ("Error" in said[0][1]), "errors must be shown as always"
    return said[0]


def _fail(_: ExitWatch) -> None:
    text = "no such layer\nsecond line"
    raise ValueError(text)


@pytest.mark.parametrize(
    ("script", "wanted"),
    [
        (lambda _: None, (Outcome.DONE, "")),
        (lambda _: sys.exit(), (Outcome.DONE, "")),
        (lambda _: sys.exit(0), (Outcome.DONE, "")),
        (lambda _: sys.exit(3), (Outcome.FAILED, "exit status 3")),
        (lambda _: sys.exit("bad"), (Outcome.FAILED, "exit status bad")),
        (_fail, (Outcome.FAILED, "ValueError: no such layer")),
    ],
)
def test_leaving_says_how_the_script_ended(
    script: Callable[[ExitWatch], object], wanted: tuple[Outcome, str]
) -> None:
    assert _ended(script) == wanted


def test_hooks_are_as_they_were_after_leaving() -> None:
    before = (sys.excepthook, sys.exit)
    with joined(ReferenceJob()):
        assert (sys.excepthook, sys.exit) != before
    assert (sys.excepthook, sys.exit) == before


def test_a_forked_process_leaves_nothing() -> None:
    said: list[object] = []
    watch = ExitWatch(lambda *what: said.append(what))
    with mock.patch("os.getpid", return_value=-1):
        watch.on_end()
    assert said == []


def test_a_module_may_return_what_it_likes() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, inputs: Tensor) -> dict[str, Tensor]:
            return {"out": self.layer(inputs)}

    with joined(ReferenceJob()):
        model = Odd()
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(model)), model)
        for batch in ps.batches(dataset(), BATCH):
            optimizer.zero_grad()
            backward(model(batch[0])["out"].sum())
            optimizer.step()
        assert torch.isfinite(model.layer.weight).all()
