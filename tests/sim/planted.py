"""Bugs to plant in the cores, each of which the simulator has to find.

Most change what goes into or comes out of `handle`. `tests.sim.found` has those that were there,
`tests.sim.planted_parts` those in what is done part by part.
"""

from itertools import pairwise

import msgspec

from tests.sim.planting import (
    AnyCore,
    Patch,
    change_input,
    change_output,
    message_of,
    no_backup_tasks,
    plant,
)
from tests.sim.scenario import Theme
from treefold.common.tree import FoldSet, Merge, Node
from treefold.scheduler import balance, leases
from treefold.scheduler.core import SchedulerCore
from treefold.scheduler.norms import NormBook
from treefold.server import exchange as server_exchange
from treefold.server import rounds as server_rounds
from treefold.server.core import ServerCore
from treefold.server.effects import PartsRef, ReleasePayload
from treefold.server.rounds import Held, Round
from treefold.wire.decisions import NormDecision, NormReport
from treefold.wire.exchange import Received, Send, Tick
from treefold.wire.messages import Pull, Push, RoundStatus, View
from treefold.worker import rounds as worker_rounds
from treefold.worker.core import WorkerCore
from treefold.worker.effects import Effect, FoldPayloads, SlotFinished
from treefold.worker.effects import ReleasePayload as WorkerRelease
from treefold.worker.exchange import Exchange
from treefold.worker.pulls import ShardPull, Table
from treefold.worker.rounds import Held as WorkerHeld
from treefold.worker.rounds import LocalPart, LocalRound, Pushed

# ---- the server ----------------------------------------------------------------------------------


@plant(Theme.MIXED)
def no_duplicate_check(patch: Patch) -> None:
    class Gullible(FoldSet[Held]):
        def covers(self, node: Node) -> bool:
            del node
            return False

    patch.setattr(server_rounds, "FoldSet", Gullible)


@plant(Theme.DYING)
def leases_taken_for_ownership(patch: Patch) -> None:
    owners: dict[int, list[int]] = {}

    handle = ServerCore.handle

    def changed(self: ServerCore, now_ns: int, event: Received) -> list[object]:
        message = message_of(event)
        if isinstance(message, View):
            owners[id(self)] = message.leases.workers
        held = owners.get(id(self), [])
        slot = message.index << message.level if isinstance(message, Push) else 0
        if not isinstance(message, Push) or message.round < 0 or slot >= len(held):
            return list(handle(self, now_ns, event))
        if held[slot] == message.sender:
            return list(handle(self, now_ns, event))
        refused = [ReleasePayload(payload) for payload in event.payloads]
        return [*refused, *handle(self, now_ns, Tick())]

    patch.setattr(ServerCore, "handle", changed)


@plant(Theme.MIXED)
def published_before_every_root_is_there(patch: Patch) -> None:
    def is_complete(self: Round) -> bool:
        return bool(self.made) and (self.meta is not None or self.number < 0)

    patch.setattr(Round, "is_complete", property(is_complete))


@plant(Theme.MIXED)
def published_without_meta(patch: Patch) -> None:
    def is_complete(self: Round) -> bool:
        return self.active > 0 and len(self.made) == len(self.pieces)

    patch.setattr(Round, "is_complete", property(is_complete))


@plant(Theme.MIXED)
def folded_in_arrival_order(patch: Patch) -> None:
    class Hasty(FoldSet[Held]):
        def add(self, node: Node, handle: Held) -> tuple[list[Merge[Held]], list[Held]] | None:
            added = super().add(node, handle)
            if added is None:
                return None
            merges, late = [], handle
            for merge in added[0]:
                first = merge.left if merge.right is late else merge.right
                merges.append(Merge(first, late, merge.parent))
                late = first
                self.nodes[merge.parent] = first
            for inner, _ in pairwise(merges):
                self.nodes.pop(inner.parent, None)
            return merges, added[1]

    patch.setattr(server_rounds, "FoldSet", Hasty)


@plant(Theme.MIXED)
def a_pull_is_answered_with_the_version_before(patch: Patch) -> None:
    def older(self: AnyCore, event: object, effects: list[object]) -> list[object]:
        del event
        assert isinstance(self, ServerCore)
        for at, effect in enumerate(effects):
            if isinstance(effect, Send) and isinstance(effect.payload, PartsRef):
                ref = effect.payload
                if ref.version - 1 in self.shards[ref.table, ref.shard].kept:
                    effects[at] = msgspec.structs.replace(
                        effect, payload=msgspec.structs.replace(ref, version=ref.version - 1)
                    )
        return effects

    change_output(patch, ServerCore, older)


