"""What checkpoints consist of, as a person reads it."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from treefold.checkpoint.manifest import Manifest, TableEntry
from treefold.common.errors import CheckpointError
from treefold.common.layout import Layout
from treefold.common.plan import LoopPlan, PlanKind
from treefold.common.spec import BUFFER_GROUP, Hyper, Rule

KIB = 1024
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size_of(nbytes: int) -> str:
    """A number of bytes in words: ``1.5 MiB``."""
    value, unit = float(nbytes), 0
    while value >= KIB and unit < len(UNITS) - 1:
        value, unit = value / KIB, unit + 1
    return f"{value:.1f} {UNITS[unit]}" if unit else f"{nbytes} B"


def print_list(found: Sequence[tuple[int, Manifest | CheckpointError]], console: Console) -> None:
    """Print one line per checkpoint.

    Parameters
    ----------
    found : sequence of (version, manifest or error)
        Newest first; the error says why there is no manifest to be shown.
    console : Console
        Where to.
    """
    grid = _grid("round", "written", "size", "tables", "files", "")
    for version, one in found:
        if isinstance(one, CheckpointError):
            grid.add_row(str(version), "", "", "", "", escape(f"damaged: {one}"))
            continue
        files = sum(len(table.files) for table in one.tables)
        names = escape(" ".join(table.spec.name for table in one.tables))
        grid.add_row(str(version), escape(one.created), size_of(one.nbytes), names, str(files))
    console.print(grid)


def print_inspection(manifest: Manifest, console: Console) -> None:
    """Print what is in a checkpoint.

    Parameters
    ----------
    manifest : Manifest
        Its manifest.
    console : Console
        Where to.
    """
    written = f"written {manifest.created or 'at an unknown time'} by treefold {manifest.package}"
    settings = f"{manifest.slots} slots, seed {manifest.seed}, view {manifest.view}"
    lines = [
        f"round {manifest.version} of job {manifest.job}, {written}",
        f"{settings}, {size_of(manifest.nbytes)}",
        *map(_plan, manifest.plans),
    ]
    for line in lines:
        console.print(escape(line), soft_wrap=True)
    for table in manifest.tables:
        console.print()
        console.print(escape(_table(table)), soft_wrap=True)
        console.print(_tensors(table))
        console.print(_files(table))


def _grid(*columns: str) -> Table:
    grid = Table(box=None, pad_edge=False, show_edge=False)
    for column in columns:
        grid.add_column(column, no_wrap=True, overflow="fold")
    return grid


def _plan(plan: LoopPlan) -> str:
    words = f"pass {plan.index}: epoch {plan.epoch}, from round {plan.first_round}"
    if plan.kind is PlanKind.LOADER:
        return f"{words}, the script's own loader, {plan.slots} slots"
    samples = f"{plan.samples} samples in batches of {plan.batch_size}"
    return f"{words} to {plan.end_round}, {samples}{', shuffled' if plan.shuffle else ''}"


def _table(table: TableEntry) -> str:
    spec = table.spec
    elements = sum(tensor.elements for tensor in spec.tensors)
    words = [_count(len(spec.tensors), "tensor"), _count(elements, "element")]
    if spec.rule is Rule.CONSTANT:
        words.insert(0, "constant")
    elif spec.optimizer is not None:
        words.insert(0, spec.optimizer.name)
        words += [f"group {n}: {_hyper(g)}" for n, g in enumerate(spec.optimizer.groups)]
    words.append(f"travels as {spec.wire.name.lower()}, {_count(Layout(spec).blocks, 'block')}")
    return f"table {spec.name}: {'; '.join(words)}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _hyper(group: Hyper) -> str:
    return " ".join(f"{key}={value}" for key, value in group.items())


def _tensors(table: TableEntry) -> Table:
    grid = _grid("tensor", "shape", "dtype", "group")
    for tensor in table.spec.tensors:
        group = "buffer" if tensor.group == BUFFER_GROUP else str(tensor.group)
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        grid.add_row(escape(tensor.name), shape, tensor.dtype.name.lower(), group)
    return grid


def _files(table: TableEntry) -> Table:
    grid = _grid("file", "blocks", "size", "sha256")
    for file in table.files:
        blocks = f"{file.first_block}-{file.first_block + file.blocks - 1}"
        grid.add_row(escape(file.path), blocks, size_of(file.nbytes), file.sha256[:16])
    return grid
