"""Bugs to plant where only some tables have rounds."""

from tests.sim.planting import Patch, no_backup_tasks, plant
from tests.sim.scenario import Theme
from treefold.common.tree import Node
from treefold.server import asynchronous as server_asynchronous
from treefold.server.holding import Shard
from treefold.wire.messages import Pull, RoundStatus
from treefold.wire.words import Need
from treefold.worker import exchange
from treefold.worker.asynchronous import Asynchronous
from treefold.worker.exchange import Exchange
from treefold.worker.pulls import ShardPull, Table
from treefold.worker.rounds import LocalPart, LocalRound
from treefold.worker.streams import Rounds, torn_version


@plant(Theme.BESIDE)
def rounds_are_left_before_all_is_in_every_table(patch: Patch) -> None:
    patch.setattr(Asynchronous, "before", lambda *_: None)


@plant(Theme.BESIDE)
def who_joins_begins_with_what_was_there_then(patch: Patch) -> None:
    patch.setattr(Asynchronous, "has_all_before", lambda *_: True)


@plant(Theme.BESIDE)
def who_is_behind_goes_on_with_what_was_asked_for_then(patch: Patch) -> None:
    patch.setattr(Asynchronous, "is_met", lambda *_: True)


@plant(Theme.BESIDE)
def slots_are_folded_for_tables_that_have_no_rounds(patch: Patch) -> None:
    can_grow = LocalRound._can_grow

    def changed(self: LocalRound, part: LocalPart, node: Node) -> bool:
        part.is_apart = False
        return can_grow(self, part, node)

    patch.setattr(LocalRound, "_can_grow", changed)


@plant(Theme.BESIDE)
def nobody_is_told_what_is_lacking(patch: Patch) -> None:
    def changed(shard: Shard, pull: Pull, need: Need) -> RoundStatus:
        del pull, need
        return RoundStatus(shard.table, shard.number, 0, [], is_meta_missing=False)

    patch.setattr(server_asynchronous, "_status", changed)


@plant(Theme.BESIDE, 2300)
def a_round_that_is_lost_to_one_table_is_not_computed_again(patch: Patch) -> None:
    def changed(rounds: Rounds, late: list[ShardPull]) -> int | None:
        return torn_version(rounds, [pull for pull in late if pull.need is None])

    no_backup_tasks(patch)
    patch.setattr(exchange, "torn_version", changed)


@plant(Theme.BESIDE, 150)
def a_table_without_rounds_is_asked_for_no_more_when_a_round_is_loaded_anew(patch: Patch) -> None:
    pull = Exchange.pull

    def changed(self: Exchange, now_ns: int, table: Table, version: int, attempt: int) -> None:
        if attempt or not table.spec.is_asynchronous or table.held >= 0:
            pull(self, now_ns, table, version, attempt)

    patch.setattr(Exchange, "pull", changed)
