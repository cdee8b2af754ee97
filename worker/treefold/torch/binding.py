"""What of a model and its optimizer makes up a table: which tensors, their names, order and kinds.

Only looks at the model. Changing it, and talking to the cluster, is for other modules.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from treefold.common.errors import ConfigError, LocalProtocolError, UnsupportedError
from treefold.common.optim import describe, placement_of
from treefold.common.spec import (
    BUFFER_GROUP,
    SYNC,
    WIRES,
    Consistency,
    Dtype,
    Placement,
    Rule,
    TableSpec,
    TensorSpec,
)

DTYPES = {
    torch.float32: Dtype.FLOAT32,
    torch.float16: Dtype.FLOAT16,
    torch.bfloat16: Dtype.BFLOAT16,
}
"""What parameters and folded buffers may be; servers hold float32 in every case."""


@dataclass(frozen=True, slots=True)
class BoundTensor:
    """A parameter or buffer of the user's model, and the place in the model that holds it.

    ``group`` is its param group, or `BUFFER_GROUP`. Modules may put a new tensor in the place of a
    buffer, so a buffer is looked up every time.
    """

    name: str
    owner: nn.Module
    attribute: str
    group: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def current(self) -> Tensor:
        """The tensor that is in this place now.

        Raises
        ------
        LocalProtocolError
            Nothing is there any more, or something of another shape, dtype or device.
        """
        found = getattr(self.owner, self.attribute, None)
        if not isinstance(found, Tensor):
            text = f"{self.name!r} is not in the model any more; a table's tensors are fixed"
            raise LocalProtocolError(text)
        if (found.shape, found.dtype, found.device) != (self.shape, self.dtype, self.device):
            text = (
                f"{self.name!r} was {_kind(self.shape, self.dtype, self.device)} when "
                "ps.DistributedOptimizer was made and is "
                f"{_kind(found.shape, found.dtype, found.device)} now; move and convert the model "
                "before making the optimizer"
            )
            raise LocalProtocolError(text)
        return found

    def spec(self) -> TensorSpec:
        """How a table declares it."""
        return TensorSpec(self.name, list(self.shape), DTYPES[self.dtype], self.group)


@dataclass(frozen=True, slots=True)
class BoundModel:
    """The tensors of one table.

    Attributes
    ----------
    parameters : list of BoundTensor
        Those of the optimizer, group by group: the first tensors of the table.
    frozen : list of BoundTensor
        Those of the model that no optimizer owns.
    buffers : list of BoundTensor
        Float buffers, the last tensors of the table.
    opaque : list of BoundTensor
        Buffers of other kinds (counters, masks), which travel as bytes.
    """

    parameters: list[BoundTensor]
    frozen: list[BoundTensor]
    buffers: list[BoundTensor]
    opaque: list[BoundTensor]


def bind(optimizer: Optimizer, model: nn.Module, taken: Callable[[Tensor], bool]) -> BoundModel:
    """Find the tensors of a table.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        The user's.
    model : nn.Module
        Whose parameters it optimizes.
    taken : callable
        Whether a tensor belongs to an earlier table of the job already.

    Returns
    -------
    BoundModel
        Tied weights stand in it once, under their first name.

    Raises
    ------
    ConfigError
        A parameter of the optimizer is not in the model, or belongs to another table.
    UnsupportedError
        A tensor of a kind that servers cannot hold.
    """
    places = {id(tensor): place for tensor, place in _places(model, "named_parameters")}
    groups: list[list[Tensor]] = [group["params"] for group in optimizer.param_groups]
    owned: list[BoundTensor] = []
    for number, group in enumerate(groups):
        for position, parameter in enumerate(group):
            shape = "no shape yet" if is_lazy(parameter) else f"shape {list(parameter.shape)}"
            where = f"parameter {position} of param group {number}, {shape},"
            if id(parameter) not in places:
                text = (
                    f"{where} is not in the model; pass the model whose parameters the optimizer "
                    "was made with"
                )
                raise ConfigError(text)
            if taken(parameter):
                text = f"{where} belongs to an earlier ps.DistributedOptimizer already"
                raise ConfigError(text)
            place = places.pop(id(parameter))
            owned.append(_bound(place, parameter, number))
    frozen = [
        _bound(place, tensor, 0)
        for tensor, place in _places(model, "named_parameters")
        if id(tensor) in places and not taken(tensor)
    ]
    buffers = [
        _bound(place, tensor, BUFFER_GROUP)
        for tensor, place in _places(model, "named_buffers")
        if not taken(tensor)
    ]
    folded = [buffer for buffer in buffers if buffer.dtype in DTYPES]
    opaque = [buffer for buffer in buffers if buffer.dtype not in DTYPES]
    return BoundModel(owned, frozen, folded, opaque)


def wire_of(name: str) -> Dtype:
    """The wire type that a user named.

    Raises
    ------
    ConfigError
        There is no such wire type.
    """
    known = {dtype.name.lower(): dtype for dtype in WIRES}
    if name not in known:
        msg = f"wire is {name!r}; it is one of {', '.join(known)}"
        raise ConfigError(msg)
    return known[name]


def table_spec(
    name: str,
    optimizer: Optimizer,
    tensors: Sequence[BoundTensor],
    wire: Dtype = Dtype.FLOAT32,
    consistency: Consistency = SYNC,
) -> TableSpec:
    """Describe the table of an optimizer.

    Parameters
    ----------
    name : str
        The table's.
    optimizer : torch.optim.Optimizer
        The user's.
    tensors : sequence of BoundTensor
        Parameters group by group, then buffers.
    wire : Dtype
        What gradients and parameters travel as.
    consistency : Consistency
        When contributions are applied.

    Returns
    -------
    TableSpec
        As all workers must declare it alike.

    Raises
    ------
    UnsupportedError
        Servers do not run this optimizer.
    """
    if _has_stepped(optimizer):
        text = (
            "the optimizer has state already (it stepped, or load_state_dict was called), which "
            "the servers would not have; make ps.DistributedOptimizer from a fresh one"
        )
        raise UnsupportedError(text)
    described = describe(optimizer)
    specs = [tensor.spec() for tensor in tensors]
    placement = placement_of(described.name, described.groups)
    return TableSpec(name, Rule.OPTIMIZER, placement, specs, described, wire, consistency)


def _has_stepped(optimizer: Optimizer) -> bool:
    """Whether there is state beyond what a constructor makes (Adagrad's, its counter at 0)."""
    states = (state for state in optimizer.state.values() if state)
    return any(state.get("step") is None or float(state["step"]) != 0.0 for state in states)


def frozen_spec(name: str, tensors: Sequence[BoundTensor]) -> TableSpec:
    """Describe the table of parameters that no optimizer owns."""
    specs = [tensor.spec() for tensor in tensors]
    return TableSpec(name, Rule.CONSTANT, Placement.ELEMENTWISE, specs, None)


@dataclass(frozen=True, slots=True)
class _Place:
    name: str
    owner: nn.Module
    attribute: str


def _places(model: nn.Module, kind: str) -> Iterator[tuple[Tensor, _Place]]:
    """Every tensor once, in the order and under the name that torch gives it."""
    seen: dict[int, None] = {}
    for prefix, module in model.named_modules():
        for attribute, tensor in getattr(module, kind)(recurse=False):
            if id(tensor) not in seen:
                seen[id(tensor)] = None
                name = f"{prefix}.{attribute}" if prefix else attribute
                yield tensor, _Place(name, module, attribute)


def _bound(place: _Place, tensor: Tensor, group: int) -> BoundTensor:
    _check_kind(place.name, tensor, is_buffer=group == BUFFER_GROUP)
    name, owner, attribute = place.name, place.owner, place.attribute
    return BoundTensor(name, owner, attribute, group, tensor.shape, tensor.dtype, tensor.device)


def _check_kind(name: str, tensor: Tensor, *, is_buffer: bool) -> None:
    what = f"{'buffer' if is_buffer else 'parameter'} {name!r}"
    if is_lazy(tensor):
        text = f"{what} has no shape yet; run the model once on a batch before making the optimizer"
        raise UnsupportedError(text)
    if tensor.is_meta:
        text = f"{what} is on the meta device and has no values; materialize the model first"
        raise UnsupportedError(text)
    if tensor.layout is not torch.strided:
        text = f"{what} has layout {tensor.layout}; tables hold dense tensors only"
        raise UnsupportedError(text)
    if not is_buffer and tensor.dtype not in DTYPES:
        text = (
            f"{what} is {tensor.dtype}; servers keep float32, in which it would lose digits; use "
            "float32, bfloat16 or float16"
        )
        raise UnsupportedError(text)


def _kind(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> str:
    return f"{dtype} {list(shape)} on {device}"


def flat_values(tensors: Sequence[BoundTensor], starts: Sequence[int], elements: int) -> Tensor:
    """The present values of a table's tensors.

    Parameters
    ----------
    tensors : sequence of BoundTensor
        In the table's order.
    starts : sequence of int
        Position of each one's first element.
    elements : int
        Length of the flat space.

    Returns
    -------
    Tensor, float32 [elements]
        On the CPU; gaps of tensorwise placement are 0.
    """
    flat = torch.zeros(elements)
    for bound, start in zip(tensors, starts, strict=True):
        value = bound.current.detach()
        flat[start : start + value.numel()].view(value.shape).copy_(value)
    return flat
