"""What a job is made of: tables, their tensors, their optimizer.

Sent once by every worker and compared: all must declare the same.
"""

from enum import IntEnum
from math import ceil
from typing import Annotated

import msgspec
from msgspec import Meta

from treefold.common.errors import DataError
from treefold.common.plan import SLOTS_MAX

TENSORS_MAX = 1_000_000  # far above any model's tensor count; bounds what a peer can make us build
RANK_MAX = 16  # dimensions of one tensor
ELEMENTS_MAX = 1 << 38  # of a table, 1 TiB of float32; its blocks and parts can be numbered
GROUPS_MAX = 4096
BUFFER_GROUP = -1  # group of tensors that are folded, not optimized (BatchNorm statistics)

Name = Annotated[str, Meta(min_length=1, max_length=512)]
Text = Annotated[str, Meta(max_length=65_536)]
HyperValue = bool | int | float | Text | None | Annotated[list[float], Meta(max_length=64)]
Hyper = Annotated[dict[Name, HyperValue], Meta(max_length=256)]


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
        return _ITEM_BYTES[self]


_ITEM_BYTES = {1: 4, 2: 2, 3: 2, 4: 8, 5: 8}


class Rule(IntEnum):
    """What a table does with a round's fold."""

    OPTIMIZER = 1  # one torch.optim step
    CONSTANT = 2  # has no rounds: initial values only (frozen parameters)


class ConsistencyKind(IntEnum):
    """When a table's contributions are applied."""

    SYNC = 1  # all slots of a round together, folded
    ASYNC = 2  # each one by itself, as it comes
    SSP = 3  # the same, and no slot gets further ahead of the slowest one than a bound
    QUORUM = 4  # rounds as in SYNC, which go on without the last slots after a while


class Compensation(IntEnum):
    """What is done about contributions that were computed with an older version.

    A contribution is as stale as versions were made between the one that it was computed with and
    the one that it is applied to.
    """

    NONE = 1
    LR_STALENESS = 2  # the learning rate is divided by the staleness, where that is more than 1
    DC_ASGD = 3  # the gradient is corrected by how far parameters have moved since
    DC_ASGD_ADAPTIVE = 4  # the same, less where gradients are large
    MOMENTUM = 5  # what being asynchronous adds to the momentum is taken off it

    @property
    def is_delayed(self) -> bool:
        """Whether servers need the values that a gradient was computed with."""
        return self in (Compensation.DC_ASGD, Compensation.DC_ASGD_ADAPTIVE)


COMPENSATIONS = {one.name.lower().replace("_", "-"): one for one in Compensation}
"""By the names that users give them."""
VERSIONS_MAX = 4096  # older versions that a server may be asked to keep
GRACE_MAX = 1e6  # times that it took a quorum to come together


class Late(IntEnum):
    """What becomes of a batch whose contribution comes when its round has gone on without it."""

    REQUEUE = 1  # a later round has it again
    DROP = 2  # it is left out


class Consistency(msgspec.Struct, frozen=True, array_like=True):
    """When contributions are applied, and how far slots may be apart.

    ``staleness`` is the bound of `ConsistencyKind.SSP` in rounds, 0 for other kinds;
    ``staleness_max`` that of `ConsistencyKind.ASYNC` in versions, 0 for none. With
    compensations that correct gradients ``strength`` is how much of the correction counts, and
    ``versions`` how many older versions servers keep for it. With `ConsistencyKind.QUORUM` a round
    goes on with ``quorum`` slots once ``grace`` times the time that it took to get them has passed.
    """

    kind: ConsistencyKind = ConsistencyKind.SYNC
    staleness: Annotated[int, Meta(ge=0, le=1 << 31)] = 0
    compensation: Compensation = Compensation.NONE
    strength: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    versions: Annotated[int, Meta(ge=0, le=VERSIONS_MAX)] = 0
    quorum: Annotated[int, Meta(ge=0, le=SLOTS_MAX)] = 0
    grace: Annotated[float, Meta(ge=0, le=GRACE_MAX)] = 0.0
    late: Late = Late.REQUEUE
    staleness_max: Annotated[int, Meta(ge=0, le=1 << 31)] = 0


