"""How long a worker's next slot will take, which is what slots are leased by. Pure."""

import statistics
from collections import deque

REMEMBERED = 7  # slots; half of them, and one, make a change of pace
HUNG_FACTOR = 20  # a slot that takes so many times as long may never end


class MedianForecast:
    """The median of the last slots.

    One slot that was held up, by a stop or a cut, says nothing of the next one; who has really
    become slower is known as such four slots later.
    """

    def __init__(self) -> None:
        self._took_ns: deque[int] = deque(maxlen=REMEMBERED)

    @property
    def slot_time_ns(self) -> int:
        """The prediction, 0 before the first slot."""
        return statistics.median_low(self._took_ns) if self._took_ns else 0

    def add(self, took_ns: int) -> int:
        """A slot is done; returns the prediction."""
        self._took_ns.append(max(1, took_ns))
        return self.slot_time_ns

    def while_in_hand(self, so_far_ns: int) -> int:
        """The prediction while a slot is being computed.

        One that does not end shows in no finished one; leases must move all the same. Until it
        counts as hung, others help with it alone.
        """
        known_ns = self.slot_time_ns
        return so_far_ns if so_far_ns > HUNG_FACTOR * known_ns else known_ns
