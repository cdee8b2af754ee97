"""When a shard is worth moving to another server, by what servers hold and how fast they are.

A move is a further copy: when it is in sync, the copy on the server with too much to do is dropped.
One shard moves at a time, only while no copy is missing anywhere, and only if the busiest server's
predicted time of a round is clearly longer than that of the servers on average.

Part of `treefold.scheduler.core` in a file of its own; just as pure.
"""

from dataclasses import dataclass

from treefold.scheduler.chains import Chains, Key
from treefold.scheduler.members import MemberState, Roster
from treefold.wire.membership import MS
from treefold.wire.words import Role

IMBALANCE_MIN = 1.2  # the busiest server's time as a multiple of the mean, from which on it matters
REST_MS = 1_000  # after a move has begun, before the next one is thought of
ROUNDS_MIN = 20  # rounds over which a server's time is measured
TIME_MIN_NS = 1 * MS  # per round; where servers have less to do, their speed cannot be told


@dataclass(slots=True)
class _Measured:
    """What a server had spent at some round, and what a block costs it per round since."""

    round: int
    spent_ns: int
    cost_ns: float = 0.0


class Moves:
    """Shards on their way from busy servers to idle ones.

    Parameters
    ----------
    roster : Roster
        The members, with what they report.
    chains : Chains
        Who holds what.
    """

    def __init__(self, roster: Roster, chains: Chains) -> None:
        self._roster = roster
        self._chains = chains
        self._measured: dict[int, _Measured] = {}
        self._next_ns = 0

    def begin(self, now_ns: int, view: int) -> bool:
        """Begin one move in the view of this number, if one is worth it; True if so."""
        for state in self._roster.live(Role.SERVER):
            self._measure(state)
        if now_ns < self._next_ns or not self._chains.is_calm:
            return False
        found = self._wanted()
        if found is None:
            return False
        self._next_ns = now_ns + REST_MS * MS
        self._chains.move(*found, view)
        return True

    def _measure(self, state: MemberState) -> None:
        """Take in what a server says that it has spent on its shards."""
        beat, who = state.beat, state.member.incarnation
        if beat is None:
            return
        spent_ns = sum(beat.spent_ns.values())
        known = self._measured.setdefault(who, _Measured(beat.round, spent_ns))
        rounds, blocks = beat.round - known.round, self._chains.load.get(who, 0)
        if rounds >= ROUNDS_MIN and blocks:
            per_round_ns = (spent_ns - known.spent_ns) / rounds
            cost_ns = per_round_ns / blocks if per_round_ns >= TIME_MIN_NS else 0.0
            self._measured[who] = _Measured(beat.round, spent_ns, cost_ns)

    def _wanted(self) -> tuple[Key, int, int] | None:
        """The shard to be moved, from which server, to which; None if that is not worth it."""
        load = self._chains.load
        servers = self._chains.staying
        costs = {who: self._cost(who) for who in servers}
        known = [cost for cost in costs.values() if cost]
        usual = sum(known) / len(known) if known else 1.0
        time = {who: load.get(who, 0) * (costs[who] or usual) for who in servers}
        if len(time) < 2:
            return None
        busiest = max(time, key=lambda who: (time[who], -who))
        best: tuple[float, Key, int] | None = None
        for key, place in self._chains.of(busiest):
            members = (place.server, *place.backups, *place.joining)
            for who in [who for who in servers if who not in members]:
                after = max(
                    time[busiest] - place.blocks * (costs[busiest] or usual),
                    time[who] + place.blocks * (costs[who] or usual),
                )
                if best is None or after < best[0]:
                    best = after, key, who
        mean = sum(time.values()) / len(time)
        if best is None or best[0] >= time[busiest] or time[busiest] < IMBALANCE_MIN * mean:
            return None
        return best[1], busiest, best[2]

    def _cost(self, who: int) -> float:
        known = self._measured.get(who)
        return 0.0 if known is None else known.cost_ns