SYNC = Consistency()


class HealthPolicy(IntEnum):
    """What is done about a contribution that is not finite, or whose norm is outside of a band."""

    OFF = 1
    WARN = 2  # it is counted and named
    REJECT = 3  # it is left out
    SKIP_ROUND = 4  # its round changes nothing
    CLIP = 5  # it is scaled to the edge of the band; left out if it is not finite


class Aggregation(IntEnum):
    """What the contributions of a round are made into."""

    MEAN = 1
    MEDIAN = 2  # of each coordinate
    TRIMMED_MEAN = 3  # of each coordinate, without the largest and the smallest
    KRUM = 4  # the one that is closest to its neighbours
    CENTERED_CLIPPING = 5  # a centre, and what others differ from it up to a radius

    @property
    def is_paired(self) -> bool:
        """Whether it needs how far contributions are apart, over all of the table."""
        return self in (Aggregation.KRUM, Aggregation.CENTERED_CLIPPING)

    @property
    def is_by_coordinate(self) -> bool:
        """Whether each coordinate is made by itself."""
        return self in (Aggregation.MEDIAN, Aggregation.TRIMMED_MEAN)


HEALTH_POLICIES = {one.name.lower().replace("_", "-"): one for one in HealthPolicy}
AGGREGATIONS = {one.name.lower().replace("_", "-"): one for one in Aggregation}
"""By the names that users give them."""
BAND_MAX = 1e6  # deviations
WINDOW_MAX = 4096  # norms that a band is made of
ITERATIONS_MAX = 100


