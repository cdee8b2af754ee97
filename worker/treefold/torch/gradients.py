"""Gradients in flat buffers: every ``.grad`` is a view, so that sending needs no packing.

Where a parameter has no gradient its view is filled with -0.0, the exact additive identity, so that
accumulating into it gives the very bits of a fresh gradient. Knows no rounds, parts or clients.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from treefold.common.errors import DataError, LocalProtocolError, UnsupportedError
from treefold.worker.flats import Flats

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

ABSENT = -0.0


class Gradient:
    """The gradient of one parameter.

    Attributes
    ----------
    number : int
        Position of the parameter in the table.
    flat : Tensor, dtype of the parameter [elements]
        Its place in a flat buffer, in row-major order.
    view : Tensor, dtype and shape of the parameter
        The same memory with a version counter of its own, so that autograd adding to one gradient
        does not look like a change of its neighbours.
    is_present : bool
        Whether there is a gradient since the last ``zero_grad``.
    is_packed : bool
        Whether ``.grad`` is a tensor of its own, copied to ``flat`` when it is sent: a sparse one,
        or one whose parameter is not laid out row by row.
    is_stale : bool
        Whether the gradient, or a part of it, is that of an earlier slot.
    fires : int
        How often backward finished it in this slot.
    sent, checksum :
        What `mark` and `sum` gave when it was sent, or finished, before the step.
    """

    __slots__ = (
        "checksum",
        "clean_version",
        "fires",
        "flat",
        "is_packed",
        "is_present",
        "is_stale",
        "name",
        "number",
        "parameter",
        "sent",
        "view",
    )

    def __init__(self, number: int, name: str, parameter: nn.Parameter, flat: Tensor) -> None:
        self.number = number
        self.name = name
        self.parameter = parameter
        self.flat = flat
        self.view = flat.view(parameter.shape).data
        self.clean_version = self.view._version
        self.is_present = False
        self.is_packed = not parameter.is_contiguous()
        self.is_stale = False
        self.fires = 0
        self.sent: tuple[int, int] | None = None
        self.checksum: Tensor | None = None

    def move(self, flat: Tensor) -> None:
        """Go on at another place with the same values."""
        is_view = self.parameter.grad is self.view
        self.flat = flat
        self.view = flat.view(self.parameter.shape).data
        self.clean_version = self.view._version - self.is_present
        if is_view:
            self.parameter.grad = self.view

    def mark(self) -> tuple[int, int]:
        """What changes when anybody changes ``.grad`` or puts another tensor there."""
        grad = self.parameter.grad
        return (0, 0) if grad is None else (id(grad), grad._version)

    def sum(self) -> Tensor:
        """A number that changes with (nearly) every change of the values; where they are."""
        grad = self.parameter.grad
        if grad is None:
            return torch.zeros((), dtype=torch.float64)
        values = grad.detach().coalesce().values() if grad.is_sparse else grad.detach()
        return values.sum(dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Place:
    """Where gradients lie if they lie as the table's flat space does, so that they can be lent.

    ``flats`` gives float32 buffers that servers may read where they are. When its ``generation``
    grows, what was lent before must not be written to again.
    """

    starts: Sequence[int]
    elements: int
    flats: Flats


class Gradients:
    """The gradients of one table.

    Parameters
    ----------
    parameters : sequence of (str, Parameter)
        By name, in the table's order.
    is_sparse : bool
        Whether the optimizer takes sparse gradients (and no others).
    listener : callable
        Called with the number of a parameter whenever backward has finished its gradient.
    place : Place, optional
        Used if all gradients are dense float32 on the CPU.

    Attributes
    ----------
    flat : Tensor, float32 [elements of the table], or None
        All gradients at their places in the table's flat space; -0.0 in between.
    is_lent : bool
        Whether ``flat`` is being read by others: what was sent of it must not change.
    is_stepped : bool
        Whether this slot has stepped, so that all of it was sent.
    has_moved : bool
        Whether ``flat`` took the place of one that is still being read: there is no third one, so
        that nothing of this one may be lent.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        is_sparse: bool,
        listener: Callable[[int], None],
        place: Place | None = None,
    ) -> None:
        self._is_sparse = is_sparse
        self._listener = listener
        self._is_paused = self._is_detached = False
        self.is_lent = self.is_stepped = self.has_moved = False
        self._hooks: dict[int, list[RemovableHandle]] = {}
        self.flat: Tensor | None = None
        self._place = place
        self._spare: Tensor | None = None
        self._generation = 0 if place is None else place.flats.generation
        only = [parameter for _, parameter in parameters]
        if place is not None and not is_sparse and all(map(_is_plain, only)):
            self.flat = place.flats.make(place.elements).fill_(ABSENT)
            self._whole, views = [self.flat], _views_at(self.flat, place.starts, only)
        else:
            self._whole, views = _views_of_own(only)
        self.items = [
            Gradient(number, name, parameter, view)
            for number, ((name, parameter), view) in enumerate(zip(parameters, views, strict=True))
        ]
        for parameter in only:
            parameter.grad = None

    @property
    def is_on_cpu(self) -> bool:
        """Whether all gradients can be read without waiting for another device."""
        return all(buffer.device.type == "cpu" for buffer in self._whole)

    def close(self) -> None:
        """Leave the parameters as ordinary ones, without gradients."""
        for handles in self._hooks.values():
            for handle in handles:
                handle.remove()
        self._hooks.clear()
        for gradient in self.items:
            gradient.parameter.grad = None

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Within this context the listener is not called."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def begin_slot(self, is_in_use: bool = False) -> None:
        """Take what is there now for an earlier slot's; watch parameters that were unfrozen.

        Parameters
        ----------
        is_in_use : bool
            Whether what was lent is still being read. If not, it is ours again.
        """
        if self._place is not None and self._generation != self._place.flats.generation:
            self._retire(self._place)
        elif self.is_lent and is_in_use:
            self._change_flat()
        self.has_moved = self.has_moved and is_in_use
        self.is_lent = self.is_stepped = False
        if self._is_detached:
            self._attach()
        for gradient in self.items:
            gradient.fires = 0
            gradient.sent = gradient.checksum = None
            gradient.is_stale = gradient.is_present and gradient.parameter.grad is not None
            if gradient.number not in self._hooks and gradient.parameter.requires_grad:
                self._watch(gradient)

    def zero(self, set_to_none: bool) -> None:
        """Do as ``Optimizer.zero_grad``; ``.grad`` stays a view, filled with -0.0 for None.

        While gradients are lent they are left alone, and ``.grad`` is None in the meantime.
        """
        if self.is_lent and set_to_none:
            self._detach()
            return
        if self.is_lent:
            self._change_flat()
        for buffer in self._whole:
            buffer.fill_(ABSENT)
        for gradient in self.items:
            if set_to_none or not gradient.is_present:
                self._clear(gradient)
            elif gradient.parameter.grad is not None:
                gradient.parameter.grad.detach().zero_()
            gradient.is_stale = False

    def settle(self, gradient: Gradient) -> None:
        """Bring ``flat`` and `Gradient.is_present` up to what a step would see in ``.grad``.

        Raises
        ------
        UnsupportedError, DataError
            The gradient is of a kind that the optimizer does not take.
        """
        grad = gradient.parameter.grad
        if grad is None:
            if gradient.is_present:
                gradient.flat.fill_(ABSENT)
            gradient.is_present = False
        elif grad is gradient.view:
            gradient.is_present |= grad._version != gradient.clean_version
        else:
            self._take(gradient, grad.detach())
            gradient.is_present = True

    def _detach(self) -> None:
        for gradient in self.items:
            gradient.parameter.grad = None
            gradient.is_present = gradient.is_stale = False
        self._is_detached = True

    def _attach(self) -> None:
        """Let gradients be views of a clean buffer again."""
        for buffer in self._whole:
            buffer.fill_(ABSENT)
        for gradient in self.items:
            if gradient.parameter.grad is None and not gradient.is_packed:
                gradient.parameter.grad = gradient.view
            gradient.clean_version = gradient.view._version
        self._is_detached = False

    def _change_flat(self) -> None:
        """Go on in another buffer, with the same gradients, while this one is being read."""
        old, place = self.flat, self._place
        if old is None or place is None:
            return
        new = place.flats.make(place.elements) if self._spare is None else self._spare
        if self._is_detached:
            new.fill_(ABSENT)
        else:
            new.copy_(old)
        self.flat, self._spare, self._whole = new, old, [new]
        only = [gradient.parameter for gradient in self.items]
        for gradient, flat in zip(self.items, _views_at(new, place.starts, only), strict=True):
            gradient.move(flat)
        self.is_lent = self._is_detached = False
        self.has_moved = True

    def _retire(self, place: Place) -> None:
        """Leave all memory that was lent to whoever may still read it, and take other."""
        self._generation = place.flats.generation
        old, spare = self.flat, self._spare
        self._spare = None
        self._change_flat()
        self._spare = None
        for flat in (old, spare):
            if flat is not None:
                place.flats.drop(flat)

    def _watch(self, gradient: Gradient) -> None:
        hook = partial(self._on_accumulated, gradient)
        watch = gradient.parameter.register_post_accumulate_grad_hook
        handle = watch(hook)  # type: ignore[no-untyped-call] # torch's own has no types
        self._hooks[gradient.number] = [handle]
        if gradient.is_packed:
            self._watch_packed(gradient)

    def _watch_packed(self, gradient: Gradient) -> None:
        hook = partial(self._before_accumulation, gradient)
        handle = gradient.parameter.register_hook(hook)  # type: ignore[no-untyped-call] # as above
        self._hooks[gradient.number].append(handle)

    def _clear(self, gradient: Gradient) -> None:
        is_view = not gradient.is_packed and gradient.parameter.grad is not None
        if gradient.parameter.grad is not gradient.view:
            gradient.parameter.grad = gradient.view if is_view else None
        gradient.clean_version = gradient.view._version
        gradient.is_present = False

    def _on_accumulated(self, gradient: Gradient, parameter: Tensor) -> None:
        """Autograd has finished this gradient (for this backward)."""
        grad = parameter.grad
        if grad is None:
            return
        if grad is not gradient.view and not gradient.is_packed:
            self._take(gradient, grad.detach())
            gradient.is_stale = False
        gradient.is_present = True
        if not self._is_paused:
            gradient.fires += 1
            self._listener(gradient.number)

    def _before_accumulation(self, gradient: Gradient, _: Tensor) -> None:
        """A packed gradient is no earlier slot's if the script has dropped that one."""
        gradient.is_stale = gradient.is_stale and gradient.parameter.grad is not None

    def _take(self, gradient: Gradient, grad: Tensor) -> None:
        """Copy a gradient that is not the view; then let autograd add to the view itself."""
        self._check_layout(gradient, grad)
        if self.is_lent and self.is_stepped:
            self._change_flat()
        if grad.is_sparse:
            if not gradient.is_packed:
                gradient.is_packed = True
                self._watch_packed(gradient)
            _densify(grad, gradient.flat.view(grad.shape))
            return
        gradient.view.copy_(grad)
        if not gradient.is_packed:
            gradient.parameter.grad = gradient.view

    def _check_layout(self, gradient: Gradient, grad: Tensor) -> None:
        what = f"the gradient of {gradient.name!r}"
        if grad.is_sparse and not self._is_sparse:
            text = (
                f"{what} is sparse, which among the optimizers that servers run only SparseAdam "
                "takes: for others, elements without a gradient are elements with gradient 0; use "
                "sparse=False, or torch.optim.SparseAdam for these parameters"
            )
            raise UnsupportedError(text)
        if not grad.is_sparse and self._is_sparse:
            text = f"{what} is dense; SparseAdam takes sparse gradients only"
            raise DataError(text)


