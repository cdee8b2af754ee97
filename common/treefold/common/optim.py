"""The `torch.optim` classes that servers run: an allow-list by name, and how to describe an object.

Workers describe with it and servers build with it, so that both mean the same class and keywords.
A description is names and plain numbers; nothing here imports or evaluates what a peer sent.
"""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType

import torch
from torch import Tensor
from torch.optim import Optimizer

from treefold.common.errors import DataError, UnsupportedError
from treefold.common.spec import Hyper, HyperValue, OptimizerSpec, Placement

ELEMENTWISE: Mapping[str, type[Optimizer]] = MappingProxyType(
    {
        "SGD": torch.optim.SGD,
        "Adam": torch.optim.Adam,
        "AdamW": torch.optim.AdamW,
        "Adagrad": torch.optim.Adagrad,
        "RMSprop": torch.optim.RMSprop,
        "Adadelta": torch.optim.Adadelta,
        "Adamax": torch.optim.Adamax,
        "Rprop": torch.optim.Rprop,
        "NAdam": torch.optim.NAdam,
        "RAdam": torch.optim.RAdam,
        "ASGD": torch.optim.ASGD,
        "SparseAdam": torch.optim.SparseAdam,
    }
)
"""Classes whose step gives the same bits however a tensor is cut, unless it is fused."""

TENSORWISE: Mapping[str, type[Optimizer]] = MappingProxyType(
    {"Adafactor": torch.optim.Adafactor, "Muon": torch.optim.Muon}
)
"""Classes that look at a whole tensor at once."""

PINNED = ("foreach", "fused")
"""Keywords that choose between kernels of different bits, so that a job never changes them."""

_REFUSED_CLASSES = {
    "LBFGS": "LBFGS evaluates the loss several times in one step and searches along a line through "
    "all parameters at once, which servers that each hold a part of them cannot do"
}
_REFUSED_FLAGS = {
    "capturable": "servers step outside CUDA graphs; pass capturable=False",
    "differentiable": "a step on a server is not in the autograd graph; pass differentiable=False",
}
_NOT_COMPILED = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
_COMPILER = "torch._dynamo"
_MARK = "__dynamo_disable"  # where torch keeps what it calls in the place of such a method
_FLOAT32_EPS = torch.finfo(torch.float32).eps


def placement_of(name: str, groups: Sequence[Hyper] = ()) -> Placement:
    """Where a table with this optimizer may be cut.

    Parameters
    ----------
    name : str
        Name of a `torch.optim` class.
    groups : sequence of dict
        Hyper-parameters of the param groups, as `describe` makes them.

    Returns
    -------
    Placement
        ``ELEMENTWISE`` if tensors may be cut anywhere, ``TENSORWISE`` if they must stay whole: for
        some classes, and for all with ``fused=True``. A fused kernel rounds the last elements of a
        tensor, those that do not fill a vector register, otherwise than the rest (measured with
        torch 2.13 on AVX2 and AVX-512: SGD with momentum, Adam, AdamW).

    Raises
    ------
    UnsupportedError
        If servers do not run this class; the text says why, or which ones they run.
    """
    optimizer_class(name)
    is_fused = any(group.get("fused") for group in groups)
    return Placement.TENSORWISE if is_fused or name in TENSORWISE else Placement.ELEMENTWISE


def optimizer_class(name: str) -> Callable[..., Optimizer]:
    """The `torch.optim` class of this name.

    Parameters
    ----------
    name : str
        Name of a class on the allow-list.

    Returns
    -------
    type
        The class itself; called with parameters and the keywords of `default_hyper`, it makes one.

    Raises
    ------
    UnsupportedError
        If the name is not on the allow-list.
    """
    found = ELEMENTWISE.get(name) or TENSORWISE.get(name)
    if found is None:
        raise UnsupportedError(_refusal(name))
    return found


@cache
def default_hyper(name: str) -> Mapping[str, HyperValue]:
    """What torch takes for every hyper-parameter that is not given.

    Parameters
    ----------
    name : str
        Name of a class on the allow-list.

    Returns
    -------
    Mapping of str to HyperValue
        All keywords of the class but those that servers refuse (``capturable`` and
        ``differentiable``); ``foreach`` and ``fused`` are False, which is what torch does on a CPU
        if not told otherwise.
    """
    parameters = inspect.signature(optimizer_class(name)).parameters.values()
    found: Hyper = {}
    for parameter in parameters:
        key, default = parameter.name, parameter.default
        if default is not parameter.empty and key not in _REFUSED_FLAGS:
            pinned = False if key in PINNED else default
            found[key] = _plain(f"{name}({key}=", pinned, pinned)
    return MappingProxyType(found)


def complete_hyper(name: str, hyper: Hyper) -> Hyper:
    """Check the hyper-parameters of one param group, and fill in torch's defaults.

    Parameters
    ----------
    name : str
        Name of a class on the allow-list.
    hyper : dict
        Keyword arguments, as `describe` makes them.

    Returns
    -------
    dict
        A value for every keyword of `default_hyper`.

    Raises
    ------
    DataError
        If a key is unknown to the class, or a value of another kind than torch's default.
    """
    defaults = default_hyper(name)
    for key, value in hyper.items():
        if key not in defaults:
            known = ", ".join(defaults)
            text = f"servers take no hyper-parameter {key!r} for torch.optim.{name}, only {known}"
            raise DataError(text)
        if not _is_alike(value, defaults[key]):
            text = f"torch.optim.{name}({key}={value!r}): expected one like {defaults[key]!r}"
            raise DataError(text)
    return {**defaults, **hyper}


