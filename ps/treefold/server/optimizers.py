"""Builds a `torch.optim` optimizer from its description, and drives it round by round.

Which classes there are, and where their tables may be cut, is `treefold.common.optim`. Nothing here
knows shards or flat spaces: a parameter is a tensor, and it may be cut into several at any time.
"""

import inspect
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from treefold.common.errors import DataError, UnsupportedError
from treefold.common.optim import PINNED, complete_hyper, default_hyper, optimizer_class
from treefold.common.spec import Hyper, HyperValue, OptimizerSpec

TorchHyper = dict[str, HyperValue | tuple[float, ...]]
"""Hyper-parameters of one param group as torch wants them."""


def check_optimizer(spec: OptimizerSpec) -> list[TorchHyper]:
    """Let torch's own constructor judge an optimizer's hyper-parameters.

    Parameters
    ----------
    spec : OptimizerSpec
        Class by name, and hyper-parameters per param group.

    Returns
    -------
    list of dict
        What `make` and `set_hyper` take, by param group.

    Raises
    ------
    UnsupportedError
        If the class is not on the allow-list.
    DataError
        If a hyper-parameter is unknown or wrong.
    """
    hypers = [_torch_values(complete_hyper(spec.name, hyper)) for hyper in spec.groups]
    for number, hyper in enumerate(hypers):
        _check_by_torch(spec.name, number, hyper)
    return hypers


def make(
    name: str, hypers: Sequence[TorchHyper], groups: Sequence[Sequence[nn.Parameter]]
) -> Optimizer:
    """Make an optimizer.

    Parameters
    ----------
    name : str
        A class of the allow-list.
    hypers : sequence of dict
        From `check_optimizer`, per param group.
    groups : sequence of sequences of Parameter, float32
        Parameters per param group; a group of which there are none is empty.

    Returns
    -------
    torch.optim.Optimizer
        With the state that the class has before its first step.

    Raises
    ------
    DataError
        If torch refuses the parameters.
    """
    arguments: list[dict[str, object]] = [
        {**hyper, "params": list(parameters)}
        for hyper, parameters in zip(hypers, groups, strict=True)
    ]
    # Adagrad makes its state at once, from the constructor's argument whatever the groups say.
    first = hypers[0] if hypers else {}
    constructed = {key: value for key, value in first.items() if key == "initial_accumulator_value"}
    try:
        return optimizer_class(name)(arguments, **constructed)
    except ValueError as error:
        text = f"torch.optim.{name} refuses the parameters of this table: {error}"
        raise DataError(text) from error


def prepare_hyper(spec: OptimizerSpec, groups: Sequence[Hyper]) -> list[TorchHyper]:
    """Check the hyper-parameters of a round.

    Parameters
    ----------
    spec : OptimizerSpec
        As the table was declared.
    groups : sequence of dict
        Hyper-parameters per param group. What one leaves out gets torch's default, never the value
        of an earlier round.

    Returns
    -------
    list of dict
        For `set_hyper`.

    Raises
    ------
    DataError
        If the number of groups is wrong, a key is unknown to the class, a value is of the wrong
        kind, or ``foreach`` or ``fused`` change.
    """
    if len(groups) != len(spec.groups):
        text = (
            f"torch.optim.{spec.name}: hyper-parameters for {len(groups)} param groups, "
            f"not {len(spec.groups)}"
        )
        raise DataError(text)
    found = [complete_hyper(spec.name, hyper) for hyper in groups]
    declared = [complete_hyper(spec.name, hyper) for hyper in spec.groups]
    for number, (hyper, old) in enumerate(zip(found, declared, strict=True)):
        for key in PINNED:
            if key in hyper and hyper[key] != old[key]:
                text = (
                    f"param group {number}: {key}={hyper[key]!r}, but this job was declared with "
                    f"{key}={old[key]!r}; the two give different bits and cannot be exchanged"
                )
                raise DataError(text)
    return [_torch_values(hyper) for hyper in found]


def set_hyper(optimizer: Optimizer, hypers: Sequence[TorchHyper]) -> None:
    """Set the hyper-parameters of the steps that come next.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Made by `make`.
    hypers : sequence of dict
        From `prepare_hyper`.
    """
    for group, hyper in zip(optimizer.param_groups, hypers, strict=True):
        group.update(hyper)


