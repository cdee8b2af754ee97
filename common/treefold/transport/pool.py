"""Float32 buffers that are used again, but never while ZeroMQ may still read them."""

import threading

import torch
import zmq

FREE_BYTES_MAX = 1 << 30  # beyond that, buffers go back to the allocator instead of being kept


class BufferPool:
    """Buffers by length. May be used by several threads.

    Notes
    -----
    A no-copy send aliases the tensor. ZeroMQ's tracker of a send says when the last byte is with
    the kernel; until then a buffer that was given back is kept aside.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[torch.Tensor]] = {}
        self._free_bytes = 0
        self._lock = threading.Lock()
        self._sends: dict[int, list[zmq.MessageTracker]] = {}
        self._waiting: list[torch.Tensor] = []

    def take(self, elements: int) -> torch.Tensor:
        """An uninitialised buffer.

        Returns
        -------
        Tensor, float32 [elements]
        """
        with self._lock:
            if self._waiting:
                self._reclaim()
            kept = self._free.get(elements)
            if kept:
                self._free_bytes -= elements * 4
                return kept.pop()
        return torch.empty(elements, dtype=torch.float32)

    def note_send(self, tensor: torch.Tensor, tracker: zmq.MessageTracker) -> None:
        """Remember that ``tensor``, or a slice of it, is on its way out."""
        if not tracker.done:
            with self._lock:
                self._sends.setdefault(tensor.untyped_storage().data_ptr(), []).append(tracker)

    def give(self, tensor: torch.Tensor) -> None:
        """Take a buffer back; it is handed out again once nothing of it is on its way."""
        with self._lock:
            if self._is_busy(tensor):
                self._waiting.append(tensor)
            else:
                self._keep(tensor)

    def _is_busy(self, tensor: torch.Tensor) -> bool:
        key = tensor.untyped_storage().data_ptr()
        pending = [tracker for tracker in self._sends.get(key, ()) if not tracker.done]
        if pending:
            self._sends[key] = pending
        else:
            self._sends.pop(key, None)
        return bool(pending)

    def _reclaim(self) -> None:
        still = []
        for tensor in self._waiting:
            if self._is_busy(tensor):
                still.append(tensor)
            else:
                self._keep(tensor)
        self._waiting = still

    def _keep(self, tensor: torch.Tensor) -> None:
        size = tensor.numel()
        if self._free_bytes + size * 4 <= FREE_BYTES_MAX:
            self._free.setdefault(size, []).append(tensor)
            self._free_bytes += size * 4
