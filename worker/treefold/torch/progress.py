"""What a worker shows: samples, the last loss, what the script has said. Changes nothing."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import SupportsFloat

import torch
from torch import Tensor

from treefold.common.errors import CapacityError, DataError
from treefold.wire.words import LOGGED_MAX, LOGGED_NAME_MAX

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


@dataclass(slots=True)
class Progress:
    """What is shown of this worker.

    Attributes
    ----------
    watch : LossWatch
        Knows the last loss.
    samples : int
        That were used so far.
    """

    watch: LossWatch = field(default_factory=LossWatch)
    samples: int = 0
    _names: dict[str, None] = field(default_factory=dict)
    _new: dict[str, tuple[int, float]] = field(default_factory=dict)

    def log(self, name: str, round_: int, value: float) -> None:
        """Keep what the script says, until it is taken.

        Raises
        ------
        CapacityError
            There are too many names, or this one is too long or empty.
        DataError
            It has characters that cannot be sent.
        """
        if not name.isprintable():
            raise DataError(
                f"{name!r} is no name for ps.log: it has characters that are not printed"
            )
        if not 0 < len(name) <= LOGGED_NAME_MAX:
            text = f"{name!r} has {len(name)} characters; a name of ps.log has 1 to"
            raise CapacityError(f"{text} {LOGGED_NAME_MAX}")
        if name not in self._names and len(self._names) >= LOGGED_MAX:
            text = f"ps.log({name!r}, ...) would be one name more than the {LOGGED_MAX} that can be"
            raise CapacityError(f"{text} shown; there are {', '.join(self._names)}")
        self._names[name] = None
        if math.isfinite(value):
            self._new[name] = round_, value

    def take_logged(self) -> list[tuple[str, int, float]]:
        """What the script has said since the last time, of each name the newest."""
        found, self._new = self._new, {}
        return [(name, *point) for name, point in found.items()]


def as_number(name: str, value: object) -> float:
    """What was given to `ps.log` as a float.

    Raises
    ------
    DataError
        It is none.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value.detach().item())
    if isinstance(value, SupportsFloat) and not isinstance(value, Tensor):
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # an array, a huge int
            return float(value)  # numpy has numbers of its own
    text = f"ps.log({name!r}, ...) was given {type(value).__name__}, which is not one number"
    raise DataError(text)