class Guard(msgspec.Struct, frozen=True, array_like=True):
    """What happens to the contributions of a round before they are applied.

    The band is ``band`` deviations wide to both sides, and made of the last ``window`` norms, once
    there are ``warmup``. ``share`` is what `Aggregation.TRIMMED_MEAN` trims at each side,
    ``byzantine`` how many bad ones `Aggregation.KRUM` is to stand; ``radius`` (0: from the round)
    and ``iterations`` are those of `Aggregation.CENTERED_CLIPPING`.
    """

    policy: HealthPolicy = HealthPolicy.OFF
    band: Annotated[float, Meta(gt=0, le=BAND_MAX)] = 8.0
    window: Annotated[int, Meta(ge=1, le=WINDOW_MAX)] = 256
    warmup: Annotated[int, Meta(ge=1, le=WINDOW_MAX)] = 32
    aggregation: Aggregation = Aggregation.MEAN
    share: Annotated[float, Meta(ge=0, lt=0.5)] = 0.0
    byzantine: Annotated[int, Meta(ge=0, le=SLOTS_MAX)] = 0
    radius: Annotated[float, Meta(ge=0)] = 0.0
    iterations: Annotated[int, Meta(ge=0, le=ITERATIONS_MAX)] = 0

    def trimmed(self, count: int) -> int:
        """How many of ``count`` values a rule for coordinates leaves out at each end."""
        if self.aggregation is Aggregation.MEDIAN:
            return max(0, (count - 1) // 2)
        return ceil(round(self.share * count, 9))  # 0.28 of 25 are 7, and not a little more

    @property
    def is_on(self) -> bool:
        """Whether contributions are looked at at all."""
        return self.policy is not HealthPolicy.OFF or self.aggregation is not Aggregation.MEAN

    @property
    def is_deciding(self) -> bool:
        """Whether contributions may be left out, or changed."""
        is_watching = self.policy in (HealthPolicy.OFF, HealthPolicy.WARN)
        return not is_watching or self.aggregation is not Aggregation.MEAN


UNGUARDED = Guard()


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


WIRES = (Dtype.FLOAT32, Dtype.FLOAT16, Dtype.BFLOAT16)
"""What gradients and parameters may travel as."""


class TableSpec(msgspec.Struct, frozen=True, array_like=True):
    """Named tensors with one rule. The order of the tensors is the order of the flat space.

    Tensors of one group stand together, groups in ascending order, buffers last. ``wire`` is what
    every node of the fold, and every version that is pulled, is rounded to; parts with buffers in
    them stay float32.

    Raises
    ------
    DataError
        The tensors are too large together, out of order, or in a group that does not exist.
    """

    name: Name
    rule: Rule
    placement: Placement
    tensors: Annotated[list[TensorSpec], Meta(min_length=1, max_length=TENSORS_MAX)]
    optimizer: OptimizerSpec | None
    wire: Dtype = Dtype.FLOAT32
    consistency: Consistency = SYNC
    guard: Guard = UNGUARDED

    @property
    def is_asynchronous(self) -> bool:
        """Whether contributions are applied one by one."""
        is_alone = self.consistency.kind in (ConsistencyKind.ASYNC, ConsistencyKind.SSP)
        return is_alone and self.rule is Rule.OPTIMIZER

    @property
    def is_by_batch(self) -> bool:
        """Whether contributions to versions are named by round and slot of the plan.

        Otherwise a version has the nodes of one round.
        """
        return self.is_asynchronous or self.is_quorum

    @property
    def is_quorum(self) -> bool:
        """Whether rounds go on without the last slots."""
        is_quorum = self.consistency.kind is ConsistencyKind.QUORUM
        return is_quorum and self.rule is Rule.OPTIMIZER

    @property
    def is_guarded(self) -> bool:
        """Whether the contributions of a round are looked at before they are applied."""
        return self.guard.is_on and self.rule is Rule.OPTIMIZER

    @property
    def is_gathered(self) -> bool:
        """Whether the contributions of a round are kept until it is decided what is in."""
        return self.is_quorum or (self.is_guarded and self.guard.is_deciding)

    @property
    def is_watched(self) -> bool:
        """Whether contributions are looked at, and count as they are."""
        return self.is_guarded and not self.guard.is_deciding

    def __post_init__(self) -> None:
        """Check what concerns several fields at once."""
        if self.is_guarded and self.consistency.kind is not ConsistencyKind.SYNC:
            kind = self.consistency.kind.name.lower()
            msg = f"table {self.name!r} is {kind}: gradient health and robust aggregation need sync"
            raise DataError(msg)
        elements = sum(tensor.elements for tensor in self.tensors)
        if elements > ELEMENTS_MAX:
            msg = f"table {self.name!r} has {elements} elements, at most {ELEMENTS_MAX} are allowed"
            raise DataError(msg)
        order = [GROUPS_MAX if t.group == BUFFER_GROUP else t.group for t in self.tensors]
        if order != sorted(order):
            msg = f"table {self.name!r}: tensors must stand in the order of groups, buffers last"
            raise DataError(msg)
        groups = 0 if self.optimizer is None else len(self.optimizer.groups)
        if self.wire not in (WIRES if self.rule is Rule.OPTIMIZER else WIRES[:1]):
            msg = f"table {self.name!r} cannot travel as {self.wire.name.lower()}"
            raise DataError(msg)
        highest = max(tensor.group for tensor in self.tensors)
        if self.rule is Rule.OPTIMIZER and highest >= groups:
            msg = f"table {self.name!r}: a tensor is in group {highest} of {groups} param groups"
            raise DataError(msg)


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def differences(ours: object, theirs: object, lines_max: int = 8) -> list[str]:
    """Where two specs differ, as lines such as ``optimizer.groups[0].lr: 0.1 here, 0.2 there``.

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
    """Structs as dicts by field name, at every depth (array-like ones would lose the names)."""
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
            _compare(ours.get(key, _ABSENT), theirs.get(key, _ABSENT), inner, found)
    elif isinstance(ours, list) and isinstance(theirs, list):
        if len(ours) != len(theirs):
            found.append(f"{where}: {len(ours)} entries here, {len(theirs)} there")
        for number, (left, right) in enumerate(zip(ours, theirs, strict=False)):
            _compare(left, right, f"{where}[{number}]", found)
    elif repr(ours) != repr(theirs):  # tells 1 from True and 0.0 from -0.0, takes NaN for equal
        found.append(f"{where}: {ours!r} here, {theirs!r} there")
