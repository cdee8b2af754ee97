"""Bugs to plant where contributions are looked at before they count."""

from msgspec.structs import replace

from tests.sim.planting import Patch, change_output, plant
from tests.sim.scenario import Theme
from treefold.common.round_state import NOTHING_WATCHED
from treefold.scheduler import records
from treefold.scheduler.core import SchedulerCore
from treefold.scheduler.memory import Memory
from treefold.server import guarding
from treefold.server.core import ServerCore
from treefold.server.effects import ScaleParts
from treefold.server.guarding import Guarding
from treefold.server.holding import Shard
from treefold.server.rounds import Round
from treefold.wire.decisions import HealthDecision
from treefold.worker.rounds import LocalRound


@plant(Theme.GUARDED)
def what_is_left_out_is_folded_all_the_same(patch: Patch) -> None:
    fold = Guarding._fold

    def greedy(self: Guarding, shard: Shard, current: Round, decision: HealthDecision) -> None:
        current.decision = replace(decision, coefficients=[1.0] * len(decision.coefficients))
        fold(self, shard, current, decision)

    patch.setattr(Guarding, "_fold", greedy)


@plant(Theme.GUARDED)
def what_is_in_is_not_made_a_mean(patch: Patch) -> None:
    def changed(_: object, __: object, effects: list[object]) -> list[object]:
        return [one for one in effects if not isinstance(one, ScaleParts)]

    change_output(patch, ServerCore, changed)


@plant(Theme.GUARDED)
def what_is_usual_does_not_go_with_the_version(patch: Patch) -> None:
    patch.setattr(guarding, "decode_watched", lambda _: NOTHING_WATCHED)


@plant(Theme.GUARDED)
def workers_fold_what_is_to_be_looked_at(patch: Patch) -> None:
    patch.setattr(LocalRound, "take_apart", lambda _: None)


@plant(Theme.GUARDED, 250)
def what_counts_is_not_written_down(patch: Patch) -> None:
    changes = Memory._changes

    def forgetful(self: Memory, core: SchedulerCore) -> list[records.Record]:
        return [one for one in changes(self, core) if not isinstance(one, records.HealthDecided)]

    patch.setattr(Memory, "_changes", forgetful)
