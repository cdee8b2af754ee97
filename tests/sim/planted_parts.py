"""Bugs to plant in what is done part by part, in shared memory, or before a round is over."""

from tests.sim.memory import Gradients
from tests.sim.planting import AnyCore, Patch, change_output, plant
from tests.sim.scenario import Theme
from tests.sim.trainer import Trainer
from treefold.server import answers
from treefold.server.core import ServerCore
from treefold.server.effects import ReleaseVersion
from treefold.server.exchange import Exchange as ServerExchange
from treefold.server.holding import Shard, Wait
from treefold.server.rounds import Arrived, Held, HyperOf, Round
from treefold.wire.exchange import Peer, Send
from treefold.wire.messages import Published, Pulled, RoundHyper, RoundMeta
from treefold.worker.effects import Effect, HyperKnown, Task
from treefold.worker.exchange import Exchange
from treefold.worker.pulls import ShardPull
from treefold.worker.rounds import LocalRound

# ---- versions and their memory -------------------------------------------------------------------


@plant(Theme.DYING)
def the_version_before_is_released_with_the_next_one(patch: Patch) -> None:
    def hasty(self: AnyCore, event: object, effects: list[object]) -> list[object]:
        del event
        assert isinstance(self, ServerCore)
        for (table, number), shard in self.shards.items():
            for old in [version for version in shard.kept if version < shard.version]:
                del shard.kept[old]
                effects.append(ReleaseVersion(table, number, old))
        return effects

    change_output(patch, ServerCore, hasty)


@plant(Theme.MIXED)
def the_version_before_is_released_when_the_next_is_whole(patch: Patch) -> None:
    release, publish = ServerExchange.release_oldest, ServerExchange._publish
    patch.setattr(ServerExchange, "release_oldest", lambda *_: None)

    def late(self: ServerExchange, now_ns: int, shard: Shard, current: Round) -> None:
        release(self, shard, current)
        publish(self, now_ns, shard, current)

    patch.setattr(ServerExchange, "_publish", late)


@plant(Theme.LAGGING)
def memory_that_was_overwritten_is_read_all_the_same(patch: Patch) -> None:
    patch.setattr(Trainer, "is_intact", lambda *_: True)


@plant(Theme.LAGGING)
def a_torn_read_is_not_followed_by_another(patch: Patch) -> None:
    patch.setattr(Exchange, "begin_anew", lambda *_: None)


@plant(Theme.LAGGING)
def a_torn_read_is_followed_by_what_is_on_its_way(patch: Patch) -> None:
    def keep(self: Exchange, now_ns: int, position: int) -> None:
        for table in self.trained():
            if not table.pulls:
                self.pull(now_ns, table, position, attempt=0)

    patch.setattr(Exchange, "begin_anew", keep)


# ---- parts that are made early -------------------------------------------------------------------


@plant(Theme.MIXED)
def parts_that_were_made_are_made_again(patch: Patch) -> None:
    make = ServerExchange._make_parts

    def twice(self: ServerExchange, shard: Shard, current: Round) -> None:
        make(self, shard, current)
        if current.number >= 0:
            current.rooted.update(dict.fromkeys(current.made))

    patch.setattr(ServerExchange, "_make_parts", twice)


@plant(Theme.MIXED)
def parts_are_stepped_with_what_the_round_before_stepped_with(patch: Patch) -> None:
    publish = Shard.publish

    def inherit(self: Shard, now_ns: int, done: Round) -> None:
        publish(self, now_ns, done)
        if self.round is not None and done.meta is not None:
            self.round.hyper = done.hyper

    patch.setattr(Shard, "publish", inherit)


@plant(Theme.MIXED)
def early_hyper_parameters_have_no_limit_of_the_norm(patch: Patch) -> None:
    on_hyper = ServerExchange.on_hyper

    def limitless(
        self: ServerExchange, now_ns: int, peer: Peer, shard: Shard, message: RoundHyper | RoundMeta
    ) -> None:
        current = shard.round
        is_due = current is not None and current.number == message.round
        if current is not None and current.hyper is None and is_due:
            current.hyper = HyperOf(message.groups, 0.0)
        on_hyper(self, now_ns, peer, shard, message)

    patch.setattr(ServerExchange, "on_hyper", limitless)


