"""What a server's shell does with the contributions of tables that look at them."""

from collections.abc import Mapping

import torch

from treefold.common.fold import Payload
from treefold.server.effects import (
    CombinePayloads,
    ComputeProducts,
    Event,
    ProductsComputed,
    ScalePayload,
)
from treefold.server.products import Products, trimmed_mean
from treefold.server.shard import ShardState
from treefold.transport.carrier import Carrier, Held
from treefold.transport.pool import BufferPool

HandlingWork = ComputeProducts | ScalePayload | CombinePayloads


class Handling:
    """Measures payloads and makes others of them.

    Parameters
    ----------
    carrier : Carrier
        Holds the payloads.
    pool : BufferPool
        Where memory for payloads comes from.
    states : mapping of (table, shard) to ShardState
        The shards that are here.
    """

    def __init__(
        self, carrier: Carrier, pool: BufferPool, states: Mapping[tuple[int, int], ShardState]
    ) -> None:
        self._carrier = carrier
        self._pool = pool
        self._states = states
        self._products: dict[tuple[int, int], tuple[ShardState, Products]] = {}

    def perform(self, effect: HandlingWork) -> list[Event]:
        """Do what is asked for."""
        if isinstance(effect, ComputeProducts):
            return [self._measure(effect)]
        if isinstance(effect, ScalePayload):
            self._scale(effect)
        else:
            self._combine(effect)
        return []

    def is_all_parameters(self, effect: ComputeProducts) -> bool:
        """Whether a part has neither buffers nor gaps, so that all of it is measured."""
        state, products = self._of((effect.table, effect.shard))
        return products.is_all_parameters(state.parts[effect.part])

    def _of(self, key: tuple[int, int]) -> tuple[ShardState, Products]:
        """A shard, and what measures it."""
        state, products = self._products.get(key, (None, None))
        if products is None or state is not self._states[key]:
            state = self._states[key]
            products = Products(state.layout)
            self._products[key] = state, products
        return state, products

    def _measure(self, effect: ComputeProducts) -> ProductsComputed:
        key = effect.table, effect.shard
        state, products = self._of(key)
        part = state.parts[effect.part]
        if state.spec.is_watched and effect.payloads[0] is not None:
            tensor, scale = self._carrier.held(effect.payloads[0]).payload
            rows = [[total * scale * scale] for (total,) in products.of(part, [tensor])]
        else:
            numbers = effect.payloads
            rows = products.of(part, [None if n is None else self._plain(n) for n in numbers])
        return ProductsComputed(*key, effect.round, effect.part, effect.slots, rows)

    def _plain(self, payload: int) -> torch.Tensor:
        """A payload's values, in memory of our own if they are still to be multiplied.

        What is measured has to be what is folded, which may have come scaled or not.
        """
        tensor, scale = self._carrier.held(payload).payload
        if scale == 1.0:
            return tensor
        own = self._pool.take(tensor.numel(), tensor.dtype)
        torch.mul(tensor, scale, out=own)
        self._carrier.put(payload, Held(Payload(own), own))
        return own

    def _scale(self, effect: ScalePayload) -> None:
        state, products = self._of((effect.table, effect.shard))
        values = self._wide(effect.payload, effect.factor)
        if effect.buffers != effect.factor:
            plain = self._plain(effect.payload)
            for low, high in products.buffers(state.parts[effect.part]):
                values[low:high] = plain[low:high].float() * effect.buffers
        self._put(effect.payload, values)

    def _combine(self, effect: CombinePayloads) -> None:
        pairs = zip(effect.payloads, effect.factors, strict=True)
        rows = [self._wide(payload, factor) for payload, factor in pairs]
        rows += [torch.full_like(rows[0], -0.0) for _ in range(effect.nothing)]  # as in folds
        self._put(effect.payloads[0], trimmed_mean(rows, effect.trimmed))

    def _wide(self, payload: int, factor: float) -> torch.Tensor:
        """A payload's values times a factor, in float32 and in memory of their own."""
        return self._plain(payload).float() * factor

    def _put(self, payload: int, values: torch.Tensor) -> None:
        """Give a payload other values, rounded to its type, and memory that is ours."""
        held = self._carrier.held(payload)
        own = held.owner
        if own is None:
            own = self._pool.take(values.numel(), held.payload.tensor.dtype)
        own.copy_(values)
        self._carrier.put(payload, Held(Payload(own), own))
