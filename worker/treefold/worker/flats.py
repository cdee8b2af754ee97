"""Buffers of a table's length for contributions, in shared memory where there is a lane.

The training thread takes them, the I/O thread gives them back: when nothing refers to any part of
one any more, which for a part that was pushed is when the version that it fed is there.
"""

from collections import deque

import torch

from treefold.transport.lanes import Lanes


class Flats:
    """Flat buffers by length.

    Parameters
    ----------
    lanes : Lanes
        Makes them.

    Attributes
    ----------
    made : int
        How many there ever were.
    generation : int
        How often `retire` was called.
    """

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._free: dict[int, list[torch.Tensor]] = {}
        self._uses: dict[int, int] = {}
        self._retired: dict[int, None] = {}
        self._dropped: deque[torch.Tensor] = deque()
        self.made = self.generation = 0

    def make(self, elements: int) -> torch.Tensor:
        """A buffer that its owner keeps, float32 [elements], uninitialised.

        With the first of a length comes one to be taken: a job's first contributions are copied,
        and travel as bytes from memory that was not offered to servers before.
        """
        if elements not in self._free:
            self._free[elements] = [self._new(elements)]
            return self._new(elements)
        return self._found(elements)

    def take(self, elements: int) -> torch.Tensor:
        """A buffer to be given back by `done`, float32 [elements], uninitialised."""
        flat = self._found(elements)
        self._uses[flat.data_ptr()] = 1
        return flat

    def _found(self, elements: int) -> torch.Tensor:
        try:
            return self._free[elements].pop()
        except (KeyError, IndexError):
            return self._new(elements)

    def _new(self, elements: int) -> torch.Tensor:
        flat = self._lanes.allocate(elements)
        self.made += 1  # last: whoever sees this offers what is there, once
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
            if key in self._retired:
                del self._retired[key]
                self.drop(flat)
            else:
                self._free.setdefault(flat.numel(), []).append(flat)

    def retire(self) -> None:
        """Never write again to what is in use now; owners of `make` look at ``generation``."""
        self.generation += 1
        self._retired |= dict.fromkeys(self._uses)

    def drop(self, flat: torch.Tensor) -> None:
        """Let go of a buffer for good: its memory is freed when nobody reads it any more."""
        self._dropped.append(flat)

    def sweep(self) -> None:
        """Free what was dropped. For the thread that owns the lanes."""
        while self._dropped:
            self._lanes.abandon(self._dropped.popleft())
