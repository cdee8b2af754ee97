"""Buffers of a table's length for contributions, in shared memory where there is a lane.

The training thread takes them, the I/O thread gives them back: when nothing refers to any part of
one any more, which for a part that was pushed is when the version that it fed is there.
"""

import torch

from treefold.transport.lanes import Lanes


class Flats:
    """Flat buffers by length.

    Parameters
    ----------
    lanes : Lanes
        Makes them.
    """

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._free: dict[int, list[torch.Tensor]] = {}
        self._uses: dict[int, int] = {}
        self.made = 0

    def make(self, elements: int) -> torch.Tensor:
        """A buffer that its owner keeps, float32 [elements], uninitialised."""
        made = self._lanes.allocate(elements)
        self.made += 1
        return made

    def take(self, elements: int) -> torch.Tensor:
        """A buffer to be given back by `done`, float32 [elements], uninitialised."""
        try:
            flat = self._free[elements].pop()
        except (KeyError, IndexError):
            flat = self.make(elements)
        self._uses[flat.data_ptr()] = 1
        return flat

    def use(self, flat: torch.Tensor, count: int) -> None:
        """``count`` payloads lie in this buffer, beside those that do already."""
        self._uses[flat.data_ptr()] += count

    def done(self, flat: torch.Tensor) -> None:
        """One payload in this buffer is not needed any more, or its taker is done with it."""
        key = flat.data_ptr()
        self._uses[key] -= 1
        if not self._uses[key]:
            del self._uses[key]
            self._free.setdefault(flat.numel(), []).append(flat)
