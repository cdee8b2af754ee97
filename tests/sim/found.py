"""Bugs that the simulator found in the cores when they were written, planted again.

It found others that are too rare to be found again in the time of a test, at less than one seed in
a hundred: leases of earlier rounds that name a dead worker, a newcomer that waits for a round which
nobody computes any more, farewells of the dead, payloads that a failed pull leaves behind. The core
tests in ``tests/unit`` hold those.
"""

import msgspec

from tests.sim.planting import AnyCore, Patch, change_input, change_output, message_of, plant
from tests.sim.scenario import Theme
from treefold.common.tree import Node
from treefold.scheduler.core import SchedulerCore
from treefold.server.core import ServerCore
from treefold.server.effects import ReadyPart
from treefold.server.rounds import Round
from treefold.wire.exchange import Received, Send, Tick
from treefold.wire.messages import Leave, Pull, Refused, Register, Registered, View
from treefold.wire.words import Code, Outcome
from treefold.worker.core import WorkerCore
from treefold.worker.declarations import CALLS_MAX, Declarations
from treefold.worker.effects import Complete, DeclareCalled, LoopCalled
from treefold.worker.rounds import LocalPart, LocalRound


@plant(Theme.MIXED)
def tables_declared_early_are_never_placed(patch: Patch) -> None:
    place = SchedulerCore.place_tables
    registering: dict[int, bool] = {}

    def watch(self: AnyCore, event: object) -> object:
        registering[id(self)] = isinstance(message_of(event), Register)
        return event

    def lazy(self: SchedulerCore, now_ns: int) -> None:
        if not registering[id(self)]:
            place(self, now_ns)

    change_input(patch, SchedulerCore, watch)
    patch.setattr(SchedulerCore, "place_tables", lazy)


@plant(Theme.MIXED)
def a_view_is_used_up_before_our_own_name_is_known(patch: Patch) -> None:
    def early(self: AnyCore, event: object) -> object:
        message = message_of(event)
        if not isinstance(self, ServerCore) or not isinstance(message, View):
            return event
        if self.membership.incarnation == 0:
            self.view = max(self.view, message.number)
        return event

    change_input(patch, ServerCore, early)


@plant(Theme.MIXED)
def a_server_without_a_job_refuses_workers(patch: Patch) -> None:
    def strict(self: AnyCore, event: object, effects: list[object]) -> list[object]:
        assert isinstance(self, ServerCore)
        if not isinstance(event, Received) or self.membership.job:
            return effects
        if not isinstance(event.message, Pull):
            return effects
        return [*effects, Send(event.peer, Refused(0, Code.JOB_MISMATCH, "another job"))]

    change_output(patch, ServerCore, strict)


@plant(Theme.FENCED)
def who_never_heard_its_name_cannot_ask_again(patch: Patch) -> None:
    def once(self: AnyCore, event: object) -> object:
        message = message_of(event)
        if isinstance(self, SchedulerCore) and isinstance(message, Register):
            state = self.roster.by_nonce(message.nonce)
            if state is not None and not state.is_live:
                return Tick()
        return event

    change_input(patch, SchedulerCore, once)


@plant(Theme.FENCED)
def contributions_bear_the_newest_incarnation(patch: Patch) -> None:
    def renamed(self: AnyCore, event: object) -> object:
        assert isinstance(self, WorkerCore)
        self.membership.origin = self.membership.incarnation
        return event

    change_input(patch, WorkerCore, renamed)


@plant(Theme.DYING)
def a_node_waits_for_a_sibling_that_is_gone(patch: Patch) -> None:
    can_grow = LocalRound._can_grow

    def hopeful(self: LocalRound, part: LocalPart, node: Node) -> bool:
        gone, part.gone = part.gone, {}
        found = can_grow(self, part, node)
        part.gone = gone
        return found

    patch.setattr(LocalRound, "_can_grow", hopeful)


@plant(Theme.ENDING)
def tables_are_declared_once(patch: Patch) -> None:
    patch.setattr(Declarations, "renew", Declarations.announce)


@plant(Theme.MIXED)
def a_join_waits_for_the_next_view(patch: Patch) -> None:
    def forgetful(self: AnyCore, event: object, effects: list[object]) -> list[object]:
        del self
        if not isinstance(message_of(event), Registered):
            return effects
        return [effect for effect in effects if not isinstance(effect, Complete)]

    change_output(patch, WorkerCore, forgetful)


@plant(Theme.ENDING)
def a_declaration_waits_for_a_scheduler_that_is_gone(patch: Patch) -> None:
    patch.setattr(WorkerCore, "_check_scheduler", lambda *_: None)


@plant(Theme.MIXED, 150)
def an_own_loader_is_missed_by_its_last_heartbeat(patch: Patch) -> None:
    def suspicious(self: AnyCore, event: object) -> object:
        message = message_of(event)
        if not isinstance(self, SchedulerCore) or not isinstance(message, Leave):
            return event
        state = self.roster.by_incarnation.get(message.incarnation)
        rounds = [s.beat.round for s in self.roster.live() if s.beat is not None]
        last = 0 if state is None or state.beat is None else state.beat.round
        if self.declared.is_loader and max(rounds, default=0) > last:
            assert isinstance(event, Received)
            failed = msgspec.structs.replace(message, outcome=Outcome.FAILED)
            return msgspec.structs.replace(event, message=failed)
        return event

    change_input(patch, SchedulerCore, suspicious)


@plant(Theme.MIXED)
def parts_are_used_in_the_order_in_which_they_came(patch: Patch) -> None:
    def ready(self: Round) -> list[ReadyPart]:
        found = [self.folds[part].ready(part) for part in self.rooted]
        return [part for part in found if part is not None]

    patch.setattr(Round, "ready", ready)


@plant(Theme.FENCED)
def a_table_announced_again_is_declared_again(patch: Patch) -> None:
    def pop(self: Declarations, number: int) -> DeclareCalled | LoopCalled | None:
        call = number % CALLS_MAX
        event = self._pending.pop(call, None)
        if isinstance(event, DeclareCalled):
            self._tables[call] = event
        return event

    patch.setattr(Declarations, "pop", pop)