def step(optimizer: Optimizer) -> None:
    """Step every parameter that has a gradient.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Made by `make`.

    Raises
    ------
    UnsupportedError
        If torch cannot take this step; no parameter is changed then.
    """
    for number, group in enumerate(optimizer.param_groups):
        if isinstance(optimizer, SGD) and group["fused"] and group["momentum"]:
            stepped = [p for p in group["params"] if p.grad is not None]
            first = [p for p in stepped if not optimizer.state.get(p)]
            if first and len(first) < len(stepped):
                text = (
                    f"param group {number}: {len(first)} of {len(stepped)} parameters get their "
                    "first gradient later than the others, which torch.optim.SGD with momentum and "
                    "fused=True cannot step; leave out fused=True"
                )
                raise UnsupportedError(text)
    # What torch wraps a step in is for hooks, the profiler and the compiler, which it would import.
    with torch.no_grad():
        inspect.unwrap(type(optimizer).step)(optimizer)


def split_parameter(
    optimizer: Optimizer, parameter: nn.Parameter, values: Sequence[Tensor]
) -> list[nn.Parameter]:
    """Put several parameters in the place of one, so that from now on they can step separately.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Of an elementwise class.
    parameter : Parameter, float32 [n]
        One of the optimizer's parameters.
    values : sequence of Tensor, float32 [n_i]
        Consecutive views of it that cover it, made by `rebased_view`; the new parameters.

    Returns
    -------
    list of Parameter
        One per view, sharing its memory. Their state is what the whole one's was: tensors of its
        length are shared slice by slice, counters are copied.
    """
    pieces = [nn.Parameter(value) for value in values]
    state = optimizer.state.pop(parameter, {})
    bounds = [0, *accumulate(piece.numel() for piece in pieces)]
    if state:
        for piece, (start, stop) in zip(pieces, pairwise(bounds), strict=True):
            optimizer.state[piece] = slice_state(state, start, stop)
    for group in optimizer.param_groups:
        group["params"] = [
            new for old in group["params"] for new in (pieces if old is parameter else [old])
        ]
    return pieces


def slice_state(state: dict[str, object], start: int, stop: int) -> dict[str, object]:
    """What the state of a flat parameter says about some of its elements.

    Parameters
    ----------
    state : dict
        State of one parameter of an elementwise class: tensors float32 [n], and counters.
    start, stop : int
        Which elements.

    Returns
    -------
    dict
        Views of the tensors, copies of the counters.
    """
    return {key: _slice(value, start, stop) for key, value in state.items()}


def rebased_view(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Some elements of a flat tensor, as a tensor that begins its own storage.

    Adding a coalesced sparse tensor to a view counts the view's storage offset twice (torch 2.13 on
    CPU) and so writes beside it, or outside of all memory. SparseAdam does that to parameters and
    state where a gradient has one element, since such a tensor is always coalesced.

    Parameters
    ----------
    tensor : Tensor, float32 [n]
        Without autograd history.
    start, stop : int
        Which elements.

    Returns
    -------
    Tensor, float32 [stop - start]
        The same memory; its ``storage_offset()`` is 0.
    """
    return torch.from_numpy(tensor.numpy()[start:stop])


def _slice(value: object, start: int, stop: int) -> object:
    if not isinstance(value, Tensor):
        return value
    return value.clone() if value.dim() == 0 else rebased_view(value, start, stop)


def _check_by_torch(name: str, number: int, hyper: TorchHyper) -> None:
    arguments = dict(hyper)
    if arguments["lr"] == 0:
        # A warm-up may begin at 0, which some constructors refuse although their steps do not.
        arguments["lr"] = default_hyper(name)["lr"]
    try:
        optimizer_class(name)([nn.Parameter(torch.zeros(1, 1))], **arguments)
    except (ValueError, RuntimeError) as error:
        text = f"torch.optim.{name} refuses param group {number}: {error}"
        raise DataError(text) from error


def _torch_values(hyper: Hyper) -> TorchHyper:
    """Lists, which is what arrives, as the tuples that torch documents."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in hyper.items()}
