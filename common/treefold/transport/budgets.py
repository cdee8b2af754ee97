"""How much a peer of a listener gets away with: what asks to be flooded is not.

Answers wait in memory until their peer reads them. A peer that keeps asking for nothing and never
reads would otherwise fill it: refusals and status documents are larger than what leads to them.
And a peer that has sent too much that was refused is not even read for a while. Whoever is in
earnest asks again later.
"""

from collections import OrderedDict
from dataclasses import dataclass
from time import monotonic_ns

from treefold.wire.messages import AnyMessage, Refused, StatusReply
from treefold.wire.probes import ProbeSeen

PEERS_MAX = 4_096  # remembered; the one that was longest silent is forgotten first


@dataclass(frozen=True, slots=True)
class Budget:
    """So many at once, and then so many in a second."""

    burst: int
    per_s: int


BUDGETS: dict[type[AnyMessage], Budget] = {
    Refused: Budget(512, 10),
    StatusReply: Budget(64, 20),
    ProbeSeen: Budget(256, 32),  # 32 MiB at once, then 4 MiB in a second
}
"""Answers that a peer gets."""
PATIENCE = Budget(1_024, 100)
"""Messages of a peer that may be refused before it is not read for a while."""


class Allowance:
    """How many bytes each host may bring: so many at once, and then so many in a second.

    Parameters
    ----------
    budget : Budget
        Of bytes.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._left: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def pay(self, host: str, nbytes: int) -> bool:
        """A host has brought so much; whether it had it left. What it had not, it owes."""
        budget, now_ns = self._budget, monotonic_ns()
        left, then_ns = self._left.pop(host, (float(budget.burst), now_ns))
        left = min(budget.burst, left + (now_ns - then_ns) * 1e-9 * budget.per_s) - nbytes
        self._left[host] = (left, now_ns)
        if len(self._left) > PEERS_MAX:
            self._left.popitem(last=False)
        return left >= 0


class Purse:
    """What each peer has left.

    Parameters
    ----------
    budgets : dict, optional
        By kind of answer.

    Attributes
    ----------
    withheld : int
        Answers that were not given.
    """

    def __init__(self, budgets: dict[type[AnyMessage], Budget] | None = None) -> None:
        self._budgets = BUDGETS if budgets is None else budgets
        self._left: OrderedDict[tuple[bytes, type[AnyMessage]], tuple[float, int]] = OrderedDict()
        self.withheld = 0

    def allows(self, peer: bytes, message: AnyMessage) -> bool:
        """Whether a peer gets this answer; if so it is paid for."""
        kind = type(message)
        budget = self._budgets.get(kind)
        if budget is None:
            return True
        key = (peer, kind)
        left, now_ns = self._count(key, budget), monotonic_ns()
        is_allowed = left >= 1
        self._left.pop(key, None)
        self._left[key] = (left - 1 if is_allowed else left, now_ns)
        if len(self._left) > PEERS_MAX:
            self._left.popitem(last=False)
        self.withheld += not is_allowed
        return is_allowed

    def is_empty(self, peer: bytes, kind: type[AnyMessage]) -> bool:
        """Whether a peer would not get such an answer now."""
        key = (peer, kind)
        return key in self._left and self._count(key, self._budgets[kind]) < 1

    def _count(self, key: tuple[bytes, type[AnyMessage]], budget: Budget) -> float:
        now_ns = monotonic_ns()
        left, then_ns = self._left.get(key, (float(budget.burst), now_ns))
        return min(budget.burst, left + (now_ns - then_ns) * 1e-9 * budget.per_s)
