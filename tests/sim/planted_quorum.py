"""Bugs to plant where rounds go on without the last slots."""

from msgspec.structs import replace

from tests.sim.planting import Patch, change_output, plant
from tests.sim.scenario import Theme
from treefold.common.lineup import after
from treefold.common.round_state import Progress
from treefold.scheduler import records
from treefold.scheduler.core import SchedulerCore
from treefold.scheduler.memory import Memory
from treefold.scheduler.quorums import Quorums
from treefold.server import quorum as server_quorum
from treefold.server.core import ServerCore
from treefold.server.effects import ScaleParts
from treefold.server.gathering import whole
from treefold.server.holding import Shard
from treefold.server.quorum import Quorum
from treefold.server.rounds import Leaf, Round
from treefold.wire.decisions import QuorumDecision
from treefold.wire.messages import Push, RoundMeta
from treefold.worker import rounds as worker_rounds
from treefold.worker.pulls import Table
from treefold.worker.rounds import LocalRound

# ---- the scheduler -------------------------------------------------------------------------------


@plant(Theme.QUORUM, 150)
def what_is_decided_is_not_written_down(patch: Patch) -> None:
    changes = Memory._changes

    def forgetful(self: Memory, core: SchedulerCore) -> list[records.Record]:
        return [one for one in changes(self, core) if not isinstance(one, records.QuorumDecided)]

    patch.setattr(Memory, "_changes", forgetful)


@plant(Theme.QUORUM)
def a_round_is_closed_with_one_slot_too_few(patch: Patch) -> None:
    enough = Quorums._enough
    patch.setattr(Quorums, "_enough", lambda self, due: max(1, enough(self, due) - 1))


@plant(Theme.QUORUM)
def a_round_is_decided_again(patch: Patch) -> None:
    on_report = Quorums.on_report

    def eager(self: Quorums, *arguments: object) -> object:
        self.decided = None
        return on_report(self, *arguments)  # type: ignore[arg-type] # as they came

    patch.setattr(Quorums, "on_report", eager)


@plant(Theme.QUORUM, 450)
def decisions_outlive_a_way_back(patch: Patch) -> None:
    patch.setattr(Quorums, "forget", lambda _: None)


# ---- the server ----------------------------------------------------------------------------------


@plant(Theme.QUORUM)
def all_that_is_here_is_folded(patch: Patch) -> None:
    fold = Quorum._fold

    def greedy(self: Quorum, shard: Shard, current: Round, included: list[int]) -> None:
        del included
        fold(self, shard, current, whole(shard, current))

    def keep(self: Quorum, shard: Shard, decision: QuorumDecision) -> bool:
        del self
        current = shard.round
        if current is None or not current.is_by_leaves or current.number != decision.round:
            return False
        current.included = current.included or decision.slots
        return True

    patch.setattr(Quorum, "_fold", greedy)
    patch.setattr(Quorum, "on_decision", keep)


@plant(Theme.QUORUM)
def what_is_late_is_taken_into_the_next_round(patch: Patch) -> None:
    leaf, turn = Quorum._leaf, Shard.out_of_turn

    def lenient(self: Quorum, shard: Shard, message: Push | RoundMeta, slot: int) -> Leaf | None:
        return leaf(self, shard, replace(message, round=shard.version), slot)

    def no_turn(self: Shard, round_: int, active: int) -> object:
        return None if round_ < self.version else turn(self, round_, active)

    patch.setattr(Quorum, "_leaf", lenient)
    patch.setattr(Shard, "out_of_turn", no_turn)


@plant(Theme.QUORUM)
def what_is_in_counts_for_itself_alone(patch: Patch) -> None:
    def changed(_: object, __: object, effects: list[object]) -> list[object]:
        return [one for one in effects if not isinstance(one, ScaleParts)]

    change_output(patch, ServerCore, changed)


@plant(Theme.QUORUM)
def a_decision_is_taken_for_any_round(patch: Patch) -> None:
    on_decision = Quorum.on_decision

    def lenient(self: Quorum, shard: Shard, decision: QuorumDecision) -> bool:
        number = decision.round if shard.round is None else shard.round.number
        return on_decision(self, shard, replace(decision, round=number))

    patch.setattr(Quorum, "on_decision", lenient)


@plant(Theme.QUORUM)
def what_is_late_is_left_out(patch: Patch) -> None:
    def forgetful(*arguments: object, is_requeued: bool) -> Progress:
        del is_requeued
        return after(*arguments, is_requeued=False)  # type: ignore[arg-type] # as they came

    patch.setattr(server_quorum, "after", forgetful)


# ---- the worker ----------------------------------------------------------------------------------


@plant(Theme.QUORUM)
def workers_fold_what_may_be_left_out(patch: Patch) -> None:
    assign = LocalRound.assign

    def folding(self: LocalRound, slots: list[int]) -> None:
        self.is_flushed = False
        assign(self, slots)

    patch.setattr(worker_rounds.LocalRound, "assign", folding)


@plant(Theme.QUORUM)
def a_worker_knows_the_first_version_alone(patch: Patch) -> None:
    snapshot = Table.snapshot

    def first(self: Table) -> object:
        before, is_known = self.progress, self.held > 0
        found = snapshot(self)
        if is_known:
            self.progress = before
        return found

    patch.setattr(Table, "snapshot", first)
