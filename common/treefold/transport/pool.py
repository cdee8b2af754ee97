"""Float32 buffers that are used again instead of being allocated in every round."""

import torch

FREE_BYTES_MAX = 1 << 28  # beyond that, buffers go back to the allocator instead of being kept


class BufferPool:
    """Buffers by length; the one that was given back last is handed out first. For one thread."""

    def __init__(self) -> None:
        self._free: dict[int, list[torch.Tensor]] = {}
        self._free_bytes = 0

    def take(self, elements: int) -> torch.Tensor:
        """An uninitialised buffer.

        Returns
        -------
        Tensor, float32 [elements]
        """
        kept = self._free.get(elements)
        if kept:
            self._free_bytes -= elements * 4
            return kept.pop()
        return torch.empty(elements, dtype=torch.float32)

    def give(self, tensor: torch.Tensor) -> None:
        """Take a buffer back."""
        size = tensor.numel()
        if self._free_bytes + size * 4 <= FREE_BYTES_MAX:
            self._free.setdefault(size, []).append(tensor)
            self._free_bytes += size * 4
