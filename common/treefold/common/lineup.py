"""Which batches a round has that may go on without the last slots, and what it leaves behind.

A batch is what one slot computes in one round of the plan. Rounds try those of the plan one round
after the other. What came too late for its round is computed again: as soon as there are as many
such batches as slots, or at the end of the pass, a round is made of them instead. So rounds of the
job and of the plan are not the same numbers, and a pass has more rounds than its plan. But who
knows a version, with what goes with it, knows the batches of the round that begins with it.
"""

from collections.abc import Collection
from typing import NamedTuple

from treefold.common.plan import LoopPlan
from treefold.common.round_state import Progress

Batch = tuple[int, int]
"""Round of the plan, and slot."""


class Lineup(NamedTuple):
    """The batches of a round, by slot, and whether each of them was late before."""

    batches: list[Batch]
    is_again: bool


def lineup(plan: LoopPlan, progress: Progress) -> Lineup:
    """What the round has that begins with a version; nothing if the pass is over.

    Parameters
    ----------
    plan : LoopPlan
        The pass, with leased slots.
    progress : Progress
        What goes with the version.
    """
    if progress.next > plan.end_round:  # others are in a later pass
        return Lineup([], is_again=False)
    round_, again = max(progress.next, plan.first_round), progress.again
    if again and (round_ == plan.end_round or len(again) >= plan.slots):
        return Lineup(again[: plan.slots], is_again=True)
    if round_ == plan.end_round:
        return Lineup([], is_again=False)
    return Lineup([(round_, slot) for slot in range(plan.active_slots(round_))], is_again=False)


def after(
    progress: Progress, tried: Lineup, slots: Collection[int], record: bytes, *, is_requeued: bool
) -> Progress:
    """What goes with the version that a round makes.

    Parameters
    ----------
    progress : Progress
        What went with the version before.
    tried : Lineup
        The batches of the round.
    slots : collection of int
        The slots that are in.
    record : bytes
        What the first of them left.
    is_requeued : bool
        Whether batches of the others are computed again.
    """
    late = [batch for slot, batch in enumerate(tried.batches) if slot not in slots]
    older = progress.again[len(tried.batches) :] if tried.is_again else progress.again
    next_ = progress.next if tried.is_again else tried.batches[0][0] + 1
    again = [*older, *late] if is_requeued else older
    return Progress(next_, again, progress.missed + len(late), record)
