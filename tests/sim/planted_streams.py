"""Bugs to plant in what begins before all of its version is here."""

from tests.sim.planting import Patch, plant
from tests.sim.scenario import Theme
from tests.sim.trainer import Trainer
from treefold.server.rounds import Round
from treefold.worker import streams
from treefold.worker.core import WorkerCore
from treefold.worker.exchange import Exchange
from treefold.worker.pulls import ShardPull, Table
from treefold.worker.sending import Sending
from treefold.worker.streams import Stream


@plant(Theme.STREAMING)
def a_body_begins_before_what_goes_with_its_version_is_known(patch: Patch) -> None:
    def begun(table: Table, version: int) -> bool:
        pulls = table.pulls.values()
        return bool(pulls) and all(p.version == version for p in pulls) and table.are_buffers_here

    patch.setattr(streams, "_is_begun", begun)


@plant(Theme.STREAMING)
def a_body_begins_before_its_buffers_are_here(patch: Patch) -> None:
    patch.setattr(Table, "are_buffers_here", True)


@plant(Theme.STREAMING)
def servers_say_that_a_version_has_begun_without_its_state(patch: Patch) -> None:
    patch.setattr(Round, "is_begun", property(lambda current: bool(current.made)))


@plant(Theme.STREAMING)
def contributions_are_sent_before_their_version_is_whole(patch: Patch) -> None:
    patch.setattr(Stream, "is_held_back", lambda *_: False)


@plant(Theme.STREAMING)
def what_was_held_back_is_never_sent(patch: Patch) -> None:
    patch.setattr(Sending, "push_all", lambda *_: None)
    patch.setattr(Exchange, "on_status", lambda *_: None)


@plant(Theme.STREAMING)
def the_round_before_is_let_go_when_the_next_begins(patch: Patch) -> None:
    begin = Stream.begin

    def hasty(self: Stream, now_ns: int, version: int) -> object:
        found = begin(self, now_ns, version)
        if self.older is not None:
            self._release(self.older)
            self.older = None
        return found

    patch.setattr(Stream, "begin", hasty)


@plant(Theme.STREAMING, 150)
def nobody_turns_back_for_slots_that_are_missing(patch: Patch) -> None:
    patch.setattr(WorkerCore, "_turn_back", lambda *_: None)


@plant(Theme.STREAMING, 150)
def a_body_that_does_not_count_is_contributed(patch: Patch) -> None:
    def turn_back(self: Stream, now_ns: int, slots: list[int]) -> int | None:
        del now_ns
        if self.older is None:
            return None
        self.older.assign(slots)
        return None

    patch.setattr(Stream, "turn_back", turn_back)


@plant(Theme.STREAMING, 100)
def a_part_that_was_overwritten_is_computed_with(patch: Patch) -> None:
    patch.setattr(Trainer, "is_part_intact", lambda *_: True)


@plant(Theme.LAGGING)
def parts_of_a_newer_version_are_handed_on(patch: Patch) -> None:
    taken = Stream.on_taken

    def blind(self: Stream, now_ns: int, *, is_newer: bool) -> None:
        del is_newer
        taken(self, now_ns, is_newer=False)

    patch.setattr(Stream, "on_taken", blind)


@plant(Theme.STREAMING)
def a_part_is_handed_on_twice(patch: Patch) -> None:
    hand_on = Stream._hand_on

    def twice(self: Stream, table: Table, shard: int, pull: ShardPull) -> None:
        again = list(pull.fresh)
        hand_on(self, table, shard, pull)
        pull.fresh += again[:1]

    patch.setattr(Stream, "_hand_on", twice)