@plant(Theme.MIXED)
def a_pull_of_the_next_version_is_answered_at_once(patch: Patch) -> None:
    def impatient(self: AnyCore, event: object) -> object:
        assert isinstance(self, ServerCore)
        message = message_of(event)
        if not isinstance(event, Received) or not isinstance(message, Pull):
            return event
        shard = self.shards.get((message.table, message.shard))
        if shard is None or shard.version < 0:
            return event
        version = min(message.version, shard.version)
        return msgspec.structs.replace(
            event, message=msgspec.structs.replace(message, version=version)
        )

    change_input(patch, ServerCore, impatient)


@plant(Theme.MIXED)
def duplicates_are_not_released(patch: Patch) -> None:
    def leaky(self: AnyCore, event: object, effects: list[object]) -> list[object]:
        del self
        payloads = event.payloads if isinstance(event, Received) else ()
        released = [ReleasePayload(payload) for payload in payloads]
        return [effect for effect in effects if effect not in released]

    change_output(patch, ServerCore, leaky)


@plant(Theme.MIXED)
def round_statuses_name_no_parts(patch: Patch) -> None:
    patch.setattr(server_exchange, "STATUS_PARTS_MAX", 0)


@plant(Theme.MIXED)
def views_are_taken_in_any_order(patch: Patch) -> None:
    def careless(self: AnyCore, event: object) -> object:
        message = message_of(event)
        if isinstance(self, ServerCore) and isinstance(message, View):
            self.view = min(self.view, message.number - 1)
        return event

    change_input(patch, ServerCore, careless)


@plant(Theme.MIXED)
def a_deadline_stays_in_the_past(patch: Patch) -> None:
    deadline = ServerCore.next_deadline_ns

    def late(self: ServerCore) -> int | None:
        held = [s.published_ns + 1 for s in self.shards.values() if s.version > 0]
        return min([*held, deadline(self) or 0])

    patch.setattr(ServerCore, "next_deadline_ns", late)


# ---- the worker ----------------------------------------------------------------------------------


@plant(Theme.MIXED)
def folded_into_what_was_pushed(patch: Patch) -> None:
    def push_ready(self: LocalRound, part: LocalPart) -> list[Pushed]:
        held = [pushed.node for pushed in part.pushed]
        ready = [n for n in part.fold.nodes if n not in held and not self._can_grow(part, n)]
        pushed = [Pushed(node, part.fold.nodes[node]) for node in ready]
        part.pushed += pushed
        return pushed

    patch.setattr(LocalRound, "_push_ready", push_ready)
    patch.setattr(WorkerCore, "check_invariants", lambda _: None)


@plant(Theme.MIXED)
def folded_the_wrong_way_round(patch: Patch) -> None:
    def swapped(left: int, right: int) -> FoldPayloads:
        return FoldPayloads(right, left)

    patch.setattr(worker_rounds, "FoldPayloads", swapped)


@plant(Theme.MIXED)
def a_pushed_payload_is_released_at_once(patch: Patch) -> None:
    def careless(self: AnyCore, event: object, effects: list[object]) -> list[object]:
        del self, event
        sends = [e.payload for e in effects if isinstance(e, Send) and isinstance(e.payload, tuple)]
        pushed = dict.fromkeys(payload for payloads in sends for payload in payloads)
        return [*effects, *(WorkerRelease(payload) for payload in pushed)]

    change_output(patch, WorkerCore, careless)


@plant(Theme.MIXED)
def nothing_is_pushed_again(patch: Patch) -> None:
    def deaf(self: AnyCore, event: object) -> object:
        del self
        message = message_of(event)
        return Tick() if isinstance(message, RoundStatus) and message.round >= 0 else event

    change_input(patch, WorkerCore, deaf)


@plant(Theme.MIXED)
def nothing_is_pulled_again(patch: Patch) -> None:
    def silent(self: Exchange, now_ns: int) -> None:
        for table in self.tables.values():
            for pull in table.pulls.values():
                pull.deadline_ns = max(pull.deadline_ns, now_ns + 10**12)

    patch.setattr(Exchange, "retry", silent)


