"""Bugs to plant in chains of servers, in the scheduler's steps, and in its journal."""

import msgspec

from tests.sim.planting import AnyCore, Patch, change_output, plant
from tests.sim.scenario import Theme
from treefold.scheduler import memory
from treefold.scheduler.chains import Chains
from treefold.scheduler.core import SchedulerCore
from treefold.scheduler.effects import Persist
from treefold.server import core as server_core
from treefold.server.chains import Chain
from treefold.server.copies import Copies
from treefold.server.core import ServerCore
from treefold.server.effects import LoadUnit
from treefold.server.holding import Shard
from treefold.server.replication import Replication
from treefold.wire.words import ShardPlace
from treefold.worker.core import WorkerCore
from treefold.worker.effects import Retire
from treefold.worker.pulls import Table


@plant(Theme.CHAINED)
def a_version_is_told_before_the_chain_has_applied_it(patch: Patch) -> None:
    patch.setattr(Chain, "holds", lambda *_: True)


@plant(Theme.CHAINED)
def backups_acknowledge_before_they_have_applied(patch: Patch) -> None:
    on_round = Replication.on_round

    def hasty(self: Replication, now_ns: int, peer: object, shard: Shard, message: object) -> None:
        if shard.chain.is_started and not shard.chain.is_primary:
            shard.version += 1
            self._answer_applied(shard, peer)
            shard.version -= 1
        on_round(self, now_ns, peer, shard, message)  # type: ignore[arg-type]  # as it came

    patch.setattr(Replication, "on_round", hasty)


@plant(Theme.CHAINED, 100)
def nothing_is_fenced_by_views(patch: Patch) -> None:
    patch.setattr(server_core, "refusal_of_view", lambda *_: None)


@plant(Theme.CHAINED)
def an_unsynced_backup_is_promoted(patch: Patch) -> None:
    without = Chains._without_dead

    def careless(self: Chains, key: tuple[int, int], place: ShardPlace) -> ShardPlace | None:
        live = [who for who in [*place.backups, *place.joining] if who in self._live()]
        if place.server not in self._live() and live:
            return msgspec.structs.replace(place, server=live[-1], backups=live[:-1], joining=[])
        return without(self, key, place)

    patch.setattr(Chains, "_without_dead", careless)


@plant(Theme.CHAINED)
def a_member_counts_as_in_sync_when_half_is_copied(patch: Patch) -> None:
    copy = Copies.copy

    def half(self: Copies, now_ns: int, shard: Shard) -> None:
        copy(self, now_ns, shard)
        for who, copying in shard.chain.copies.items():
            if len(copying.since) * 2 > shard.units_count:
                shard.chain.applied[who] = max(shard.chain.applied[who], shard.version)
                self._tell_synced(now_ns, shard, who)

    patch.setattr(Copies, "copy", half)


@plant(Theme.CHAINED)
def a_copied_unit_takes_no_part_in_the_rounds_that_follow(patch: Patch) -> None:
    takes = Chain.takes

    def deaf(self: Chain, who: int, unit: int, round_: int) -> bool:
        return who not in self.copies and takes(self, who, unit, round_)

    patch.setattr(Chain, "takes", deaf)


@plant(Theme.CHAINED)
def a_unit_is_copied_after_its_step_and_sent_as_of_before(patch: Patch) -> None:
    begin = Copies._begin_copy

    def mistaken(self: Copies, now_ns: int, shard: Shard, who: int, unit: int) -> None:
        begin(self, now_ns, shard, who, unit)
        shard.chain.copies[who].since[unit] = shard.version

    patch.setattr(Copies, "_begin_copy", mistaken)


@plant(Theme.CHAINED)
def the_version_before_is_not_copied(patch: Patch) -> None:
    def poor(_: AnyCore, __: object, effects: list[object]) -> list[object]:
        return [
            msgspec.structs.replace(effect, is_older_kept=False)
            if isinstance(effect, LoadUnit)
            else effect
            for effect in effects
        ]

    change_output(patch, ServerCore, poor)


@plant(Theme.CHAINED)
def a_promoted_server_leads_on_as_if_nothing_had_changed(patch: Patch) -> None:
    adopt = Chain.adopt

    def meek(self: Chain, place: ShardPlace) -> None:
        was_primary, view = self.is_primary, self.view
        adopt(self, place)
        if view and self.is_primary and not was_primary:
            self.primary = 0

    patch.setattr(Chain, "adopt", meek)


@plant(Theme.CHAINED)
def a_round_that_a_backup_lacks_is_not_sent_again(patch: Patch) -> None:
    patch.setattr(Replication, "on_lacking", lambda *_: None)


@plant(Theme.CHAINED, 200)
def roots_are_let_go_before_the_chain_has_them(patch: Patch) -> None:
    patch.setattr(Chain, "keeps_roots", property(lambda _: False))


@plant(Theme.CHAINED)
def workers_do_not_ask_a_new_primary(patch: Patch) -> None:
    settle = Table.settle

    def deaf(self: Table, place: object) -> list[int]:
        before = self.place
        moved = settle(self, place)  # type: ignore[arg-type]  # as it came
        if moved:
            self.place = before
        return []

    patch.setattr(Table, "settle", deaf)


@plant(Theme.CHAINED, 150)
def lent_memory_is_written_to_although_a_server_was_replaced(patch: Patch) -> None:
    def forgetful(_: AnyCore, __: object, effects: list[object]) -> list[object]:
        return [effect for effect in effects if not isinstance(effect, Retire)]

    change_output(patch, WorkerCore, forgetful)


@plant(Theme.CHAINED)
def the_journal_is_written_after_members_were_told(patch: Patch) -> None:
    def late(_: AnyCore, __: object, effects: list[object]) -> list[object]:
        records = [effect for effect in effects if isinstance(effect, Persist)]
        return [effect for effect in effects if not isinstance(effect, Persist)] + records

    change_output(patch, SchedulerCore, late)


@plant(Theme.CHAINED)
def views_are_not_written_down(patch: Patch) -> None:
    patch.setattr(memory.Memory, "_of_chains", lambda *_: iter(()))


@plant(Theme.CHAINED)
def a_promoted_server_speaks_of_its_version_at_once(patch: Patch) -> None:
    patch.setattr(Shard, "can_tell", lambda *_: True)
