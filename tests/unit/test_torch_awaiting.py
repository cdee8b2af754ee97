"""Parameters that are awaited: every use waits for what it needs and no more."""

import copy
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from treefold.common import layout as layouts
from treefold.common.errors import JobFailedError
from treefold.common.layout import Layout
from treefold.common.process import Spent
from treefold.common.spec import OptimizerSpec, Placement, Rule, TableSpec, TensorSpec
from treefold.torch import awaiting
from treefold.torch.awaiting import AwaitedParameter, Awaiting, can_be_awaited
from treefold.torch.binding import DTYPES
from treefold.worker.arrivals import Arrivals

SIZE = 4
Case = Callable[["Net"], object]


class Net(nn.Module):
    """Two layers of one part each, and a tied one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(SIZE, SIZE, bias=False)
        self.second = nn.Linear(SIZE, SIZE, bias=False)
        self.tied = nn.Linear(SIZE, SIZE, bias=False)
        self.tied.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        """One after the other."""
        again: Tensor = checkpoint(self.second, self.first(x), use_reentrant=False)
        return self.tied(again) if self.training else again


class Subject:
    """A net whose parameters are awaited, and the parts of version 1."""

    def __init__(self) -> None:
        self.net = Net()
        parameters = list(self.net.parameters())
        self.flat = torch.zeros(2 * SIZE * SIZE)
        for number, parameter in enumerate(parameters):
            start = number * SIZE * SIZE
            parameter.data = self.flat[start : start + SIZE * SIZE].view(SIZE, SIZE)
        tensors = [TensorSpec(f"t{n}", [SIZE, SIZE], DTYPES[torch.float32], 0) for n in range(2)]
        optimizer = OptimizerSpec("SGD", [{"lr": 0.1}])
        spec = TableSpec("net", Rule.OPTIMIZER, Placement.ELEMENTWISE, tensors, optimizer)
        ranges = [(0, SIZE * SIZE), (SIZE * SIZE, 2 * SIZE * SIZE)]
        self.arrivals = Arrivals(1, ranges)
        self.awaiting = Awaiting(self.net, parameters, Layout(spec), self.flat)
        self.awaiting.begin(self.arrivals, lambda *_: None)

    def put(self, part: int) -> None:
        """A part arrives: ones, or twos."""
        self.arrivals.put(part, torch.full((SIZE * SIZE,), part + 1.0), None)


@pytest.fixture
def subject(monkeypatch: pytest.MonkeyPatch) -> Iterator[Subject]:
    """Everything is awaited."""
    monkeypatch.setattr(layouts, "BLOCK_ELEMENTS", SIZE * SIZE)
    monkeypatch.setattr(awaiting, "_has_compiled", lambda: False)  # by tests before this one
    made = Subject()
    yield made
    made.awaiting.forget()


USES: dict[str, Case] = {
    "data": lambda net: net.second.weight.data.sum(),
    "detach": lambda net: net.second.weight.detach().sum(),
    "item": lambda net: net.second.weight[0, 0].item(),
    "numpy": lambda net: net.second.weight.detach().numpy().sum(),
    "state_dict": lambda net: net.second.state_dict()["weight"].sum(),
    "deepcopy": lambda net: copy.deepcopy(net.second).weight.sum(),
    "pickle": lambda net: net.second.weight.__reduce_ex__(2),  # type: ignore[no-untyped-call] # torch's
    "a list of tensors": lambda net: torch.cat([net.second.weight, net.second.weight]).sum(),
    "keyword": lambda net: nn.functional.linear(torch.ones(1, SIZE), weight=net.second.weight),
    "out of place": lambda net: torch.add(net.second.weight, 1),
    "text": lambda net: repr(net.second.weight),
    "memory": lambda net: net.second.weight.data_ptr(),
    "module": lambda net: net.second(torch.ones(1, SIZE)),
}


@pytest.mark.parametrize("use", USES)
def test_a_use_of_a_parameter_waits_for_it_alone(subject: Subject, use: str) -> None:
    second = subject.net.second.weight
    begun, found = threading.Event(), list[object]()

    def run() -> None:
        begun.set()
        found.append(USES[use](subject.net))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    begun.wait()
    assert type(second) is AwaitedParameter
    assert found == []
    subject.put(1)
    thread.join(20)
    assert len(found) == 1
    assert type(second) is nn.Parameter
    assert torch.equal(second, torch.full((SIZE, SIZE), 2.0))
    assert type(subject.net.first.weight) is AwaitedParameter


def test_questions_about_a_parameter_do_not_wait(subject: Subject) -> None:
    weight = subject.net.second.weight
    assert (weight.shape, weight.dtype, weight.numel()) == ((SIZE, SIZE), torch.float32, SIZE**2)
    assert weight.requires_grad
    assert weight.is_leaf
    assert weight.grad is None
    weight.grad = torch.zeros(SIZE, SIZE)
    weight.grad = None
    assert weight in {weight: None}
    assert isinstance(weight, nn.Parameter)
    assert type(weight) is AwaitedParameter


def test_a_module_sees_plain_parameters_and_the_first_layer_runs_without_the_second(
    subject: Subject,
) -> None:
    seen: list[type] = []
    order: list[str] = []
    subject.net.second.register_forward_pre_hook(lambda module, _: seen.append(type(module.weight)))

    def second_comes(module: nn.Module, inputs: object, output: object) -> None:
        del module, inputs, output
        order.append("first")
        if len(order) == 1:
            subject.put(1)

    subject.net.first.register_forward_hook(second_comes)
    subject.put(0)
    loss = subject.net(torch.ones(1, SIZE, requires_grad=True)).sum()
    loss.backward()
    assert set(seen) == {nn.Parameter}
    grad = subject.net.second.weight.grad
    assert grad is not None
    assert torch.equal(grad, torch.full((SIZE, SIZE), float(SIZE * SIZE)))


def test_values_that_are_here_already_are_not_awaited() -> None:
    made = Subject()
    for part in (0, 1):
        made.put(part)
    made.awaiting.begin(made.arrivals, lambda *_: None)
    assert type(made.net.first.weight) is nn.Parameter
    assert torch.equal(made.net.second.weight, torch.full((SIZE, SIZE), 2.0))


def test_the_versions_of_parameters_do_not_change_when_their_values_come(subject: Subject) -> None:
    weight = subject.net.second.weight
    before = weight._version
    subject.put(1)
    weight.sum()
    assert weight._version == before


def test_a_body_that_does_not_count_goes_on_without_values(subject: Subject) -> None:
    subject.arrivals.end(None)
    subject.net(torch.ones(1, SIZE))
    assert subject.arrivals.is_void
    assert not subject.arrivals.is_torn


def test_who_waits_when_nothing_can_go_on_is_told(subject: Subject) -> None:
    subject.arrivals.end(JobFailedError("a server is gone"))
    with pytest.raises(JobFailedError, match="a server is gone"):
        subject.net(torch.ones(1, SIZE))


def test_nothing_is_awaited_after_all_and_no_hook_is_left(subject: Subject) -> None:
    assert nn.modules.module._global_forward_pre_hooks
    subject.awaiting.forget()
    assert not nn.modules.module._global_forward_pre_hooks
    assert type(subject.net.first.weight) is nn.Parameter
    assert not awaiting._AWAITED


def test_where_the_compiler_was_used_everything_is_here_before_the_body(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(awaiting, "_has_compiled", lambda: True)
    arrivals = Arrivals(2, subject.arrivals.ranges)
    timer = [threading.Timer(0, arrivals.put, (n, torch.ones(SIZE**2), None)) for n in (0, 1)]
    for each in timer:
        each.start()
    subject.awaiting.begin(arrivals, lambda *_: None)
    assert type(subject.net.first.weight) is nn.Parameter
    assert torch.equal(subject.flat, torch.ones(2 * SIZE**2))


def test_scripted_models_and_parameters_of_another_class_cannot_wait() -> None:
    class Own(nn.Parameter):
        """Somebody's own."""

    net = Net()
    assert can_be_awaited(net, list(net.parameters()))
    assert not can_be_awaited(net, [Own(torch.zeros(1))])


def test_the_time_that_a_part_is_waited_for_is_counted_and_no_other() -> None:
    spent = Spent()
    arrivals = Arrivals(1, [(0, 1), (1, 2)], spent)
    arrivals.put(0, torch.zeros(1), None)
    arrivals.take(0)
    assert spent.ns == {}
    taker = threading.Thread(target=arrivals.take, args=(1,))
    taker.start()
    arrivals.put(1, torch.zeros(1), None)
    taker.join()
    late = threading.Timer(0.01, arrivals.end, (None,))
    late.start()
    assert arrivals.take(0) is None
    assert spent.ns["await"] > 5_000_000
