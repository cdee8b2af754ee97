"""How a server's shell adds up payloads, and measures them on the way where that is cheaper.

A contribution that is only watched (`HealthPolicy.WARN`) is measured for nobody who waits. Once
folds are compiled that is put off until the contribution is folded, which reads it anyway.
"""

import math
from collections.abc import Iterable

from treefold.common import layout as layouts
from treefold.common.fold import Folder, Payload
from treefold.common.kernels import Compiler
from treefold.common.process import Spent
from treefold.server.effects import ComputeProducts, Event, FoldPayloads, ProductsComputed
from treefold.server.handling import Handling
from treefold.transport.carrier import Carrier, Held
from treefold.transport.pool import BufferPool


class Folding:
    """Folds, and what is still to be measured.

    Parameters
    ----------
    carrier : Carrier
        Holds the payloads.
    pool : BufferPool
        Where memory for payloads comes from.
    handling : Handling
        Measures payloads alone.
    spent : Spent
        Counts the time.
    """

    def __init__(
        self, carrier: Carrier, pool: BufferPool, handling: Handling, spent: Spent
    ) -> None:
        self.compiler = Compiler()
        self._carrier = carrier
        self._pool = pool
        self._handling = handling
        self._spent = spent
        self._folder = Folder(self.compiler)
        self._put_off: dict[int, ComputeProducts] = {}

    def fold(self, effect: FoldPayloads) -> list[Event]:
        """Add up two payloads."""
        left, right = self._carrier.held(effect.left), self._carrier.held(effect.right)
        out, events = left.owner, list[Event]()
        waiting = [self._put_off.pop(number, None) for number in (effect.left, effect.right)]
        if out is None:
            tensor = left.payload.tensor
            out = self._pool.take(tensor.numel(), tensor.dtype)
        sums = None
        with self._spent.on("fold"):
            if any(waiting):
                block = layouts.BLOCK_ELEMENTS
                sums = self._folder.fold_measured(left.payload, right.payload, out, block)
        held = left.payload, right.payload
        for number, (one, payload) in enumerate(zip(waiting, held, strict=True)):
            if one is not None:
                events += self._measured(one, payload, None if sums is None else sums[number])
        if sums is None:
            with self._spent.on("fold"):
                self._folder.fold(left.payload, right.payload, out)
        self._carrier.put(effect.left, Held(Payload(out), out))
        self.release(effect.right)
        return events

    def measure(self, effect: ComputeProducts) -> list[Event]:
        """Measure what is watched, now or when it is folded."""
        payload = effect.payloads[0]
        is_later = self.compiler.kernels is not None and payload is not None
        if payload is not None and is_later and self._handling.is_all_parameters(effect):
            self._put_off[payload] = effect
            return []
        with self._spent.on("health"):
            return self._handling.perform(effect)

    def settle(self, payloads: Iterable[int | None]) -> list[Event]:
        """Measure what was put off of these payloads, which go away or are used otherwise."""
        found = [self._put_off.pop(n) for n in payloads if n is not None and n in self._put_off]
        if not found:
            return []
        with self._spent.on("health"):
            return [event for one in found for event in self._handling.perform(one)]

    def forget(self, table: int, shard: int) -> None:
        """Measure nothing more of a shard that is closed."""
        kept = self._put_off.items()
        self._put_off = {n: e for n, e in kept if (e.table, e.shard) != (table, shard)}

    def release(self, payload: int) -> None:
        """A payload is not needed any more."""
        owner = self._carrier.drop(payload).owner
        if owner is not None:
            self._pool.give(owner)

    def _measured(
        self, effect: ComputeProducts, payload: Payload, sums: list[float] | None
    ) -> list[Event]:
        if sums is None or not all(map(math.isfinite, sums)):
            with self._spent.on("health"):
                return self._handling.perform(effect)
        rows = [[total * payload.scale * payload.scale] for total in sums]
        which = effect.table, effect.shard, effect.round, effect.part, effect.slots
        return [ProductsComputed(*which, rows)]
