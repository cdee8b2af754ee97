"""Corrects gradients for what parameters have moved since they were computed; tensors, no I/O."""

from collections import deque

import torch
from torch import Tensor

from treefold.common.spec import Compensation, Consistency
from treefold.server.shard import ShardState

DECAY = 0.95  # of the mean square of gradients
EPSILON = 1e-7


class Delays:
    """Older values of one shard, and what is made of them.

    A gradient ``g`` that was computed at ``w_old`` and is applied to ``w`` becomes
    ``g + strength * g * g * (w - w_old)``. With `Compensation.DC_ASGD_ADAPTIVE` the strength of
    each element is divided by the root of the mean square of its gradients. Contributions carry
    their slot's share of a round, which is made up for: the strength is that of the paper, for
    gradients of whole batches. Source: Zheng et al., Asynchronous stochastic gradient descent with
    delay compensation, ICML 2017.

    What is kept here is not part of the shard's state. A server that is promoted has older values
    of its own; one that a shard moves to, or that begins from a checkpoint, corrects as versions
    come together again.

    Parameters
    ----------
    state : ShardState
        The shard.
    rule : Consistency
        The table's.
    """

    def __init__(self, state: ShardState, rule: Consistency) -> None:
        self._state = state
        self._rule = rule
        self._older: list[deque[tuple[int, Tensor]]] = [
            deque(maxlen=max(1, rule.versions)) for _ in state.parts
        ]
        self._squares: dict[int, Tensor] = {}

    def keep(self, part: int, version: int) -> None:
        """Keep what a part is in a version, before it is stepped."""
        older, count = self._older[part], self._state.trained(part)
        if not count or (older and older[-1][0] == version):
            return
        is_full = len(older) == older.maxlen
        values = older.popleft()[1] if is_full else torch.empty(count)
        older.append((version, values.copy_(self._state.values(part)[:count])))

    def correct(self, part: int, gradient: Tensor, base: int, active: int) -> None:
        """Correct the gradient of a part in place.

        Parameters
        ----------
        part : int
            Number of the part.
        gradient : Tensor, float32 [part]
            As it was contributed, with its slot's share of a round. Elements that are 0 stay as
            they are, and so do buffers.
        base : int
            The version that it was computed with. If it is not kept any more the oldest one that is
            stands in.
        active : int
            Slots of the round, of which this one has its share.
        """
        count = self._state.trained(part)
        own = gradient[:count]
        squares = own.square().mul_(active)
        if self._rule.compensation is Compensation.DC_ASGD_ADAPTIVE:
            mean = self._squares.setdefault(part, torch.zeros(count))
            mean.mul_(DECAY).add_(squares, alpha=(1 - DECAY) * active)
            squares.div_(mean.add(EPSILON).sqrt_())
        old = next((values for version, values in self._older[part] if version >= base), None)
        if old is None:
            return
        squares.mul_(self._state.values(part)[:count] - old)
        corrected = torch.add(own, squares, alpha=self._rule.strength)
        torch.where(own == 0, own, corrected, out=own)
