"""The data plan: which samples of an epoch belong to which slot of which round.

Everyone derives the same plan from the same few numbers, so nobody has to be asked. A round's samples
are dealt to the slots as evenly as possible, the first slots taking one more where it does not come out
even; so slot 0 always has samples, and the slots without any (in a short last round) are the last ones.
"""

from enum import IntEnum

import msgspec


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
    """

    kind: PlanKind
    index: int
    first_round: int
    rounds: int
    slots: int
    samples: int
    batch_size: int
    epoch: int
    shuffle: bool
    seed: int

    @property
    def end_round(self) -> int:
        """The round after the last one of this pass."""
        return self.first_round + self.rounds

    def round_samples(self, round_: int) -> int:
        """Samples of round ``round_`` over all slots; smaller than the batch in a short last round."""
        if self.kind is PlanKind.LOADER:
            return self.slots
        start = (round_ - self.first_round) * self.batch_size
        return min(self.batch_size, self.samples - start)

    def active_slots(self, round_: int) -> int:
        """Slots of round ``round_`` that have samples: always the first so many."""
        return min(self.slots, self.round_samples(round_))

    def slot_range(self, round_: int, slot: int) -> tuple[int, int]:
        """Positions ``[start, stop)`` in the pass's order that slot ``slot`` computes in ``round_``."""
        start = (round_ - self.first_round) * self.batch_size
        each, more = divmod(self.round_samples(round_), self.slots)
        first = start + slot * each + min(slot, more)
        return first, first + each + (slot < more)
