"""Backup tasks: which missing slots of a late round are worth giving to workers that have nothing to do.

Part of `treefold.scheduler.core` in a file of its own; just as pure. A backup helps if it will be done
before the worker that has the slot, or if that one takes so much longer than it should that it may be
stuck. Anything else would only keep the helper from its own slots of the next round.
"""

from collections.abc import Mapping
from dataclasses import dataclass

STUCK_FACTOR = 2  # a slot that takes so many times as long as it should may never be done


@dataclass(slots=True)
class LateSlot:
    """A missing slot: who has it, when the first of them should be done, and when not to wait longer."""

    holders: list[int]
    expected_ns: int
    stuck_ns: int


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
            The round that was reported late.
        owners : mapping of int to int
            Worker of each missing slot, in ascending order of slots.
        speeds : mapping of int to int
            Predicted nanoseconds per slot of each live worker.

        Returns
        -------
        list of (worker, slot)
            At most one slot for a worker, and only for those that owe none. Who got one and did not
            do it in time, or never heard of it, may get another or the same again.
        """
        for old in [number for number in self._rounds if number < round_ - 1]:
            del self._rounds[old]
        slots = self._late_slots(now_ns, round_, owners, speeds)
        waited_for = [slots[slot] for slot in owners if now_ns < slots[slot].stuck_ns]
        busy = [*owners.values(), *(who for late in waited_for for who in late.holders)]
        found = []
        for who in sorted(speeds, key=lambda worker: (speeds[worker], worker)):
            done_ns = now_ns + speeds[who]
            helped = [
                slot
                for slot in owners
                if done_ns < slots[slot].expected_ns or now_ns >= slots[slot].stuck_ns
            ]
            if who in busy or not helped:
                continue
            slot = max(helped, key=lambda n: (-len(slots[n].holders), slots[n].expected_ns, n))
            late = slots[slot]
            late.holders.append(who)
            late.expected_ns = done_ns
            late.stuck_ns = now_ns + STUCK_FACTOR * speeds[who]
            found.append((who, slot))
        return found

    def has_any(self, round_: int, slots: Mapping[int, int]) -> bool:
        """Whether somebody beside its owner has one of these slots."""
        known = self._rounds.get(round_, {})
        return any(len(known[slot].holders) > 1 for slot in slots if slot in known)

    def _late_slots(
        self, now_ns: int, round_: int, owners: Mapping[int, int], speeds: Mapping[int, int]
    ) -> dict[int, LateSlot]:
        """Every missing slot; a new owner computes its slots one after the other from now on."""
        slots = self._rounds.setdefault(round_, {})
        place: dict[int, int] = {}
        for slot, who in owners.items():
            place[who] = place.get(who, 0) + 1
            each_ns = speeds.get(who, 0)
            if slot not in slots or who not in slots[slot].holders:
                before = slots[slot].holders if slot in slots else []
                expected_ns = now_ns + place[who] * each_ns - each_ns // 2
                stuck_ns = now_ns + STUCK_FACTOR * place[who] * each_ns
                slots[slot] = LateSlot([who, *before], expected_ns, stuck_ns)
        return slots
