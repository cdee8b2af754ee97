"""Rounds that go on without the last slots, as a worker sees them.

Part of `treefold.worker.core` in a file of its own; just as pure.
"""

from collections.abc import Sequence

from treefold.common.lineup import Lineup, lineup
from treefold.common.plan import LoopPlan
from treefold.worker.pulls import Table
from treefold.worker.rounds import LocalRound


def tried(tables: Sequence[Table], plan: LoopPlan) -> Lineup | None:
    """The batches of the round that begins with the version held; None where rounds are the plan's.

    Parameters
    ----------
    tables : sequence of Table
        Those that have rounds.
    plan : LoopPlan
        The pass over the data.
    """
    progress = next((table.progress for table in tables if table.spec.is_quorum), None)
    return None if progress is None else lineup(plan, progress)


def begun(
    tables: Sequence[Table], plan: LoopPlan, position: int, parts: dict[int, int]
) -> LocalRound:
    """A worker's share of the round at a version, with the ``parts`` of each table."""
    batches = tried(tables, plan)
    local = LocalRound(position, plan, parts, batches)
    if batches is None and any(table.spec.is_guarded for table in tables):
        local.take_apart()
    return local


def is_over(tables: Sequence[Table], plan: LoopPlan, version: int) -> bool:
    """Whether a job that is at this version has the pass behind it."""
    batches = tried(tables, plan)
    return plan.is_over(version) if batches is None else not batches.batches


def end_round(tables: Sequence[Table], version: int) -> int:
    """How far the job is in its plans at a version, as a round of theirs."""
    return next((table.progress.next for table in tables if table.spec.is_quorum), version)
