"""The optimizer that a training script holds: torch's interface, with the step on the servers."""

import math
import types
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TypedDict, Unpack

from torch import Tensor, nn
from torch.optim import Optimizer

from treefold.common.errors import ConfigError, LocalProtocolError, UnsupportedError
from treefold.torch import session
from treefold.torch.binding import bind, wire_of
from treefold.torch.buffers import BufferMode
from treefold.torch.health import AggregationChoice, Health, check_guard, guard_of
from treefold.torch.options import (
    DCASGD,
    SSP,
    Async,
    OverlapMode,
    Quorum,
    check_buffers,
    check_compensation,
    consistency_of,
)
from treefold.torch.table import Owned, Table, TableOptions, load_frozen


class OptimizerOptions(TypedDict, total=False):
    """Keywords of `DistributedOptimizer`; its docstring says what they mean."""

    buffers: str
    lend: bool
    wire: str
    consistency: str | Async | SSP | Quorum | None
    compensation: str | DCASGD | None
    health: str | Health | None
    aggregation: AggregationChoice | None
    in_place: bool


class DistributedOptimizer(Optimizer):
    """Wraps a ``torch.optim`` optimizer; its step is taken by the servers, once per round.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Says class, param groups and hyper-parameters. It keeps no state and must not step itself.
        Learning-rate schedulers may be attached to it or to this object.
    model : nn.Module
        The model whose parameters it optimizes, on the device and in the dtype in which it will
        train. After the call it holds the job's newest version.
    overlap : bool or str
        True: gradients are sent while backward is still running, and parameters may come while
        forward runs already; ``"backward"``: the first alone; False: neither. The first takes one
        backward per loop body, and gradients that nobody changes before the step; the first loop
        body is watched for both, and a later one that breaks the rule raises. With the second, a
        loop over `batches` begins a round when its buffers and the state beside the tensors are
        known; every module waits for its own parameters, and any other use of a parameter for that
        parameter. It takes parameters that are alike, on the CPU, and no compiled modules.
        ``"auto"``, the default, is True, but for a model on the CPU of a machine that all servers
        share and that has fewer processors than members: there it would only take time from the
        computation.
    buffers : str
        What becomes of buffers that a loop body changes (BatchNorm statistics): ``"mean"`` of the
        slots, weighted like gradients; ``"slot0"``, those of slot 0; ``"local"``, left alone.
        Integer, boolean and float64 buffers are slot 0's with ``"mean"`` too.
    lend : bool
        Whether servers on this host may read gradients where they lie, which spares a copy. They
        must not be written to then between the step and the end of the loop body, but by
        `zero_grad`; the first loop body is watched, and a later one that breaks the rule raises.
    wire : str
        What gradients and parameters travel as: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        With a narrow one every gradient, every sum of gradients and the parameters that workers
        compute with are rounded to it, the same on any cluster; servers keep float32. Buffers are
        never rounded.
    consistency : str, Async, SSP or Quorum
        When servers apply contributions. ``"sync"``: those of all slots of a round together, once
        they are all there, with the same bits on any cluster. ``"async"``: each by itself, as it
        comes; slots are at rounds of their own, and each begins with the newest version;
        ``Async(staleness_max)``: what is too stale is computed again. ``"ssp"``
        or ``SSP(staleness)``: the same, but no slot gets further ahead of the slowest than a bound.
        ``"quorum"`` or ``Quorum(slots)``: rounds as with ``"sync"``, which go on without the last
        slots after a while. The job's setting by default. Optimizers of a job may differ, but
        if one has a quorum all have the same.
    compensation : str or DCASGD
        What servers do about contributions that were computed with an older version than they are
        applied to: ``"none"``; ``"lr-staleness"``, which divides the learning rate by the number of
        versions in between; ``"dc-asgd"``, ``"dc-asgd-adaptive"`` or ``DCASGD(...)``, which correct
        gradients; ``"momentum"``, which takes off the momentum what being asynchronous adds to it.
        The job's setting by default.
    health : str or Health
        What servers do about gradients that are not finite, or much larger or smaller than usual:
        ``"off"``, ``"warn"``, ``"reject"``, ``"skip-round"``, ``"clip"``, or more exactly. The
        job's setting by default. It needs ``"sync"``.
    aggregation : str, TrimmedMean, Krum or CenteredClipping
        What the gradients of a round are made into: their ``"mean"``, the default; the ``"median"``
        of each coordinate; or another rule that stands some bad ones. All but the mean leave out
        gradients that are not finite, count slots alike however many samples they have, and need
        ``"sync"``.
    in_place : bool
        Whether a loop body may use float32 parameters on the CPU where a server of this host keeps
        them, in memory that can only be read, which spares a copy of the model and the time for it.
        Each round they lie elsewhere: whatever else was made to share a parameter's memory shares
        it no more, and whoever writes to a parameter or its ``.data`` in a loop body, or with a
        loader of its own before `shutdown`, ends the process (SIGSEGV). After an error in a body
        call `shutdown` before reading the model. Parameters are waited for as a whole then.

    Raises
    ------
    LocalProtocolError
        ``ps.init()`` was not called, or training has begun.
    ConfigError
        A parameter is not in the model or has an optimizer already, or an argument is unknown.
    UnsupportedError
        Servers do not run this optimizer, or cannot hold a tensor of this kind.
    SpecMismatchError
        Another worker declared another model or optimizer.
    FormationError
        The cluster did not form in time.

    Notes
    -----
    Where a parameter has no gradient after `zero_grad`, ``.grad`` may be a tensor of -0.0 instead
    of None: gradients are views of one flat buffer and stay it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        overlap: bool | str = "auto",
        **options: Unpack[OptimizerOptions],
    ) -> None:
        self._table: Table | None = None
        job = session.current()
        job.check_can_declare()
        known = OptimizerOptions.__annotations__
        unknown = [name for name in options if name not in known]
        if unknown:
            msg = f"DistributedOptimizer has no argument {unknown[0]!r}; it has {', '.join(known)}"
            raise ConfigError(msg)
        mode = BufferMode.of(options.get("buffers", "mean"))
        wire = wire_of(options.get("wire", "float32"))
        consistency = consistency_of(
            options.get("consistency"), job.settings, options.get("compensation")
        )
        check_compensation(consistency, optimizer.param_groups)
        check_buffers(consistency, mode)
        guard = guard_of(options.get("health"), options.get("aggregation"), job.settings)
        check_guard(guard, consistency, mode)
        job.check_can_mix(consistency)
        super().__init__([{"params": []}], {})
        self.param_groups = optimizer.param_groups
        self.defaults = optimizer.defaults
        self.state = optimizer.state
        self.inner = optimizer
        bound = bind(optimizer, model, job.is_taken)
        name = "model" if not job.tables else f"model-{len(job.tables)}"
        known_as = next((t.options.name for t in job.tables if t.owned.model is model), name)
        chosen = TableOptions(
            name,
            known_as,
            OverlapMode.of(overlap),
            mode,
            options.get("lend", True),
            wire,
            consistency,
            guard,
            options.get("in_place", False),
        )
        owned = Owned(optimizer, self, model)
        table = Table(job.client, owned, bound, chosen)
        load_frozen(job.client, chosen, owned, bound.frozen)
        self._table = table
        self._job = job
        job.add(table)
        _guard_step(optimizer)

    @property
    def table(self) -> Table:
        """The table behind this optimizer."""
        if self._table is None:
            raise LocalProtocolError("this optimizer has no table")
        return self._table

    @property
    def grad_norm(self) -> float | None:
        """Global gradient norm of the last completed round, before clipping.

        None if `clip_grad_norm` was not called in it.
        """
        return self.table.norm

    def step(  # type: ignore[override] # torch's overloads for closures, which are refused here
        self, closure: Callable[[], float] | None = None
    ) -> None:
        """Take part in the round's step with the gradients of this loop body.

        The parameters change when the next round begins, not before.

        Parameters
        ----------
        closure : None
            Refused: servers cannot evaluate the loss again.

        Raises
        ------
        UnsupportedError
            A closure was given.
        LocalProtocolError
            It was called twice in one loop body, outside of one, or the script did something that
            servers cannot follow; the text says what.
        """
        if closure is not None:
            text = (
                "optimizer.step(closure) evaluates the loss inside of the step, which the servers "
                "take without the model; compute the loss and call backward() before step()"
            )
            raise UnsupportedError(text)
        self._job.step(self.table)
        # A scheduler that is attached to the user's own optimizer looks for this mark of torch's.
        self.inner._opt_called = True  # type: ignore[attr-defined] # set so by LRScheduler itself

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients.

        Parameters
        ----------
        set_to_none : bool
            Whether parameters count as having no gradient afterwards, which the step leaves alone,
            or as having a gradient of zeros.

        Raises
        ------
        LocalProtocolError
            Gradients of this loop body are on their way to the servers and there was no step.
        """
        self.table.pushing.check_can_zero()
        self.table.pushing.gradients.zero(set_to_none)

    def no_sync(self) -> AbstractContextManager[None]:
        """A context in which backward only accumulates.

        For loop bodies with several backwards: all but the last one belong into it. It is needed
        only where some bodies have several and the first one had not; otherwise that was noticed.
        """
        return self.table.pushing.pause()

    def add_param_group(self, param_group: dict[str, object]) -> None:
        """Refused once the table is declared.

        Raises
        ------
        UnsupportedError
            Always.
        """
        if self.__dict__.get("_table") is None:
            super().add_param_group(param_group)
            return
        text = (
            "a table's tensors are fixed; give every parameter to the optimizer before making "
            "ps.DistributedOptimizer (with requires_grad=False until it is to train)"
        )
        raise UnsupportedError(text)

    def state_dict(self) -> dict[str, object]:
        """Refused: the optimizer's state is on the servers.

        Raises
        ------
        UnsupportedError
            Always.
        """
        text = (
            "the optimizer's state is on the servers and not in this process; ps.state_dict() and "
            "ps.save(path) give the model's"
        )
        raise UnsupportedError(text)

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Refused: the optimizer's state is on the servers.

        Raises
        ------
        UnsupportedError
            Always.
        """
        del state_dict
        raise UnsupportedError(
            "the optimizer's state is on the servers; it cannot be set from here"
        )


def clip_grad_norm(parameters: Tensor | Iterable[Tensor], max_norm: float) -> None:
    """Limit the global L2 norm of this round's gradient, of all slots together.

    Called between backward and ``optimizer.step()``, as ``torch.nn.utils.clip_grad_norm_`` is. The
    norm is that of the whole round, so it is not known yet; ``optimizer.grad_norm`` tells it later.

    Parameters
    ----------
    parameters : Tensor or iterable of Tensor
        All parameters of one `DistributedOptimizer`.
    max_norm : float
        The limit, above 0.

    Raises
    ------
    ConfigError
        ``max_norm`` is not a positive number, or the parameters are not those of one optimizer.
    LocalProtocolError
        The step of this loop body was taken already.
    UnsupportedError
        The table is asynchronous.
    """
    if not (math.isfinite(max_norm) and max_norm > 0):
        msg = f"max_norm is {max_norm!r}; it must be a positive, finite number"
        raise ConfigError(msg)
    job = session.current()
    table = _table_of([parameters] if isinstance(parameters, Tensor) else list(parameters))
    if table.is_asynchronous:
        text = (
            "a contribution to an asynchronous table is applied by itself, so there is no round "
            "with a norm; limit this slot's own gradient with torch.nn.utils.clip_grad_norm_, and "
            "pass overlap=False to ps.DistributedOptimizer"
        )
        raise UnsupportedError(text)
    job.check_can_clip(table)
    table.norm_max = float(max_norm)


def _table_of(parameters: list[Tensor]) -> Table:
    """The table whose trained parameters are exactly these; frozen ones do not matter."""
    wanted = {id(parameter) for parameter in parameters if parameter.requires_grad}
    tables = session.current().tables
    for table in tables:
        if wanted == {id(own) for own in table.parameters if own.requires_grad}:
            return table
    sizes = ", ".join(str(sum(own.requires_grad for own in table.parameters)) for table in tables)
    text = (
        f"the {len(wanted)} parameters given are not those of one ps.DistributedOptimizer (which "
        f"have {sizes or 'none'}); the norm is taken over a whole optimizer, on the servers. To "
        "clip something else, use torch.nn.utils.clip_grad_norm_ on this slot's gradients"
    )
    raise ConfigError(text)


def _guard_step(optimizer: Optimizer) -> None:
    """Make the user's own optimizer refuse to step, which would change this worker's model only."""

    def step(self: Optimizer, *args: object, **kwargs: object) -> None:
        del self, args, kwargs
        text = (
            "this optimizer describes the step that the servers take; call step() of the "
            "ps.DistributedOptimizer that was made from it"
        )
        raise LocalProtocolError(text)

    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined] # torch's mark stays
    optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign] # the guard
