"""Model buffers: every slot starts from those of the round, and contributes what it made of them.

Float buffers are tensors of the table and fold to their mean (``mean``) or to slot 0's value
(``slot0``). Buffers of other kinds, and there is no mean of a counter, are slot 0's; they travel as
bytes beside the round. With ``local`` nothing travels and nothing is restored.
"""

from collections.abc import Mapping, Sequence
from enum import Enum

import torch
from torch import Tensor, nn

from treefold.common.errors import ConfigError
from treefold.torch.binding import BoundTensor

NO_SLOT = -1  # there is none whose values would count as they are


class BufferMode(Enum):
    """What becomes of a model's buffers."""

    MEAN = "mean"
    SLOT0 = "slot0"
    LOCAL = "local"

    @classmethod
    def of(cls, text: str) -> "BufferMode":
        """The mode of this name.

        Raises
        ------
        ConfigError
            There is none.
        """
        for mode in cls:
            if mode.value == text:
                return mode
        names = ", ".join(repr(mode.value) for mode in cls)
        msg = f"buffers={text!r}; it is one of {names}"
        raise ConfigError(msg)


class Buffers:
    """The buffers of one table.

    Parameters
    ----------
    floats : sequence of BoundTensor
        Float buffers, in the table's order.
    opaque : sequence of BoundTensor
        Buffers of other kinds.
    mode : BufferMode
        What becomes of them.

    Attributes
    ----------
    moving : list of int
        Numbers of the float buffers that fold to the mean in this round: those that slot 0 changed
        in the round before. The others, such as tables of constants, would only pick up rounding
        errors; if one of them changes after all, it takes slot 0's value in that round.
    """

    def __init__(
        self, floats: Sequence[BoundTensor], opaque: Sequence[BoundTensor], mode: BufferMode
    ) -> None:
        self.mode = mode
        self._floats = list(floats)
        self._opaque = [] if mode is BufferMode.LOCAL else list(opaque)
        self._round = [bound.current.detach().clone() for bound in self._floats]
        self._first_opaque = [bound.current.detach().clone() for bound in self._opaque]
        self._round_opaque = [tensor.clone() for tensor in self._first_opaque]
        self.moving = [n for n, bound in enumerate(self._floats) if _is_statistic(bound)]

    def load_float(self, number: int, offset: int, values: Tensor) -> None:
        """Take in a stretch of a float buffer of the round.

        Parameters
        ----------
        number : int
            Which buffer.
        offset : int
            Position of the first element in it.
        values : Tensor, float32 [n]
            The new elements.
        """
        flat = self._round[number].view(-1)
        flat[offset : offset + values.numel()].copy_(values)

    def load_opaque(self, changed: Mapping[int, bytes]) -> None:
        """Take in the other buffers of the round; those not in ``changed`` are as at the start."""
        for number, first in enumerate(self._first_opaque):
            raw = changed.get(number)
            if raw is None:
                self._round_opaque[number].copy_(first)
            else:
                values = torch.frombuffer(bytearray(raw), dtype=first.dtype)
                self._round_opaque[number].copy_(values.view(first.shape))

    def reset(self) -> None:
        """Give the model the buffers of the round."""
        with torch.no_grad():
            for bound, value in zip(self._floats, self._round, strict=True):
                bound.current.copy_(value)
            for bound, value in zip(self._opaque, self._round_opaque, strict=True):
                bound.current.copy_(value)

    def shares(self, slot: int, scale: float) -> list[Tensor | None]:
        """What a slot contributes to each float buffer.

        Parameters
        ----------
        slot : int
            The slot whose loop body is over; `NO_SLOT` where no slot's values may travel whole.
        scale : float
            Its share of the round's samples.

        Returns
        -------
        list of (Tensor, float32 [elements of the buffer], or None)
            On the CPU; None where it contributes nothing.
        """
        return [self._share(number, slot, scale) for number in range(len(self._floats))]

    def moved(self) -> list[int]:
        """The float buffers that the slot's loop body has changed."""
        return [number for number in range(len(self._floats)) if self._has_moved(number)]

    def changed_opaque(self) -> dict[int, bytes]:
        """The other buffers that differ from what they were at the start, as raw bytes."""
        changed: dict[int, bytes] = {}
        for number, (bound, first) in enumerate(zip(self._opaque, self._first_opaque, strict=True)):
            current = bound.current.detach()
            if not torch.equal(current, first):
                raw = current.cpu().contiguous().reshape(-1).view(torch.uint8)
                changed[number] = raw.numpy().tobytes()
        return changed

    def round_values(self) -> dict[str, Tensor]:
        """The buffers of the round, by name; none with ``local``."""
        bounds = [*self._floats, *self._opaque]
        values = [*self._round, *self._round_opaque]
        return {bound.name: value for bound, value in zip(bounds, values, strict=True)}

    def _share(self, number: int, slot: int, scale: float) -> Tensor | None:
        if self.mode is BufferMode.MEAN and number in self.moving:
            value = self._floats[number].current.detach().reshape(-1).to("cpu", torch.float32)
            return value if scale == 1.0 else value * scale
        if slot == 0 and self._has_moved(number):
            return self._floats[number].current.detach().reshape(-1).to("cpu", torch.float32)
        return None

    def _has_moved(self, number: int) -> bool:
        return not torch.equal(self._floats[number].current, self._round[number])


def _is_statistic(bound: BoundTensor) -> bool:
    """Whether this is a running statistic that training will move from the first round on."""
    norm = bound.owner
    return isinstance(norm, nn.modules.batchnorm._NormBase) and norm.training
