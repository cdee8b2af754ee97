"""The data plan: which samples of an epoch belong to which slot of which round.

Everyone derives the same plan from the same few numbers, so nobody has to be asked. A round's
samples are dealt to the slots as evenly as possible, the first slots taking one more where it does
not come out even; so slot 0 always has samples, and the slots without any (in a short last round)
are the last ones.
"""

from enum import IntEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from treefold.common.errors import DataError

SLOTS_MAX = 65_536  # 16 levels of the fold tree

Count = Annotated[int, Meta(ge=0, le=1 << 62)]
Signed = Annotated[int, Meta(ge=-(1 << 62), le=1 << 62)]


class PlanKind(IntEnum):
    """How the samples of a round reach the workers."""

    SLOTS = 1  # `batches`: slots are leased, any worker may compute any of them
    LOADER = 2  # the user's own loader: each worker is one slot and stays it


class LoopPlan(msgspec.Struct, frozen=True, array_like=True):
    """One pass over a data set: rounds ``[first_round, first_round + rounds)`` of the job.

    Attributes
    ----------
    kind : PlanKind
        Whether slots are leased or tied to workers.
    index : int
        How many passes the script began before this one.
    first_round, rounds : int
        Where the pass lies in the job; ``rounds`` is 0 for an own loader, whose length is unknown.
    slots : int
        V, the slots of a round.
    samples : int
        Samples of the whole pass (0 for an own loader).
    batch_size : int
        Samples of one round over all slots (equal to ``slots`` for an own loader).
    epoch : int
        What the user called this pass; with the job seed it fixes the order of the samples.
    shuffle : bool
        Whether that order is a permutation or the data set's own.
    seed : int
        The sampler's seed.

    Raises
    ------
    DataError
        The rounds are not those that the samples make.
    """

    kind: PlanKind
    index: Count
    first_round: Count
    rounds: Count
    slots: Annotated[int, Meta(ge=1, le=SLOTS_MAX)]
    samples: Count
    batch_size: Annotated[int, Meta(ge=1, le=1 << 62)]
    epoch: Signed
    shuffle: bool
    seed: Signed

    def __post_init__(self) -> None:
        """Check what concerns several fields at once."""
        rounds = 0 if self.kind is PlanKind.LOADER else -(-self.samples // self.batch_size)
        if self.rounds != rounds:
            msg = (
                f"a plan of {self.rounds} rounds; {self.samples} samples in rounds of "
                f"{self.batch_size} make {rounds}"
            )
            raise DataError(msg)

    @property
    def end_round(self) -> int:
        """The round after the last one of this pass."""
        return self.first_round + self.rounds

    def is_over(self, round_: int) -> bool:
        """Whether a job that is at this round has the pass behind it."""
        return self.kind is PlanKind.SLOTS and round_ >= self.end_round

    def round_samples(self, round_: int) -> int:
        """Samples of round ``round_`` over all slots; fewer than a batch in a short last round."""
        if self.kind is PlanKind.LOADER:
            return self.slots
        start = (round_ - self.first_round) * self.batch_size
        return min(self.batch_size, self.samples - start)

    def active_slots(self, round_: int) -> int:
        """Slots of round ``round_`` that have samples: always the first so many."""
        return min(self.slots, self.round_samples(round_))

    def slot_range(self, round_: int, slot: int) -> tuple[int, int]:
        """Positions ``[start, stop)`` in the pass's order that ``slot`` computes in ``round_``."""
        start = (round_ - self.first_round) * self.batch_size
        each, more = divmod(self.round_samples(round_), self.slots)
        first = start + slot * each + min(slot, more)
        return first, first + each + (slot < more)
