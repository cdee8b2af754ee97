"""Clocks of simulated processes: each has its own zero and its own rate.

Only cores see them. The network, the faults and the checks go by true time.
"""

import random
from dataclasses import dataclass

MILLION = 1_000_000
SECOND_NS = 1_000_000_000
OFFSETS_MAX_NS = (0, 10 * SECOND_NS, 10**9 * SECOND_NS)
"""A machine that has just started, one that started a while ago, and one that never stops."""


@dataclass(eq=False, slots=True)
class Clock:
    """What one process takes for the time.

    Attributes
    ----------
    offset_ns : int
        What it shows at true time 0.
    ppm : int
        By how many millionths it is faster than true time, or slower.
    """

    offset_ns: int = 0
    ppm: int = 0

    def shows(self, true_ns: int) -> int:
        """What the clock shows at a true time."""
        return self.offset_ns + true_ns + true_ns * self.ppm // MILLION

    def true_ns(self, shown_ns: int) -> int:
        """The first true time at which the clock shows this or more."""
        since_ns = shown_ns - self.offset_ns
        return -(-since_ns * MILLION // (MILLION + self.ppm))

    def stop(self, for_ns: int) -> None:
        """Stand still for so long from now on. Nobody may look at the clock meanwhile."""
        self.offset_ns -= for_ns + for_ns * self.ppm // MILLION


def draw_clock(rng: random.Random, ppm_max: int) -> Clock:
    """The clock of a new process; the true one where ``ppm_max`` is 0."""
    if not ppm_max:
        return Clock()
    return Clock(rng.randint(0, rng.choice(OFFSETS_MAX_NS)), rng.randint(-ppm_max, ppm_max))
