"""Who computes which slot: leases by measured speed, mended when holders go, and backup tasks.

Part of `treefold.scheduler.core` in a file of its own; just as pure. Leases carry no safety: two
workers may compute one slot, and the second copy is a duplicate. So everything here may be late or
wrong without harm.
"""

from treefold.common.plan import Policy
from treefold.scheduler import leases
from treefold.scheduler.backup import Backups
from treefold.scheduler.declared import Declared
from treefold.scheduler.members import MemberState, Roster
from treefold.wire.messages import Flush, Grant, RoundLate, View
from treefold.wire.words import Leases, Outcome, Phase, Role

LEASE_LEAD_MS = 100  # new leases begin so far ahead that they arrive before their first round
ROUNDS_APART_MAX = 1  # of workers that all go on: the first to hear of a version is ahead
HUNG_FACTOR = 20  # times what others took at best: what takes longer may never end
UNTIMED_FACTOR = 2  # times what others took at best: what a worker is thought to take at its first
UNMEASURED_DECAY = 0.9  # per check: a worker without slots is slowly given the benefit of the doubt


class Balance:
    """Leases of slots.

    Parameters
    ----------
    roster : Roster
        The members, with what they measured.
    declared : Declared
        How many slots there are.
    """

    def __init__(self, roster: Roster, declared: Declared) -> None:
        self._roster = roster
        self._declared = declared
        self._backups = Backups()
        self._round_seen = (0, 0)
        self.round_rate = 0.0

    def mended(self, current: list[int]) -> list[int]:
        """Leases with every slot at a live worker; a newcomer waits for the next `check`."""
        if not self._declared.plans:
            return []
        live = [state.member.incarnation for state in self._workers()]
        if self._declared.is_loader:
            slots = self._declared.slots
            return current if len(current) == slots else live[:slots]
        if not live or (current and all(who in live for who in current)):
            return current
        speeds = self._speeds()
        if self._declared.policy is not Policy.PREDICTIVE:
            speeds = dict.fromkeys(live, 1)
        return leases.lay_out(leases.counts(self._declared.slots, speeds))

    def repaired(self, previous: Leases, wanted: list[int]) -> Leases:
        """Leases of the rounds before the newest leases begin, without workers that are gone."""
        live = [state.member.incarnation for state in self._workers()]
        if not live or self._declared.is_loader or all(who in live for who in previous.workers):
            return previous
        pairs = zip(previous.workers, wanted, strict=True)
        workers = [before if before in live else after for before, after in pairs]
        return Leases(previous.from_round, workers)

    def check(self, now_ns: int, current: list[int]) -> Leases | None:
        """Better leases, from the first round on that they can be in time for, or None."""
        self._measure_rate(now_ns)
        self._measure_lags(now_ns)
        if self._declared.is_loader or not self._workers():
            return None
        if self._declared.policy is not Policy.PREDICTIVE:
            wanted = self._evenly(current)
            return None if wanted == current else Leases(self._soonest_round(), wanted)
        idle = [s for s in self._workers() if s.member.incarnation not in current]
        for state in idle:
            state.slot_time_ns = int(state.slot_time_ns * UNMEASURED_DECAY)
        speeds = self._speeds()
        wanted = leases.lay_out(leases.counts(self._declared.slots, speeds))
        is_untimed = len(current) >= len(speeds) and any(s.slot_time_ns == 0 for s in idle)
        if wanted == current or not (is_untimed or leases.is_worth_it(current, wanted, speeds)):
            return None
        return Leases(self._soonest_round(), wanted)

    def _soonest_round(self) -> int:
        """The first round that new leases can be in time for."""
        return self._round_seen[0] + int(self.round_rate * LEASE_LEAD_MS / 1e3) + 1

    def _evenly(self, current: list[int]) -> list[int]:
        """Leases that do not follow speed: equal shares again if somebody has joined."""
        live = [state.member.incarnation for state in self._workers()]
        if self._declared.policy is Policy.QUEUE and self._declared.is_asynchronous:
            return self._dealt(current)
        if len(live) > len(current) or all(who in current for who in live):
            return current
        return leases.lay_out(leases.counts(self._declared.slots, dict.fromkeys(live, 1)))

    def _dealt(self, current: list[int]) -> list[int]:
        """Leases in which each idle worker has half of what another one has not begun.

        Half, not one, since a heartbeat passes until it can have more. What a worker has that hangs
        counts as not begun.
        """
        wanted = list(current)
        beats = {s.member.incarnation: s.beat for s in self._workers() if s.beat is not None}
        spare = {
            who: [slot for slot in beat.spare if slot < len(current) and current[slot] == who]
            for who, beat in beats.items()
        }
        for who in self._hung():
            spare[who] = [slot for slot, other in enumerate(current) if other == who]
        for who in [who for who, beat in beats.items() if beat.is_idle]:
            richest = max(spare, key=lambda other: len(spare[other]), default=who)
            for _ in range(-(-len(spare.get(richest, [])) // 2)):
                wanted[spare[richest].pop()] = who
        return wanted

    def _hung(self) -> list[int]:
        """Workers that take far longer for a slot than others did at best."""
        workers = self._workers()
        least = [state.least_ns for state in workers if state.least_ns]
        if not least:
            return []
        limit_ns = HUNG_FACTOR * sum(least) // len(least)
        return [state.member.incarnation for state in workers if state.slot_time_ns > limit_ns]

    def help(
        self, now_ns: int, late: RoundLate, view: View
    ) -> list[tuple[MemberState, Grant | Flush]]:
        """Give missing slots of a late round to workers that owe none, where that helps."""
        is_newest = late.round >= view.leases.from_round
        current = (view.leases if is_newest else view.previous).workers
        is_static = self._declared.policy is Policy.STATIC
        is_any_round = not self._declared.is_asynchronous
        if self._declared.is_loader or is_static or not current or not is_any_round:
            return []
        missing = late.missing or range(self._declared.active_slots(late.round))
        owners = {slot: current[slot] for slot in missing if slot < len(current)}
        found: list[tuple[MemberState, Grant | Flush]] = []
        for who, slot in self._backups.grants(now_ns, late.round, owners, self._speeds()):
            found.append((self._roster.by_incarnation[who], Grant(late.round, [slot])))
        if self._backups.has_any(late.round, owners):
            owing = [s for s in self._workers() if s.member.incarnation in owners.values()]
            found += [(state, Flush(late.round)) for state in owing]
        return found

    def unfinished(self, late: RoundLate, current: list[int]) -> str:
        """Why a late round can never be complete, empty if it can.

        With own loaders nobody else computes a slot, so all must have the same number of rounds.
        """
        if not self._declared.is_loader:
            return ""
        for slot in late.missing:
            state = self._roster.by_incarnation.get(current[slot] if slot < len(current) else 0)
            if state is None or state.outcome is not Outcome.DONE:
                continue
            if late.round >= (state.beat.round if state.beat else 0):
                text = f"round {late.round} lacks slot {slot} of {state.name}, which is done"
                return f"{text}: own loaders must all have the same number of rounds"
        return ""

    def contradiction(self, view: View, phase: Phase) -> str:
        """What of a view contradicts the rest of what is known, empty if nothing."""
        live = [state.member.incarnation for state in self._workers()]
        is_leasing = self._declared.plans and live and not self._declared.is_loader
        if phase is Phase.RUNNING and is_leasing:
            holders = [*view.leases.workers, *view.previous.workers]
            if any(who not in live for who in holders):
                return "a slot is leased to a worker that is gone"
            if len(view.leases.workers) != self._declared.slots:
                return "the leases do not cover the slots"
        views = [max(place.view, place.chain_view) for t in view.tables for place in t.shards]
        return "a shard's view lies in the future" if max(views, default=0) > view.number else ""

    def _workers(self) -> list[MemberState]:
        return self._roster.live(Role.WORKER)

    def _speeds(self) -> dict[int, int]:
        times = {s.member.incarnation: max(s.slot_time_ns, s.lag_ns) for s in self._workers()}
        least = [s.least_ns for s in self._workers() if s.least_ns]
        if self._declared.is_asynchronous and least:  # without backup tasks, should all others hang
            usual = UNTIMED_FACTOR * sum(least) // len(least)
            times = {who: time_ns or usual for who, time_ns in times.items()}
        return leases.speeds(times)

    def _measure_lags(self, now_ns: int) -> None:
        """Who cannot get a version that others have, a server being out of reach, counts as slow.

        It computes nothing meanwhile, so that no slow slot would show, and answers the scheduler.
        One that does go on may be many rounds behind here, its heartbeat being older, also after a
        lull in which all were in one round for long: only heartbeats count that came after others
        had gone on. And where slots are at rounds of their own, nothing follows from who is how
        far.
        """
        if self._declared.is_asynchronous:
            return
        newest = self._round_seen[0]
        for state in self._workers():
            is_behind = state.beat is not None and 0 < state.beat.round < newest - ROUNDS_APART_MAX
            state.left_ns = (state.left_ns or now_ns) if is_behind else 0
            state.lag_ns = max(0, state.beat_ns - state.left_ns) if is_behind else 0

    def _measure_rate(self, now_ns: int) -> None:
        rounds = [state.beat.round for state in self._workers() if state.beat is not None]
        newest = max(rounds, default=0)
        seen, at_ns = self._round_seen
        if newest > seen:
            self.round_rate = (newest - seen) * 1e9 / max(1, now_ns - at_ns)
        self._round_seen = (newest, now_ns)
