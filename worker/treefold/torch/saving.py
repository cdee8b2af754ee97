"""The parameters of one version, for evaluation and for files."""

import os
import secrets
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from treefold.common.errors import ConfigError, LocalProtocolError, UnsupportedError
from treefold.common.plan import PlanKind
from treefold.torch import session
from treefold.torch.table import Table
from treefold.worker.handed import Snapshot


def state_dict(*, consistent: bool = False) -> dict[str, Tensor]:
    """The model at the version that this worker is at; between loops the same on every worker.

    But for asynchronous tables after a loop that others have left before: they may have begun the
    next one, and shards then have different contributions of it in them.

    Parameters
    ----------
    consistent : bool
        Read asynchronous tables anew, so that all of their shards have the same contributions in
        them. Servers apply nothing for up to a quarter of a second meanwhile. Between loops only;
        the model stays as it is.

    Returns
    -------
    dict of str to Tensor
        Copies, in the dtypes and on the devices of the model, under the names of
        ``model.state_dict()``, so that ``load_state_dict`` takes it; tied weights stand under each
        of their names. With several models the names begin with the table's: ``model.``,
        ``model-1.`` and so on. In a loop body buffers are those that the round began with.

    Raises
    ------
    LocalProtocolError
        There is no `DistributedOptimizer` yet; or ``consistent`` in a loop body.
    UnavailableError
        Shards had different contributions in them whenever they were read, or do not answer.
    UnsupportedError
        ``consistent`` with an own loader beside a synchronous table: its next round has begun.
    """
    models = _models()
    read = _read_alike() if consistent else {}
    if len(models) == 1:
        ((_, tables),) = models
        return _values(tables, read)
    return {
        f"{tables[0].options.name}.{name}": value
        for _, tables in models
        for name, value in _values(tables, read).items()
    }


def save(path: str | os.PathLike[str]) -> None:
    """Write `state_dict` to a safetensors file, which appears whole or not at all.

    Not at all in a loop body that turns out not to count, as its version was given up.

    Parameters
    ----------
    path : str or path
        The file; its folder must exist. The round is in the file's metadata.

    Raises
    ------
    ConfigError
        There is no such folder.
    LocalProtocolError
        There is no `DistributedOptimizer` yet.
    """
    target = Path(path)
    if not target.parent.is_dir():
        msg = f"cannot save to {target}: there is no folder {target.parent}"
        raise ConfigError(msg)
    tensors = {name: value.contiguous() for name, value in state_dict().items()}
    if session.current().client.is_void:
        return
    metadata = {"format": "pt", "round": str(session.current().round)}
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        save_file(tensors, unfinished, metadata)
        unfinished.chmod(mode)  # what the user's umask gives; safetensors writes for the owner only
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def _models() -> list[tuple[nn.Module, list[Table]]]:
    """Each model once, with its tables."""
    found: list[tuple[nn.Module, list[Table]]] = []
    for table in session.current().tables:
        model = table.owned.model
        known = next((tables for other, tables in found if other is model), None)
        if known is None:
            found.append((model, [table]))
        else:
            known.append(table)
    if not found:
        raise LocalProtocolError(
            "there are no parameters yet; make a ps.DistributedOptimizer first"
        )
    return found


def _read_alike() -> dict[int, Snapshot]:
    """Versions of asynchronous tables, by number, with the same in all shards."""
    job = session.current()
    if job.task is not None and job.plan is not None and job.plan.kind is PlanKind.SLOTS:
        text = "ps.state_dict(consistent=True) belongs between two loops, not into a loop body"
        raise LocalProtocolError(text)
    if job.task is not None and len({table.is_asynchronous for table in job.tables}) > 1:
        text = (
            "ps.state_dict(consistent=True) needs ps.batches() beside a synchronous table: with an "
            "own loader the next round begins where one ends, and there is nothing between two "
            "loops; without consistent=True it is the version that the round begins with"
        )
        raise UnsupportedError(text)
    return {snapshot.table: snapshot for snapshot in job.client.read_alike()}


def _values(tables: list[Table], read: dict[int, Snapshot]) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for name, value in tables[0].owned.model.state_dict().items():
        if isinstance(value, Tensor):
            values[name] = value.detach().clone()
    for table in tables:
        for name, value in table.buffers.round_values().items():
            if name in values:
                values[name] = value.clone()
    for table in tables:
        if table.number in read:
            found = _named(table, table.copies_of(read[table.number]))
            values |= {name: value for name, value in found.items() if name in values}
    return values


def _named(table: Table, copies: dict[int, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors, given by the identity of each, under all names that the model has."""
    model = table.owned.model
    known = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: copies[id(tensor)] for name, tensor in known if id(tensor) in copies}