def check_not_stale(gradients: Sequence[Gradient]) -> None:
    """Refuse gradients of an earlier slot: which slot that was depends on the cluster.

    Raises
    ------
    LocalProtocolError
        The script does not clear its gradients in every body.
    """
    for gradient in gradients:
        if gradient.is_stale and gradient.is_present:
            text = (
                f"the gradient of {gradient.name!r} still has that of an earlier slot in it; call "
                "optimizer.zero_grad() in every loop body, and accumulate gradients within a body, "
                "not across bodies (a round already accumulates over all its slots)"
            )
            raise LocalProtocolError(text)


def _is_plain(parameter: nn.Parameter) -> bool:
    return parameter.dtype == torch.float32 and parameter.device.type == "cpu"


def _views_at(flat: Tensor, starts: Sequence[int], of: Sequence[nn.Parameter]) -> list[Tensor]:
    """The place of each parameter's gradient in a buffer of the table's length."""
    return [flat[at : at + one.numel()] for at, one in zip(starts, of, strict=False)]


def _views_of_own(of: Sequence[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
    """A buffer for all gradients of each kind, and the place of each parameter's gradient."""
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    places: list[tuple[tuple[torch.dtype, torch.device], int]] = []
    for parameter in of:
        key = (parameter.dtype, parameter.device)
        places.append((key, sizes.get(key, 0)))
        sizes[key] = sizes.get(key, 0) + parameter.numel()
    buffers = {
        (dtype, device): torch.full((size,), ABSENT, dtype=dtype, device=device)
        for (dtype, device), size in sizes.items()
    }
    views = [buffers[key][at : at + one.numel()] for (key, at), one in zip(places, of, strict=True)]
    return list(buffers.values()), views


def _densify(grad: Tensor, out: Tensor) -> None:
    """Write a sparse gradient; touched elements that are zero become +0.0, all others -0.0."""
    grad = grad.coalesce()
    out.fill_(ABSENT)
    out[tuple(grad.indices())] = grad.values() + 0.0
