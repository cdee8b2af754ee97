"""Bugs to plant in checkpoints and in the way back to them."""

from types import SimpleNamespace
from typing import Any

import msgspec

from tests.sim.planting import AnyCore, Patch, change_input, plant
from tests.sim.scenario import Theme
from treefold.scheduler.checkpoints import Checkpoints
from treefold.scheduler.effects import Effect as SchedulerEffect
from treefold.server import core as server_core
from treefold.server.core import ServerCore
from treefold.server.effects import SaveShard
from treefold.wire.exchange import Received
from treefold.wire.membership import MS
from treefold.wire.messages import View
from treefold.worker.core import WorkerCore


@plant(Theme.SAVED, 500)
def a_checkpoint_counts_before_all_tables_are_declared(patch: Patch) -> None:
    write = Checkpoints.write

    def hasty(self: Checkpoints, *rest: object) -> list[SchedulerEffect]:
        declared = self._declared
        tables = [table for table in declared.tables if table.place is not None]
        plans: dict[int, object] = {**declared.plans} or {-1: None}
        self._declared = SimpleNamespace(tables=tables, plans=plans)  # type: ignore[assignment]  # it is enough
        try:
            return write(self, *rest)  # type: ignore[arg-type]  # as they came
        finally:
            self._declared = declared

    patch.setattr(Checkpoints, "write", hasty)
    manifest = Checkpoints._manifest

    def bare(self: Checkpoints, *rest: object) -> object:
        self._declared.plans.pop(-1, None)
        return manifest(self, *rest)  # type: ignore[arg-type]  # as they came

    patch.setattr(Checkpoints, "_manifest", bare)


@plant(Theme.SAVED)
def a_shard_is_saved_when_the_server_finds_the_time(patch: Patch) -> None:
    handle: Any = ServerCore.handle
    late: dict[int, list[tuple[int, SaveShard]]] = {}

    def handled(self: ServerCore, now_ns: int, event: object) -> list[object]:
        found = list(handle(self, now_ns, event))
        waiting = late.setdefault(id(self), [])
        waiting += [(now_ns + 200 * MS, one) for one in found if isinstance(one, SaveShard)]
        due = [one for due_ns, one in waiting if due_ns <= now_ns]
        waiting[:] = [pair for pair in waiting if pair[0] > now_ns]
        is_open = [one for one in due if (one.table, one.shard) in self.shards]
        return [one for one in found if not isinstance(one, SaveShard)] + is_open

    patch.setattr(ServerCore, "handle", handled)


@plant(Theme.SAVED)
def a_server_takes_part_before_it_is_restored(patch: Patch) -> None:
    opened = ServerCore._open_shards

    def hasty(self: ServerCore, now_ns: int) -> None:
        opened(self, now_ns)
        for shard in self.shards.values():
            if not shard.chain.is_joining:
                shard.chain.is_started = True

    patch.setattr(ServerCore, "_open_shards", hasty)


@plant(Theme.SAVED)
def nothing_of_before_the_way_back_is_fenced(patch: Patch) -> None:
    patch.setattr(server_core, "refusal_of_view", lambda *_: None)


@plant(Theme.SAVED)
def servers_keep_their_shards_when_the_job_goes_back(patch: Patch) -> None:
    def keep(self: ServerCore) -> None:
        self.exchange.saves.forget()

    patch.setattr(ServerCore, "_begin_anew", keep)


@plant(Theme.SAVED)
def workers_do_not_see_that_the_job_has_gone_back(patch: Patch) -> None:
    def blind(_: AnyCore, event: object) -> object:
        if isinstance(event, Received) and isinstance(event.message, View):
            message = msgspec.structs.replace(event.message, era=0)
            return Received(event.peer, message, event.payloads)
        return event

    change_input(patch, WorkerCore, blind)