def hyper_of(optimizer: Optimizer) -> list[Hyper]:
    """The hyper-parameters that a user's optimizer has now, one dict per param group.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Exactly of a class on the allow-list.

    Returns
    -------
    list of dict
        The class's own keywords as plain values: tuples as lists, one-element tensors as numbers.
        What schedulers and users add to a group (``initial_lr`` and the like) is left out.
        ``foreach`` and ``fused`` are definite: False where the user left them to torch.

    Raises
    ------
    UnsupportedError
        If the class is not on the list, is a subclass, or an option has no meaning on a server.
    """
    name = _name_of(optimizer)
    return [_group_hyper(name, group, optimizer.defaults) for group in optimizer.param_groups]


def describe(optimizer: Optimizer) -> OptimizerSpec:
    """A user's optimizer as a name and numbers, from which a server builds its own.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Exactly of a class on the allow-list. Its state is not part of the description.

    Returns
    -------
    OptimizerSpec
        The class's name and `hyper_of` the optimizer.

    Raises
    ------
    UnsupportedError
        As `hyper_of`.
    """
    return OptimizerSpec(_name_of(optimizer), hyper_of(optimizer))


def _name_of(optimizer: Optimizer) -> str:
    own = type(optimizer)
    for name, allowed in [*ELEMENTWISE.items(), *TENSORWISE.items()]:
        if own is allowed:
            return name
    own_name = f"{own.__module__}.{own.__qualname__}"
    for base in own.__mro__[1:]:
        if base in [*ELEMENTWISE.values(), *TENSORWISE.values()]:
            text = (
                f"{own_name} is a subclass of torch.optim.{base.__name__}: servers run torch's own "
                "class by its name and would leave out what the subclass changes; pass an instance "
                f"of torch.optim.{base.__name__} itself"
            )
            raise UnsupportedError(text)
    is_torchs = own is getattr(torch.optim, own.__name__, None)
    raise UnsupportedError(_refusal(own.__name__ if is_torchs else own_name))


def _refusal(name: str) -> str:
    reason = _REFUSED_CLASSES.get(name, f"{name!r} is not a torch.optim class that servers run")
    return f"{reason}; use one of {', '.join([*ELEMENTWISE, *TENSORWISE])}"


def _group_hyper(
    name: str, group: Mapping[str, object], constructed: Mapping[str, object]
) -> Hyper:
    for flag, reason in _REFUSED_FLAGS.items():
        if group.get(flag):
            text = f"torch.optim.{name}({flag}={group[flag]!r}): {reason}"
            raise UnsupportedError(text)
    hyper: Hyper = {}
    for key, default in default_hyper(name).items():
        # Adagrad fills the accumulators of all groups with what its constructor got.
        source = constructed if key == "initial_accumulator_value" else group
        hyper[key] = _plain(f"{name}({key}=", source[key], default)
    return hyper


def _plain(where: str, value: object, default: object) -> HyperValue:
    """A hyper-parameter as the plain value that means the same to torch."""
    if isinstance(default, tuple | list) and isinstance(value, tuple | list):
        return [float(_number(where, item)) for item in value]
    if isinstance(default, bool):
        return bool(value)
    if default is None and (value is None or isinstance(value, str)):
        return value
    return _number(where, value)


def _number(where: str, value: object) -> int | float:
    """A number as Python's own. None is Adafactor's "epsilon of the dtype": on servers, float32."""
    if value is None:
        return _FLOAT32_EPS
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    text = f"torch.optim.{where}{value!r}): servers take numbers, not a {type(value).__name__}"
    raise UnsupportedError(text)


def _is_alike(value: HyperValue, default: HyperValue) -> bool:
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, list):
        if not isinstance(value, list) or len(value) != len(default):
            return False
        return all(_is_alike(item, 0.0) for item in value)
    if default is None:
        return value is None or isinstance(value, str)
    return isinstance(value, int | float) and not isinstance(value, bool)


def spare_compiler() -> None:
    """Keep torch from importing its compiler for the sake of optimizers, where nothing is compiled.

    Torch marks some methods of optimizers as not to be compiled. It does so when they are first
    called, and imports its compiler to do it, which takes as long as importing torch itself. As
    long as nobody else has imported the compiler nothing can be compiled, so until then the methods
    are called without a mark; after that torch goes its usual way. A torch that works otherwise is
    left as it is, and starts later.
    """
    for name in _NOT_COMPILED:
        marked: Callable[..., object] = getattr(Optimizer, name)
        plain: Callable[..., object] = getattr(marked, "__wrapped__", marked)
        if _COMPILER not in sys.modules and not hasattr(plain, _MARK):
            setattr(plain, _MARK, _until_compiled(plain, marked))


def _until_compiled(
    plain: Callable[..., object], marked: Callable[..., object]
) -> Callable[..., object]:
    def call(*args: object, **kwargs: object) -> object:
        if _COMPILER not in sys.modules:
            return plain(*args, **kwargs)
        vars(plain).pop(_MARK, None)
        return marked(*args, **kwargs)

    return call