@plant(Theme.MIXED)
def early_hyper_parameters_come_from_any_slot(patch: Patch) -> None:
    def any_slot(self: Exchange, event: HyperKnown) -> None:
        local = self.local
        if local is None or event.round != local.number:
            return
        table = self.tables[event.table]
        local.hypers[event.table] = event
        for shard in table.place.shards if table.place else []:
            self.sending.send_hyper(table, shard.shard, local)

    patch.setattr(Exchange, "know_hyper", any_slot)


@plant(Theme.MIXED)
def tensors_that_stay_whole_are_stepped_part_by_part(patch: Patch) -> None:
    patch.setattr(Shard, "is_whole", property(lambda _: False))


# ---- runs, and the word that a version is whole --------------------------------------------------


@plant(Theme.MIXED)
def payloads_of_a_run_are_taken_from_its_end(patch: Patch) -> None:
    def held(self: Arrived, number: int) -> Held:
        absent = self.push.absent
        mask = int.from_bytes(absent[number], "little") if absent else 0
        return Held(self.payloads[-1 - number] if self.payloads else None, mask)

    patch.setattr(Arrived, "held", held)


@plant(Theme.MIXED)
def marks_of_a_run_are_those_of_its_first_part(patch: Patch) -> None:
    held = Arrived.held

    def first(self: Arrived, number: int) -> Held:
        found = held(self, number)
        found.absent = held(self, 0).absent
        return found

    patch.setattr(Arrived, "held", first)


@plant(Theme.MIXED)
def a_run_of_pulled_parts_begins_one_part_later(patch: Patch) -> None:
    take = ShardPull.take

    def shifted(
        self: ShardPull, pulled: Pulled, payloads: tuple[int, ...], effects: list[Effect]
    ) -> None:
        take(self, pulled, payloads[1:] + payloads[:1], effects)

    patch.setattr(ShardPull, "take", shifted)


@plant(Theme.MIXED)
def word_of_any_version_makes_a_pull_whole(patch: Patch) -> None:
    def finish(self: ShardPull, published: Published, effects: list[Effect]) -> None:
        del effects
        self.is_whole = True
        self.state, self.norm = published.state, published.norm

    patch.setattr(ShardPull, "finish", finish)


@plant(Theme.MIXED)
def a_version_is_here_with_its_last_part(patch: Patch) -> None:
    def is_complete(self: ShardPull) -> bool:
        return len(self.got) == self.parts_count

    patch.setattr(ShardPull, "is_complete", property(is_complete))


@plant(Theme.LAGGING)
def word_of_an_older_version_outlives_its_parts(patch: Patch) -> None:
    move_up = ShardPull._move_up

    def forgetful(self: ShardPull, version: int, effects: list[Effect]) -> None:
        was_whole = self.is_whole
        move_up(self, version, effects)
        self.is_whole = was_whole

    patch.setattr(ShardPull, "_move_up", forgetful)


@plant(Theme.MIXED)
def who_waits_is_sent_parts_again(patch: Patch) -> None:
    def send(peer: Peer, shard: Shard, waiting: Wait, parts: list[int]) -> list[Send]:
        return answers._parts(peer, shard, waiting.version, parts)

    patch.setattr(answers, "_take", send)


@plant(Theme.MIXED)
def who_asks_late_is_not_sent_what_was_made_before(patch: Patch) -> None:
    wait = answers.wait

    def deaf(peer: Peer, shard: Shard, new: Wait) -> list[Send]:
        wait(peer, shard, new)
        return []

    patch.setattr(answers, "wait", deaf)


# ---- gradients that are lent ---------------------------------------------------------------------


@plant(Theme.MIXED)
def a_third_slot_writes_where_the_first_lent(patch: Patch) -> None:
    lendable = Trainer.is_lendable

    def generous(self: Trainer, task: Task, is_in_use: bool) -> bool:
        del is_in_use
        return lendable(self, task, is_in_use=False)

    patch.setattr(Trainer, "is_lendable", generous)


@plant(Theme.MIXED)
def a_slot_writes_where_the_one_before_lent(patch: Patch) -> None:
    begin = Gradients.begin_slot
    patch.setattr(Gradients, "begin_slot", lambda self, _: begin(self, is_in_use=False))


@plant(Theme.MIXED)
def what_is_kept_for_another_slot_is_lent(patch: Patch) -> None:
    begin = Gradients.begin_slot
    patch.setattr(LocalRound, "keeps", lambda *_: False)
    patch.setattr(Gradients, "begin_slot", lambda self, _: begin(self, is_in_use=False))
