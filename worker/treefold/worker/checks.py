"""What a script hands over is what its table takes, or it is refused before anything is sent."""

from collections.abc import Mapping, Sequence

import torch

from treefold.common.errors import DataError
from treefold.common.fold import TORCH_DTYPES
from treefold.common.spec import Hyper, TableSpec
from treefold.worker.handed import PartRun
from treefold.worker.pulls import PartRange, Table


def check(
    what: str, values: torch.Tensor, elements: int, dtype: torch.dtype = torch.float32
) -> None:
    """Refuse a tensor of another dtype or shape than is expected."""
    if values.dtype != dtype or list(values.shape) != [elements]:
        kind = f"{values.dtype} {list(values.shape)}"
        msg = f"{what}: expected {dtype} [{elements}], got {kind}"
        raise DataError(msg)


def table_of(tables: Mapping[int, Table], number: int) -> Table:
    """A declared table by its number."""
    if number not in tables:
        known = ", ".join(f"{n} ({t.spec.name!r})" for n, t in list(tables.items())) or "none"
        msg = f"there is no table {number}; declared are {known}"
        raise DataError(msg)
    return tables[number]


def check_run(where: PartRun, known: Sequence[PartRange], values: torch.Tensor | None) -> None:
    """Refuse parts that a table does not have, or values that are not what they hold."""
    last = where.part + where.count - 1
    if not 0 <= where.part <= last < len(known):
        msg = f"table {where.table} has parts 0 to {len(known) - 1}, not {where.part} to {last}"
        raise DataError(msg)
    if values is not None:
        what = f"parts {where.part} to {last} of table {where.table}"
        elements = known[last].stop - known[where.part].start
        check(what, values, elements, TORCH_DTYPES[known[where.part].wire])


def check_groups(spec: TableSpec, groups: Sequence[Hyper]) -> None:
    """Refuse hyper-parameters of another number of param groups."""
    wanted = len(spec.optimizer.groups) if spec.optimizer else 0
    if len(groups) != wanted:
        msg = f"table {spec.name!r} has {wanted} param groups, not {len(groups)}"
        raise DataError(msg)
