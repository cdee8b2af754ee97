"""Bugs to plant where contributions are applied one by one."""

from msgspec.structs import replace

from tests.sim.planting import AnyCore, Patch, change_output, plant
from tests.sim.scenario import Theme
from treefold.common.plan import LoopPlan
from treefold.server import asynchronous as server_asynchronous
from treefold.server.asynchronous import Asynchronous
from treefold.server.core import ServerCore
from treefold.server.holding import Shard, Staged, Wait
from treefold.wire.exchange import Send
from treefold.wire.messages import RoundStatus
from treefold.wire.words import Need
from treefold.worker import aligned
from treefold.worker import asynchronous as worker_asynchronous
from treefold.worker.asynchronous import Asynchronous as WorkerAsynchronous

# ---- the server ----------------------------------------------------------------------------------


@plant(Theme.APART)
def what_is_in_is_applied_again(patch: Patch) -> None:
    def stage(self: Asynchronous, shard: Shard, round_: int, slot: int, sender: int) -> Staged:
        del self
        staged = shard.staged.get((slot, sender))
        if staged is None or staged.round != round_:
            staged = shard.staged[slot, sender] = Staged(round_, slot, sender)
        return staged

    def clock(self: Shard, slot: int) -> int:
        del self, slot
        return 0

    patch.setattr(Asynchronous, "_stage", stage)
    patch.setattr(Shard, "clock", clock)


@plant(Theme.APART)
def what_is_in_the_round_before_is_staged_again(patch: Patch) -> None:
    drop = Asynchronous._drop

    def changed(self: Asynchronous, shard: Shard, key: tuple[int, int]) -> None:
        if shard.staged[key].round >= shard.clock(key[0]):
            drop(self, shard, key)

    patch.setattr(Asynchronous, "_drop", changed)


@plant(Theme.APART, 50)
def parts_of_two_workers_are_mixed(patch: Patch) -> None:
    stage = Asynchronous._stage

    def changed(
        self: Asynchronous, shard: Shard, round_: int, slot: int, sender: int
    ) -> Staged | None:
        known = [one for key, one in shard.staged.items() if key[0] == slot]
        if known and known[0].round == round_:
            return known[0]
        return stage(self, shard, round_, slot, sender)

    patch.setattr(Asynchronous, "_stage", changed)


@plant(Theme.APART)
def a_pull_is_answered_before_what_it_needs_is_in(patch: Patch) -> None:
    patch.setattr(server_asynchronous, "_is_met", lambda *_: True)
    patch.setattr(Wait, "is_met", lambda *_: True)


@plant(Theme.APART)
def another_primary_goes_on_with_half_a_version(patch: Patch) -> None:
    patch.setattr(Shard, "begin_round_anew", lambda _: [])


@plant(Theme.APART)
def a_backup_does_not_know_what_is_in(patch: Patch) -> None:
    learn = Shard._learn

    def changed(self: Shard) -> None:
        if self.chain.is_primary:
            learn(self)

    patch.setattr(Shard, "_learn", changed)


# ---- the worker ----------------------------------------------------------------------------------


@plant(Theme.APART)
def a_slot_may_be_one_round_too_far_ahead(patch: Patch) -> None:
    floor = WorkerAsynchronous._floor
    patch.setattr(WorkerAsynchronous, "_floor", lambda *given: max(0, floor(*given) - 1))
    patch.setattr(server_asynchronous, "_refusal", lambda *_: None)


@plant(Theme.APART)
def a_pass_ends_one_round_early(patch: Patch) -> None:
    end_of = worker_asynchronous._end_of

    def changed(plan: LoopPlan) -> Need:
        need = end_of(plan)
        return replace(need, floor=max(0, need.floor - 1))

    patch.setattr(worker_asynchronous, "_end_of", changed)


@plant(Theme.APART)
def a_pass_ends_with_the_slots_of_its_last_round(patch: Patch) -> None:
    end_of = worker_asynchronous._end_of

    def changed(plan: LoopPlan) -> Need:
        need, active = end_of(plan), plan.active_slots(plan.end_round - 1)
        return replace(need, active=active, slots=active) if plan.shards else need

    patch.setattr(worker_asynchronous, "_end_of", changed)


@plant(Theme.APART)
def a_slot_that_has_no_more_rounds_is_waited_for_beyond_its_end(patch: Patch) -> None:
    patch.setattr(LoopPlan, "ends", [])


@plant(Theme.APART, 250)
def a_slot_that_has_come_here_is_waited_for(patch: Patch) -> None:
    ask = WorkerAsynchronous._ask_for

    def changed(self: WorkerAsynchronous, now_ns: int, need: Need) -> None:
        tables = self._rounds.trained()
        if all(not table.pulls or table.is_pulled for table in tables):
            ask(self, now_ns, need)

    patch.setattr(WorkerAsynchronous, "_ask_for", changed)


@plant(Theme.APART)
def a_version_that_lacks_the_workers_own_is_good_enough(patch: Patch) -> None:
    wanted = WorkerAsynchronous._wanted

    def changed(
        self: WorkerAsynchronous, plan: LoopPlan, leased: list[int], *, is_draining: bool = False
    ) -> Need:
        need = wanted(self, plan, leased, is_draining=is_draining)
        if self._pushed is None:
            return need
        self._rounds.drop_round()
        lacking = need.slot + 1 - min(map(len, self._clocks.values()), default=0)
        for known in self._clocks.values():
            known.extend([0] * lacking)
            known[need.slot] = need.clock
        self._pushed = None
        return replace(need, slot=0, clock=0)

    patch.setattr(WorkerAsynchronous, "_wanted", changed)


@plant(Theme.APART)
def what_is_too_stale_is_applied(patch: Patch) -> None:
    patch.setattr(server_asynchronous, "_staleness", lambda *_: 0)


@plant(Theme.APART)
def what_is_too_stale_is_made_anew_before_all_shards_have_spoken(patch: Patch) -> None:
    def changed(self: WorkerAsynchronous, now_ns: int, status: RoundStatus) -> None:
        if self._pushed in [(status.round, slot) for one in status.missing for slot in one.slots]:
            self._rounds.drop_round()
            self._pushed = None
            self._ask_for(now_ns, Need(0, 0))

    patch.setattr(WorkerAsynchronous, "on_too_stale", changed)


@plant(Theme.APART)
def nobody_is_told_that_it_is_too_stale(patch: Patch) -> None:
    def changed(core: AnyCore, event: object, effects: list[object]) -> list[object]:
        del core, event
        return [
            one
            for one in effects
            if not (
                isinstance(one, Send)
                and isinstance(one.message, RoundStatus)
                and one.message.is_stale
            )
        ]

    change_output(patch, ServerCore, changed)


@plant(Theme.APART)
def shards_are_read_as_they_are(patch: Patch) -> None:
    patch.setattr(aligned, "_padded", lambda *_: [])
