"""Digests of a shard's values and optimizer state, the same whatever cluster holds the table.

A block is never split, so there is one digest per block: shards of any cut give the same list when
put one after the other.
"""

import hashlib
import zlib

import torch
from torch import Tensor

from treefold.common import layout as layouts
from treefold.server.shard import ShardState
from treefold.server.unit import StatePiece


def checksum(state: ShardState) -> bytes:
    """A checksum of a shard, to compare copies that went through the same rounds.

    Parameters
    ----------
    state : ShardState
        The shard; not changed.

    Returns
    -------
    bytes
        CRC-32 of all values and of everything that the optimizer keeps, 4 bytes.
    """
    found = 0
    for tensor in state.tensors():
        found = zlib.crc32(_bytes_of(tensor), found)
    for key, value in state.counters():
        found = zlib.crc32(f"{key}={value!r} ".encode(), found)
    return found.to_bytes(4, "little")


def block_digests(state: ShardState) -> list[bytes]:
    """One digest per block of a shard.

    Parameters
    ----------
    state : ShardState
        The shard; not changed.

    Returns
    -------
    list of bytes
        SHA-256 of the block's values (buffers among them) and of what the optimizer keeps of them.
    """
    first, end = state.parts[0][0], state.parts[-1][1]
    values = torch.empty(end - first)
    state.copy_to(values)
    pieces = [
        (state.layout.starts[piece.tensor] + piece.offset, piece) for piece in state.state_pieces()
    ]
    found = []
    for start in range(first, max(end, first + 1), layouts.BLOCK_ELEMENTS):
        stop = min(start + layouts.BLOCK_ELEMENTS, end)
        digest = hashlib.sha256(_raw(values[start - first : stop - first]))
        for position, piece in pieces:
            low, high = max(start, position), min(stop, position + piece.elements)
            if low < high:
                digest.update(_state_bytes(piece, low - position, high - position))
        found.append(digest.digest())
    return found


def _state_bytes(piece: StatePiece, start: int, stop: int) -> bytes:
    """What a piece's state says of its elements ``[start, stop)``."""
    found = [f"{piece.tensor} {piece.offset + start} {stop - start}".encode()]
    for key, value in sorted(piece.state.items()):
        if not isinstance(value, Tensor):
            found.append(f" {key}={value!r} ".encode())
        elif value.numel() == piece.elements:
            found += [f" {key}: ".encode(), _raw(value.reshape(-1)[start:stop])]
        elif start == 0:  # such as Adafactor's row sums, which belong to the tensor as a whole
            found += [f" {key}: ".encode(), _raw(value)]
    return b"".join(found)


def _bytes_of(values: Tensor) -> memoryview:
    """The memory of a tensor, not copied if it lies in one piece."""
    return values.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _raw(values: Tensor) -> bytes:
    return values.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
