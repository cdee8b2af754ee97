"""What a worker shows of its progress: samples and the last loss. Changes nothing."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

LOSS_INTERVAL_NS = 250_000_000
"""Reading a loss may wait for a GPU, and no display needs it more often."""

_Backward = Callable[..., None]


class LossWatch:
    """Remembers the last scalar that ``backward`` was called on."""

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._read: float | None = None
        self._read_ns = 0
        self._original: _Backward | None = None

    def install(self) -> None:
        """Look on at every ``Tensor.backward`` from now on."""
        original: _Backward = torch.Tensor.backward
        watch = self

        def backward(tensor: Tensor, *args: object, **kwargs: object) -> None:
            watch.see(tensor)
            original(tensor, *args, **kwargs)

        backward.__doc__ = original.__doc__
        self._original = original
        watching: _Backward = backward
        torch.Tensor.backward = watching  # type: ignore[method-assign] # calls torch's own

    def remove(self) -> None:
        """Stop looking on."""
        if self._original is not None:
            torch.Tensor.backward = self._original  # type: ignore[method-assign] # as it was
        self._original = self._last = None

    def see(self, tensor: Tensor) -> None:
        """Keep a scalar, without its graph."""
        if tensor.numel() == 1:
            self._last = tensor.detach()

    def read(self) -> float | None:
        """The last loss, looked up at most every `LOSS_INTERVAL_NS`; None if there is none yet."""
        now_ns = time.monotonic_ns()
        is_due = self._read is None or now_ns - self._read_ns >= LOSS_INTERVAL_NS
        if self._last is not None and is_due:
            self._read = float(self._last.item())
            self._read_ns = now_ns
        return self._read
