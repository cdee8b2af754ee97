"""What a job is made of: tables, their tensors, their optimizer. Sent once, compared between workers."""

from enum import IntEnum
from typing import Annotated

import msgspec
from msgspec import Meta

TENSORS_MAX = 1_000_000  # far above any model's tensor count; bounds what a peer can make us build
RANK_MAX = 16  # dimensions of one tensor
ELEMENTS_MAX = 1 << 48
GROUPS_MAX = 4096
BUFFER_GROUP = -1  # group number of tensors that are folded but not optimized (BatchNorm statistics)

Name = Annotated[str, Meta(min_length=1, max_length=512)]
HyperValue = bool | int | float | str | None | list[float]
Hyper = dict[str, HyperValue]


class Dtype(IntEnum):
    """Element types that may stand in a message. Numbers are part of the wire format."""

    FLOAT32 = 1
    FLOAT16 = 2
    BFLOAT16 = 3
    FLOAT64 = 4
    INT64 = 5

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return {1: 4, 2: 2, 3: 2, 4: 8, 5: 8}[self.value]


class Rule(IntEnum):
    """What a table does with a round's fold."""

    OPTIMIZER = 1  # one torch.optim step
    CONSTANT = 2  # has no rounds: initial values only (frozen parameters)


class Placement(IntEnum):
    """Where a table may be cut."""

    ELEMENTWISE = 1  # anywhere between blocks
    TENSORWISE = 2  # only between tensors, each of which begins a new block


class TensorSpec(msgspec.Struct, frozen=True, array_like=True):
    """One tensor of a table: its name, its shape, the dtype of the user's copy, its param group.

    Servers hold float32 whatever ``dtype`` says; group `BUFFER_GROUP` is folded but not optimized.
    """

    name: Name
    shape: Annotated[list[Annotated[int, Meta(ge=0, le=ELEMENTS_MAX)]], Meta(max_length=RANK_MAX)]
    dtype: Dtype
    group: Annotated[int, Meta(ge=BUFFER_GROUP, lt=GROUPS_MAX)]

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count


class OptimizerSpec(msgspec.Struct, frozen=True, array_like=True):
    """A ``torch.optim`` class by name, with the keyword arguments of every param group.

    Attributes
    ----------
    name : str
        Class name from the server's allow-list (`treefold.server.optimizers`).
    groups : list of dict
        Keyword arguments per group at declaration. Later rounds bring their own.
    """

    name: Name
    groups: Annotated[list[Hyper], Meta(max_length=GROUPS_MAX)]


class TableSpec(msgspec.Struct, frozen=True, array_like=True):
    """Named tensors with one rule. The order of the tensors is the order of the flat space.

    Tensors of one group stand together, groups in ascending order, buffers last.
    """

    name: Name
    rule: Rule
    placement: Placement
    tensors: Annotated[list[TensorSpec], Meta(min_length=1, max_length=TENSORS_MAX)]
    optimizer: OptimizerSpec | None


def differences(ours: object, theirs: object, lines_max: int = 8) -> list[str]:
    """Where two specs differ, as readable lines such as ``optimizer.groups[0].lr: 0.1 here, 0.2 there``.

    Parameters
    ----------
    ours, theirs : object
        Structs, dicts, lists or scalars of the same kind.
    lines_max : int
        How many lines to return at most; one more says how many were left out.
    """
    found: list[str] = []
    _compare(msgspec.to_builtins(_named(ours)), msgspec.to_builtins(_named(theirs)), "", found)
    if len(found) > lines_max:
        found = [*found[:lines_max], f"... and {len(found) - lines_max} more"]
    return found


def _named(value: object) -> object:
    """Structs as dicts by field name, at every depth (array-like structs would lose their names)."""
    if isinstance(value, msgspec.Struct):
        return {field: _named(getattr(value, field)) for field in value.__struct_fields__}
    if isinstance(value, list | tuple):
        return [_named(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _named(item) for key, item in value.items()}
    if isinstance(value, IntEnum):
        return value.name.lower()
    return value


def _compare(ours: object, theirs: object, where: str, found: list[str]) -> None:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            inner = f"{where}.{key}" if where else str(key)
            _compare(ours.get(key, "absent"), theirs.get(key, "absent"), inner, found)
    elif isinstance(ours, list) and isinstance(theirs, list):
        if len(ours) != len(theirs):
            found.append(f"{where}: {len(ours)} entries here, {len(theirs)} there")
        for number, (left, right) in enumerate(zip(ours, theirs, strict=False)):
            _compare(left, right, f"{where}[{number}]", found)
    elif ours != theirs or type(ours) is not type(theirs):
        found.append(f"{where}: {ours!r} here, {theirs!r} there")
