"""The versions of one shard that workers can pull: two buffers in turn, shared if possible.

The buffer of version ``v`` is the one of version ``v - 2``. That is not asked for any more: a part
of version ``v`` exists only when every slot of round ``v - 1`` has been computed from ``v - 1``. A
worker of this host that has fallen so far behind sees it in the word beside the buffer; what a
socket has still to send is left alone, and the version gets memory of its own.
"""

from collections.abc import Sequence

import torch

from treefold.common.fold import TORCH_DTYPES
from treefold.common.layout import Layout
from treefold.transport.carrier import Carrier
from treefold.transport.segments import announce

BUFFERS = 2
ALIGNED = 16  # values: buffers begin at multiples of 64 bytes, as tensors do


class Published:
    """Published versions of one shard.

    Parameters
    ----------
    carrier : Carrier
        Makes shared memory, and knows what is still on its way.
    layout : Layout
        The table's flat space.
    parts : sequence of (start, stop)
        The shard's parts.
    is_constant : bool
        Whether there is one version only.
    is_shared : bool
        Whether workers may read where they lie: not where versions follow one another so quickly
        that a reader would have to begin anew again and again.

    Attributes
    ----------
    urgent : list of int
        Parts that a loop body needs before it begins.
    """

    def __init__(
        self,
        carrier: Carrier,
        layout: Layout,
        parts: Sequence[tuple[int, int]],
        *,
        is_constant: bool,
        is_shared: bool = True,
    ) -> None:
        self._carrier = carrier
        self._layout = layout
        self.urgent = [n for n, part in enumerate(parts) if layout.has_buffers(*part)]
        self._parts = parts
        self._elements = elements = max(0, parts[-1][1] - parts[0][0])
        count, step = 1 if is_constant else BUFFERS, -(-elements // ALIGNED) * ALIGNED
        is_shared &= elements > 0
        self._segment = carrier.lanes.create(count * step * 4) if is_shared else None
        if self._segment is None:
            flat = torch.empty(count * step)
        else:
            self._segment.words.fill_(-1)
            flat = self._segment.body.view(torch.float32)
        self._buffers = [flat[n * step : n * step + elements] for n in range(count)]
        self._views = [self._cut(buffer) for buffer in self._buffers]
        self._versions: dict[int, list[torch.Tensor]] = {}

    def __contains__(self, version: int) -> bool:
        """Whether a version, or some of its parts, are here."""
        return version in self._versions

    def key(self, version: int) -> int:
        """Names the buffer that a version is in, for `Carrier.send`."""
        return self._parts_of(version)[0].data_ptr()

    def part(self, version: int, number: int) -> torch.Tensor:
        """Where a part of a version is kept, of the part's wire type [part].

        Narrow parts lie one after the other at the beginning of the buffer, others where float32
        would have them. The version is begun if there is nothing of it yet.
        """
        return self._parts_of(version)[number]

    def _parts_of(self, version: int) -> list[torch.Tensor]:
        known = self._versions.get(version)
        if known is not None:
            return known
        number = version % len(self._buffers)
        found = self._views[number]
        if self._carrier.is_busy(found[0].data_ptr()):
            found = self._cut(torch.empty(self._elements))
        elif self._segment is not None:
            announce(self._segment, number, version)
        self._versions[version] = found
        return found

    def _cut(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The parts in a buffer."""
        first = self._parts[0][0]
        found = []
        for start, stop in self._parts:
            wire = TORCH_DTYPES[self._layout.wire((start, stop))]
            found.append(buffer.view(wire)[start - first : stop - first])
        return found

    def drop(self, version: int) -> None:
        """A version is not asked for any more."""
        self._versions.pop(version, None)
