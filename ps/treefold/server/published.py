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
    """

    def __init__(
        self,
        carrier: Carrier,
        layout: Layout,
        parts: Sequence[tuple[int, int]],
        *,
        is_constant: bool,
    ) -> None:
        self._carrier = carrier
        self._layout = layout
        self._parts = parts
        self._elements = elements = max(0, parts[-1][1] - parts[0][0])
        count = 1 if is_constant else BUFFERS
        self._segment = carrier.lanes.create(count * elements * 4) if elements else None
        if self._segment is None:
            flat = torch.empty(count * elements)
        else:
            self._segment.words.fill_(-1)
            flat = self._segment.body.view(torch.float32)
        self._buffers = [flat[n * elements : (n + 1) * elements] for n in range(count)]
        self._versions: dict[int, torch.Tensor] = {}

    def __contains__(self, version: int) -> bool:
        """Whether a version, or some of its parts, are here."""
        return version in self._versions

    def buffer(self, version: int) -> torch.Tensor:
        """The buffer of a version, begun if there is none yet; float32 [elements]."""
        known = self._versions.get(version)
        if known is not None:
            return known
        number = version % len(self._buffers)
        found = self._buffers[number]
        if self._carrier.is_busy(found.data_ptr()):
            found = torch.empty(self._elements)
        elif self._segment is not None:
            announce(self._segment, number, version)
        self._versions[version] = found
        return found

    def part(self, version: int, number: int) -> torch.Tensor:
        """Where a part of a version is kept, of the part's wire type [part].

        Narrow parts lie one after the other at the beginning of the buffer, others where float32
        would have them.
        """
        start, stop = self._parts[number]
        first = self._parts[0][0]
        wire = TORCH_DTYPES[self._layout.wire((start, stop))]
        return self.buffer(version).view(wire)[start - first : stop - first]

    def drop(self, version: int) -> None:
        """A version is not asked for any more."""
        self._versions.pop(version, None)
