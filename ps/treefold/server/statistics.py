"""Statistics of weights and gradients, tensor by tensor, for whoever looks at the live page.

Made while the scheduler says that somebody does, every `EVERY_NS`, and less often where it takes
long. Weights are read part by part between two events, so that no round waits for more than one
part; of gradients the next one of each part counts. Nothing is changed.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from treefold.common.spec import BUFFER_GROUP
from treefold.server.shard import FoldedPart, ShardState
from treefold.wire.membership import MS, Membership
from treefold.wire.words import FIGURES_MAX, FIGURES_TENSORS_MAX, Figure

EVERY_NS = 10_000 * MS  # more would be seen by nobody, and costs
REST_PER_WORK = 50  # so that it takes 2 % of the time at most, however much a server holds
PATIENCE_NS = 5_000 * MS  # for gradients; of parts that had none by then there are none
WEIGHTS, GRADIENTS = 0, 1
Key = tuple[int, int]
Sums = tuple[int, float, float, float, float]
"""Number, sum, sum of squares, least and greatest of some values."""


class Statistics:
    """One pass after the other over what a server holds.

    Parameters
    ----------
    states : mapping of (int, int) to ShardState
        Shards by table and number; only read.
    membership : Membership
        Says whether anybody looks; its next heartbeat takes the figures along.
    ring : callable
        Lets `turn` be called again soon.
    """

    def __init__(
        self, states: Mapping[Key, ShardState], membership: Membership, ring: Callable[[], None]
    ) -> None:
        self._states = states
        self._ring = ring
        self._took_ns = 0
        self._membership = membership
        self._next_ns = 0
        self._ends_ns = 0
        self._unread: list[tuple[Key, int]] = []
        self._unseen: dict[tuple[Key, int], None] = {}
        self._found: dict[tuple[int, int, int, int], Sums] | None = None

    def turn(self, now_ns: int) -> None:
        """Read one part, if a pass is in progress or due."""
        if self._found is None:
            if self._membership.is_watched and now_ns >= self._next_ns:
                self._begin(now_ns)
            return
        if self._unread:
            key, part = self._unread.pop()
            state = self._states.get(key)
            if state is not None:  # else it has moved away
                self._add(key, state, part, state.values(part))
            self._ring()
        elif not self._unseen or now_ns >= self._ends_ns:
            found = self._found.items()
            figures = [Figure(one, shard, n, kind, *sums) for (one, shard, n, kind), sums in found]
            self._membership.vitals.figures = figures[:FIGURES_MAX]
            self._found, self._unseen = None, {}
            self._next_ns = now_ns + max(EVERY_NS, REST_PER_WORK * self._took_ns)

    def see(self, key: Key, folded: Sequence[FoldedPart]) -> None:
        """Look at gradients before they are applied, if a pass still lacks them."""
        for one in folded if self._unseen else ():
            if (key, one.part) in self._unseen:
                del self._unseen[key, one.part]
                if one.gradient is not None:
                    self._add(key, self._states[key], one.part, one.gradient, one.absent)

    def _begin(self, now_ns: int) -> None:
        self._ends_ns, self._took_ns = now_ns + PATIENCE_NS, 0
        parts = [(key, n) for key, state in self._states.items() for n in range(len(state.parts))]
        self._unread, self._unseen, self._found = parts, dict.fromkeys(parts), {}

    def _add(
        self, key: Key, state: ShardState, part: int, values: Tensor, absent: bytes | None = None
    ) -> None:
        """Add a part's values to those of its tensors."""
        if self._found is None:
            return
        began_ns = time.monotonic_ns()
        kind = WEIGHTS if absent is None else GRADIENTS
        start, stop = state.parts[part]
        for place, piece in enumerate(state.layout.pieces(start, stop)):
            is_absent = bool(absent) and bool((absent or b"")[place >> 3] >> (place & 7) & 1)
            is_buffer = state.spec.tensors[piece.tensor].group == BUFFER_GROUP
            if piece.tensor >= FIGURES_TENSORS_MAX or is_absent or (is_buffer and kind):
                continue
            known = self._found.get((*key, piece.tensor, kind))
            sums = sums_of(values[piece.start - start : piece.stop - start])
            self._found[*key, piece.tensor, kind] = sums if known is None else joined(known, sums)
        self._took_ns += time.monotonic_ns() - began_ns


def sums_of(values: Tensor) -> Sums:
    """The sums of some values, in float64."""
    least, greatest = torch.aminmax(values)
    total = values.sum(dtype=torch.float64)
    squares = torch.linalg.vector_norm(values, dtype=torch.float64).square()
    return values.numel(), total.item(), squares.item(), least.item(), greatest.item()


def joined(one: Sums, other: Sums) -> Sums:
    """The sums of both together; what is no number stays that."""
    count, total, squares = one[0] + other[0], one[1] + other[1], one[2] + other[2]
    if math.isnan(total):
        return count, total, squares, math.nan, math.nan
    return count, total, squares, min(one[3], other[3]), max(one[4], other[4])