@plant(Theme.MIXED)
def meta_is_taken_from_any_slot(patch: Patch) -> None:
    finish = Exchange.finish

    def eager(self: Exchange, event: SlotFinished) -> None:
        finish(self, event)
        local = self.local
        if local is None or event.round != local.number:
            return
        for table in self.trained():
            local.metas[table.number, event.slot] = event.metas[table.number]
            for shard in table.place.shards if table.place else []:
                self.sending.send_meta(table, shard.shard, local, event.slot)

    patch.setattr(Exchange, "finish", eager)


@plant(Theme.MIXED)
def slots_without_samples_take_part(patch: Patch) -> None:
    assign = LocalRound.assign

    def generous(self: LocalRound, slots: list[int]) -> None:
        self.active = max([self.active, *(slot + 1 for slot in slots)])
        for part in self.parts.values():
            part.fold.active = self.active
        assign(self, slots)

    patch.setattr(LocalRound, "assign", generous)


@plant(Theme.LAGGING)
def a_torn_read_is_taken_for_a_version(patch: Patch) -> None:
    def all_is_well(self: Exchange, now_ns: int, table: Table) -> bool:
        del self, now_ns, table
        return True

    patch.setattr(Exchange, "is_consistent", all_is_well)


@plant(Theme.LAGGING)
def parts_of_two_versions_are_mixed(patch: Patch) -> None:
    take = ShardPull.take

    def mix(self: ShardPull, *rest: object) -> None:
        version = rest[0].version  # type: ignore[attr-defined]  # a Pulled
        if self.got and version > self.version:
            self.version = version
        take(self, *rest)  # type: ignore[arg-type]  # passed on as they came

    patch.setattr(ShardPull, "take", mix)


@plant(Theme.DYING)
def leases_are_read_once_a_round(patch: Patch) -> None:
    assign = LocalRound.assign

    def once(self: LocalRound, slots: list[int]) -> None:
        if not self.assigned:
            assign(self, slots)

    patch.setattr(LocalRound, "assign", once)


@plant(Theme.MIXED)
def a_slot_is_computed_again(patch: Patch) -> None:
    next_slot = LocalRound.next_slot

    def again(self: LocalRound) -> int | None:
        slot = next_slot(self)
        return slot if slot is not None or not self.done else max(self.done)

    patch.setattr(LocalRound, "next_slot", again)


@plant(Theme.MIXED)
def marks_of_absence_are_joined(patch: Patch) -> None:
    contribute = LocalRound.contribute

    def joined(
        self: LocalRound, key: tuple[int, int], slot: int, leaf: WorkerHeld, effects: list[Effect]
    ) -> list[Pushed]:
        before = {id(held): held.absent for held in self.parts[key].fold.nodes.values()}
        found = contribute(self, key, slot, leaf, effects)
        for held in [*self.parts[key].fold.nodes.values(), *(pushed.held for pushed in found)]:
            held.absent |= before.get(id(held), 0)
        return found

    patch.setattr(LocalRound, "contribute", joined)


# ---- the scheduler -------------------------------------------------------------------------------


@plant(Theme.MIXED)
def the_last_slot_is_leased_to_nobody(patch: Patch) -> None:
    lay_out = leases.lay_out
    patch.setattr(leases, "lay_out", lambda given: lay_out(given)[:-1])
    patch.setattr(SchedulerCore, "check_invariants", lambda _: None)


@plant(Theme.MIXED)
def a_norm_is_decided_without_every_shard(patch: Patch) -> None:
    add = NormBook.add

    def hasty(self: NormBook, report: NormReport, shards: int) -> NormDecision | None:
        return add(self, report, max(1, shards - 1))

    patch.setattr(NormBook, "add", hasty)


@plant(Theme.DYING)
def leases_of_the_dead_stay(patch: Patch) -> None:
    mended = balance.Balance.mended

    def kept(self: balance.Balance, current: list[int]) -> list[int]:
        return current or mended(self, current)

    patch.setattr(balance.Balance, "mended", kept)
    no_backup_tasks(patch)


@plant(Theme.MIXED)
def view_numbers_fall(patch: Patch) -> None:
    def falling(self: AnyCore, event: object) -> object:
        if isinstance(self, SchedulerCore) and self.view.number == 7:
            self.view = msgspec.structs.replace(self.view, number=4)
        return event

    change_input(patch, SchedulerCore, falling)
    patch.setattr(SchedulerCore, "check_invariants", lambda _: None)
