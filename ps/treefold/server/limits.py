"""Times and bounds of a server."""

from dataclasses import dataclass

from treefold.wire.membership import MS


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Times and bounds of a server.

    Attributes
    ----------
    connect_timeout_ns : int
        How long to wait for the scheduler's first answer.
    orphan_after_ns : int
        Without a word from the scheduler and from any worker for so long, the server ends. Longer
        than workers wait for one, so that a network that heals finds both.
    check_every : int
        Rounds between two comparisons of a shard's copies, 0 for none.
    """

    connect_timeout_ns: int
    orphan_after_ns: int = 120_000 * MS
    check_every: int = 100
