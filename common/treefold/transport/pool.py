"""Buffers that are used again instead of being allocated in every round."""

import torch

FREE_BYTES_MAX = 1 << 28  # beyond that, buffers go back to the allocator instead of being kept


class BufferPool:
    """Buffers by length and type; the last one given back is the first handed out. One thread."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}
        self._free_bytes = 0

    def take(self, elements: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """An uninitialised buffer.

        Returns
        -------
        Tensor [elements]
        """
        kept = self._free.get((elements, dtype))
        if kept:
            self._free_bytes -= elements * dtype.itemsize
            return kept.pop()
        return torch.empty(elements, dtype=dtype)

    def give(self, tensor: torch.Tensor) -> None:
        """Take a buffer back."""
        if self._free_bytes + tensor.nbytes <= FREE_BYTES_MAX:
            self._free.setdefault((tensor.numel(), tensor.dtype), []).append(tensor)
            self._free_bytes += tensor.nbytes
