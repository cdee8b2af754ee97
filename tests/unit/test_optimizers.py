"""The allow-list of optimizers: described by workers, built by servers, the same to torch."""

import inspect
from collections.abc import Callable, Mapping

import msgspec
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from treefold.common.errors import DataError, UnsupportedError
from treefold.common.optim import (
    ELEMENTWISE,
    TENSORWISE,
    default_hyper,
    describe,
    hyper_of,
    optimizer_class,
    placement_of,
)
from treefold.common.spec import Hyper, OptimizerSpec, Placement
from treefold.server.optimizers import (
    check_optimizer,
    make,
    prepare_hyper,
    rebased_view,
    set_hyper,
    split_parameter,
)

ALLOWED: Mapping[str, Callable[..., Optimizer]] = {**ELEMENTWISE, **TENSORWISE}


def _parameters(count: int = 1) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(count)
    return [nn.Parameter(torch.randn(3, 4, generator=generator)) for _ in range(count)]


def build(spec: OptimizerSpec, groups: list[list[nn.Parameter]]) -> Optimizer:
    """An optimizer as a server makes it."""
    return make(spec.name, check_optimizer(spec), groups)


def _travelled(spec: OptimizerSpec) -> OptimizerSpec:
    """The spec as the other end of the wire reads it."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=OptimizerSpec)


def _options(optimizer: Optimizer) -> list[dict[str, object]]:
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


# ---- the list ------------------------------------------------------------------------------------


def test_every_class_of_torch_is_allowed_or_refused_for_a_reason() -> None:
    classes = inspect.getmembers(torch.optim, inspect.isclass)
    names = {name for name, own in classes if issubclass(own, Optimizer)}
    assert names == {*ALLOWED, "LBFGS", "Optimizer"}


def test_elementwise_tables_may_be_cut_anywhere_and_tensorwise_ones_between_tensors() -> None:
    assert {placement_of(name) for name in ELEMENTWISE} == {Placement.ELEMENTWISE}
    assert {placement_of(name) for name in TENSORWISE} == {Placement.TENSORWISE}


def test_a_fused_class_is_tensorwise_since_its_kernels_round_the_ends_of_tensors_otherwise() -> (
    None
):
    assert placement_of("AdamW", [{"lr": 0.1}, {"fused": False}]) is Placement.ELEMENTWISE
    assert placement_of("AdamW", [{"lr": 0.1}, {"fused": True}]) is Placement.TENSORWISE


@pytest.mark.parametrize("ask", [placement_of, optimizer_class, default_hyper])
def test_lbfgs_is_refused_with_the_reason(ask: Callable[[str], object]) -> None:
    with pytest.raises(UnsupportedError, match=r"several times in one step.*use one of SGD"):
        ask("LBFGS")


def test_an_unknown_name_is_refused_with_the_names_that_are_known() -> None:
    with pytest.raises(UnsupportedError, match=r"'Lion'.*SGD, Adam, AdamW.*Muon"):
        placement_of("Lion")


# ---- describing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALLOWED)
def test_a_server_builds_what_the_user_has(name: str) -> None:
    users = ALLOWED[name](_parameters())
    users.param_groups[0]["lr"] = 0.123
    spec = describe(users)
    built = build(_travelled(spec), [_parameters()])
    assert type(built) is type(users)
    unset = {"foreach": False, "fused": False}
    wanted = {k: unset.get(k, v) if v is None else v for k, v in _options(users)[0].items()}
    if name == "Adafactor":  # torch takes the epsilon of the parameter's dtype
        wanted["eps"] = (torch.finfo(torch.float32).eps, 1e-3)
    assert _options(built) == [wanted]


@pytest.mark.parametrize("name", ALLOWED)
def test_a_description_is_the_same_on_both_ends_of_the_wire(name: str) -> None:
    spec = describe(ALLOWED[name](_parameters()))
    assert msgspec.msgpack.encode(_travelled(spec)) == msgspec.msgpack.encode(spec)


def test_every_param_group_has_its_own_hyper_parameters() -> None:
    a, b = _parameters(2)
    groups = [{"params": [a], "lr": 0.5}, {"params": [b], "betas": (0.8, 0.9)}]
    spec = describe(ALLOWED["Adam"](groups, lr=0.1))
    assert [group["lr"] for group in spec.groups] == [0.5, 0.1]
    assert [group["betas"] for group in spec.groups] == [[0.9, 0.999], [0.8, 0.9]]


def test_what_schedulers_and_users_add_to_a_group_is_left_out() -> None:
    users = torch.optim.SGD([{"params": _parameters(), "name": "head"}], lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.OneCycleLR(users, max_lr=1.0, total_steps=10)
    assert "initial_lr" in users.param_groups[0]
    assert set(hyper_of(users)[0]) == set(default_hyper("SGD"))


def test_momentum_that_a_scheduler_cycles_is_described_as_it_is_now() -> None:
    users = torch.optim.Adam(_parameters(), lr=0.1)
    torch.optim.lr_scheduler.OneCycleLR(users, max_lr=1.0, total_steps=10, max_momentum=0.97)
    assert hyper_of(users)[0]["betas"] == [0.97, 0.999]
    assert hyper_of(users)[0]["lr"] == users.param_groups[0]["lr"]


@pytest.mark.parametrize("key", ["foreach", "fused"])
@pytest.mark.parametrize(("given", "pinned"), [(None, False), (False, False), (True, True)])
def test_the_kernel_is_pinned_to_what_torch_would_take_on_a_cpu(
    key: str, given: bool | None, pinned: bool
) -> None:
    users = ALLOWED["AdamW"](_parameters(), **{key: given})
    assert hyper_of(users)[0][key] is pinned


def test_a_tensor_learning_rate_is_described_as_its_number() -> None:
    users = torch.optim.SGD(_parameters(), lr=torch.tensor(0.25))
    assert hyper_of(users)[0]["lr"] == 0.25
    assert type(hyper_of(users)[0]["lr"]) is float


@pytest.mark.parametrize("flag", ["capturable", "differentiable"])
def test_an_option_without_meaning_on_a_server_is_refused(flag: str) -> None:
    users = torch.optim.Adam(_parameters())
    users.param_groups[0][flag] = True
    with pytest.raises(UnsupportedError, match=f"{flag}=True"):
        describe(users)


def test_a_value_that_cannot_travel_is_refused() -> None:
    users = torch.optim.SGD(_parameters(), lr=0.1)
    users.param_groups[0]["lr"] = torch.ones(2)
    with pytest.raises(UnsupportedError, match="servers take numbers, not a Tensor"):
        describe(users)


def test_a_subclass_is_refused_because_servers_would_not_run_it() -> None:
    class Mine(torch.optim.AdamW):
        pass

    with pytest.raises(UnsupportedError, match=r"Mine is a subclass of torch\.optim\.AdamW"):
        describe(Mine(_parameters()))


def test_lbfgs_objects_are_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedError, match="several times in one step"):
        describe(torch.optim.LBFGS(_parameters()))


def test_a_users_own_class_is_refused_even_under_a_name_of_torchs() -> None:
    class Adam(Optimizer):
        pass

    with pytest.raises(UnsupportedError, match=r"Adam' is not a torch\.optim class"):
        describe(Adam(_parameters(), {}))


def test_adagrads_accumulators_begin_where_its_constructor_said() -> None:
    a, b = _parameters(2)
    groups = [{"params": [a]}, {"params": [b], "initial_accumulator_value": 9.0}]
    users = ALLOWED["Adagrad"](groups, initial_accumulator_value=2.0)
    built = build(describe(users), [[parameter] for parameter in _parameters(2)])
    assert [state["sum"].unique().tolist() for state in users.state.values()] == [[2.0], [2.0]]
    assert [state["sum"].unique().tolist() for state in built.state.values()] == [[2.0], [2.0]]


# ---- building ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALLOWED)
def test_a_group_of_which_a_shard_holds_nothing_is_empty(name: str) -> None:
    spec = OptimizerSpec(name, [{}, {}])
    optimizer = build(spec, [[], _parameters()])
    build(spec, [[], []]).step()
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 1]


@pytest.mark.parametrize(
    ("hyper", "text"),
    [
        ({"momentun": 0.9}, r"no hyper-parameter 'momentun'.*momentum"),
        ({"params": 0.9}, "no hyper-parameter 'params'"),
        ({"differentiable": True}, "no hyper-parameter 'differentiable'"),
        ({"lr": "fast"}, r"lr='fast'.*like 0\.001"),
        ({"lr": True}, "lr=True"),
        ({"lr": [0.1]}, "lr="),
        ({"nesterov": 1}, r"nesterov=1\).*like False"),
        ({"foreach": None}, "foreach=None"),
        ({"lr": -1.0}, "refuses param group 0: Invalid learning rate"),
        ({"nesterov": True}, "Nesterov momentum requires"),
        ({"foreach": True, "fused": True}, "cannot be `True` together"),
    ],
)
def test_a_wrong_hyper_parameter_is_refused(hyper: Hyper, text: str) -> None:
    with pytest.raises(DataError, match=text):
        build(OptimizerSpec("SGD", [hyper]), [_parameters()])


@pytest.mark.parametrize("betas", [[0.9], [0.9, "x"], 0.9, [1.5, 0.9]])
def test_wrong_betas_are_refused(betas: list[float]) -> None:
    with pytest.raises(DataError, match=r"betas|beta parameter"):
        build(OptimizerSpec("Adam", [{"betas": betas}]), [_parameters()])


def test_a_parameter_that_the_class_cannot_step_is_refused() -> None:
    with pytest.raises(DataError, match="only supports 2D"):
        build(OptimizerSpec("Muon", [{}]), [[nn.Parameter(torch.zeros(3))]])


@pytest.mark.parametrize("name", ALLOWED)
def test_a_warm_up_may_begin_with_a_learning_rate_of_zero(name: str) -> None:
    users = ALLOWED[name](_parameters())
    torch.optim.lr_scheduler.LambdaLR(users, lambda epoch: epoch / 10)
    assert _options(build(describe(users), [_parameters()]))[0]["lr"] == 0


# ---- hyper-parameters of a round -----------------------------------------------------------------


SGD = OptimizerSpec("SGD", [{"lr": 1.0, "momentum": 0.0}])


def _stepped(optimizer: Optimizer, parameter: nn.Parameter, groups: list[Hyper]) -> Tensor:
    parameter.grad = torch.ones_like(parameter)
    set_hyper(optimizer, prepare_hyper(SGD, groups))
    optimizer.step()
    return parameter.detach().clone()


def test_a_round_steps_with_its_own_learning_rate() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = build(SGD, [[parameter]])
    assert _stepped(optimizer, parameter, [{"lr": 1.0}]).item() == -1.0
    assert _stepped(optimizer, parameter, [{"lr": 0.5}]).item() == -1.5


def test_what_a_round_leaves_out_is_torchs_default_and_no_memory() -> None:
    spec = OptimizerSpec("SGD", [{"lr": 1.0, "momentum": 0.5}])
    optimizer = build(spec, [_parameters()])
    set_hyper(optimizer, prepare_hyper(spec, [{}]))
    group = _options(optimizer)[0]
    assert (group["lr"], group["momentum"]) == (default_hyper("SGD")["lr"], 0)


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        ([{"lr": 0.5}], "for 1 param groups, not 2"),
        ([{"lr": 0.5}, {"learning_rate": 0.5}], "no hyper-parameter 'learning_rate'"),
        ([{"lr": 0.5}, {"lr": None}], "lr=None"),
        ([{"lr": 0.5}, {"foreach": True}], r"foreach=True, but .* foreach=False"),
        ([{"lr": 0.5}, {"fused": True}], "fused=True"),
    ],
)
def test_wrong_hyper_parameters_of_a_round_are_refused(groups: list[Hyper], text: str) -> None:
    with pytest.raises(DataError, match=text):
        prepare_hyper(OptimizerSpec("Adam", [{"lr": 1.0}, {"lr": 2.0}]), groups)


# ---- cutting a parameter -------------------------------------------------------------------------


def test_the_pieces_of_a_parameter_share_its_memory_and_take_over_its_state() -> None:
    whole = nn.Parameter(torch.zeros(5))
    optimizer = build(OptimizerSpec("Adam", [{}]), [[whole]])
    whole.grad = torch.arange(5.0)
    optimizer.step()
    before = whole.detach().clone()
    exp_avg = optimizer.state[whole]["exp_avg"].clone()
    values = [rebased_view(whole.detach(), 0, 2), rebased_view(whole.detach(), 2, 5)]
    first, second = split_parameter(optimizer, whole, values)
    assert list(optimizer.state) == [first, second]
    assert torch.equal(torch.cat([first.detach(), second.detach()]), before)
    states = [optimizer.state[first], optimizer.state[second]]
    assert torch.equal(torch.cat([state["exp_avg"] for state in states]), exp_avg)
    first.grad = torch.ones(2)
    optimizer.step()
    assert [state["step"].item() for state in states] == [2.0, 1.0]
    assert torch.equal(whole.detach()[2:], before[2:])
    assert not torch.equal(whole.detach()[:2], before[:2])


def test_a_rebased_view_shares_memory_and_begins_its_storage() -> None:
    flat = torch.zeros(6)
    view = rebased_view(flat, 2, 5)
    view[0] = 7.0
    assert flat.tolist() == [0, 0, 7, 0, 0, 0]
    assert view.storage_offset() == 0
    view.add_(torch.tensor([0.0, 0.0, 1.0]).to_sparse())
    assert flat.tolist() == [0, 0, 7, 0, 1, 0]
