"""Backup tasks: which missing slots of a late round are worth giving to idle workers.

Part of `treefold.scheduler.core` in a file of its own; just as pure. A backup helps if it will be
done before the worker that has the slot, or if that one takes so much longer than it should that it
may be stuck. Anything else would only keep the helper from its own slots of the next round.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

STUCK_FACTOR = 2  # a slot that takes so many times as long as it should may never be done


@dataclass(slots=True)
class LateSlot:
    """A missing slot.

    Attributes
    ----------
    owner : int
        Whose lease it is.
    expected_ns : int
        When it should be done.
    stuck_ns : int
        When there is no point in waiting any longer.
    helpers : dict of int to int
        Who was asked to compute it as well, and how many times.
    """

    owner: int
    expected_ns: int
    stuck_ns: int
    helpers: dict[int, int] = field(default_factory=dict)


class Backups:
    """The missing slots of late rounds."""

    def __init__(self) -> None:
        self._rounds: dict[int, dict[int, LateSlot]] = {}

    def grants(
        self, now_ns: int, round_: int, owners: Mapping[int, int], speeds: Mapping[int, int]
    ) -> list[tuple[int, int]]:
        """Which worker is to take which slot as well.

        Parameters
        ----------
        now_ns, round_ : int
            When a round was reported late, and which.
        owners : mapping of int to int
            Worker of each missing slot, in ascending order of slots.
        speeds : mapping of int to int
            Predicted nanoseconds per slot of each live worker.

        Returns
        -------
        list of (worker, slot)
            At most one slot for a worker, and only for those that owe none. Who got one and did not
            do it in time, or never heard of it, is asked again, after those who did not.
        """
        for old in [number for number in self._rounds if number < round_ - 1]:
            del self._rounds[old]
        late = self._missing(now_ns, round_, owners, speeds)
        waited_for = [slot for slot in late.values() if now_ns < slot.stuck_ns]
        busy = {*owners.values(), *(who for slot in waited_for for who in slot.helpers)}
        asked = dict.fromkeys(speeds, 0)
        for who, times in [pair for slot in late.values() for pair in slot.helpers.items()]:
            asked[who] = asked.get(who, 0) + times
        found = []
        for who in sorted(speeds, key=lambda worker: (asked[worker], speeds[worker], worker)):
            if who in busy:
                continue
            done_ns = now_ns + speeds[who]
            helped = [n for n, s in late.items() if done_ns < s.expected_ns or now_ns >= s.stuck_ns]
            if not helped:
                continue
            number = max(helped, key=lambda n: (-len(late[n].helpers), late[n].expected_ns, n))
            slot = late[number]
            slot.helpers[who] = slot.helpers.get(who, 0) + 1
            slot.expected_ns = done_ns
            slot.stuck_ns = now_ns + STUCK_FACTOR * speeds[who]
            found.append((who, number))
        return found

    def has_any(self, round_: int, slots: Mapping[int, int]) -> bool:
        """Whether somebody beside its owner was asked to compute one of these slots."""
        known = self._rounds.get(round_, {})
        return any(known[slot].helpers for slot in slots if slot in known)

    def _missing(
        self, now_ns: int, round_: int, owners: Mapping[int, int], speeds: Mapping[int, int]
    ) -> dict[int, LateSlot]:
        """Every missing slot; an owner computes its own one after the other from now on."""
        known = self._rounds.setdefault(round_, {})
        place: dict[int, int] = {}
        for number, who in owners.items():
            place[who] = place.get(who, 0) + 1
            if number in known and known[number].owner == who:
                continue
            each_ns = speeds.get(who, 0)
            expected_ns = now_ns + place[who] * each_ns - each_ns // 2
            stuck_ns = now_ns + STUCK_FACTOR * place[who] * each_ns
            known[number] = LateSlot(who, expected_ns, stuck_ns)
        return {number: known[number] for number in owners}
