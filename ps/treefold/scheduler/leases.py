"""How many slots each worker gets, by its measured speed, and when it is worth changing that.

Slots are equal work, so giving the next slot to the worker that would be done with it first
minimises the time of the round. Each worker's slots are consecutive, so that it can fold them into
few nodes.
"""

from collections.abc import Mapping, Sequence

GAIN_MIN = 0.10  # leases move only if the predicted round gets at least this much shorter


def counts(slots: int, slot_time_ns: Mapping[int, int]) -> dict[int, int]:
    """Slots per worker with the shortest predicted round.

    Parameters
    ----------
    slots : int
        Slots to give away.
    slot_time_ns : mapping of int to int
        Predicted time per slot of each worker (by incarnation), at least 1.

    Returns
    -------
    dict of int to int
        Slots of each worker, in the order of ``slot_time_ns``; they add up to ``slots``.
    """
    given = dict.fromkeys(slot_time_ns, 0)
    for _ in range(slots):
        who = min(
            given, key=lambda worker: ((given[worker] + 1) * slot_time_ns[worker], given[worker])
        )
        given[who] += 1
    return given


def speeds(measured_ns: Mapping[int, int]) -> dict[int, int]:
    """Predicted time per slot of each worker: as measured, or the others' mean where it is 0."""
    known = [time_ns for time_ns in measured_ns.values() if time_ns]
    usual = sum(known) // len(known) if known else 1
    return {who: max(1, time_ns or usual) for who, time_ns in measured_ns.items()}


def round_time_ns(given: Mapping[int, int], slot_time_ns: Mapping[int, int]) -> int:
    """Predicted time of a round: that of the slowest worker."""
    return max((count * slot_time_ns.get(who, 0) for who, count in given.items()), default=0)


def lay_out(given: Mapping[int, int]) -> list[int]:
    """The worker of each slot, consecutive slots to each worker in the order of ``given``."""
    return [who for who, count in given.items() for _ in range(count)]


def is_worth_it(
    current: Sequence[int], wanted: Sequence[int], slot_time_ns: Mapping[int, int]
) -> bool:
    """Whether moving from ``current`` to ``wanted`` shortens the predicted round enough."""
    before = round_time_ns(_tally(current), slot_time_ns)
    after = round_time_ns(_tally(wanted), slot_time_ns)
    return after < before * (1 - GAIN_MIN)


def _tally(workers: Sequence[int]) -> dict[int, int]:
    tally: dict[int, int] = {}
    for who in workers:
        tally[who] = tally.get(who, 0) + 1
    return tally
