"""The data plan: which samples of an epoch belong to which slot of which round.

Everyone derives the same plan from the same few numbers, so nobody has to be asked. A round's
samples are dealt to the slots as evenly as possible, the first slots taking one more where it does
not come out even; so slot 0 always has samples, and the slots without any (in a short last round)
are the last ones.

Where data is split into data shards, each slot has shards of its own, one after the other, and of
each round a batch of one of them. Slots with more batches come first, so that here too the slots
that have samples in a round are the first ones.
"""

from bisect import bisect_left
from enum import IntEnum
from operator import neg
from typing import Annotated

import msgspec
from msgspec import Meta

from treefold.common.errors import DataError

SLOTS_MAX = 65_536  # 16 levels of the fold tree
DATA_SHARDS_MAX = 1_000_000  # of one slot

Count = Annotated[int, Meta(ge=0, le=1 << 62)]
Signed = Annotated[int, Meta(ge=-(1 << 62), le=1 << 62)]


class PlanKind(IntEnum):
    """How the samples of a round reach the workers."""

    SLOTS = 1  # `batches`: slots are leased, any worker may compute any of them
    LOADER = 2  # the user's own loader: each worker is one slot and stays it


class Policy(IntEnum):
    """What moves slots, and with them data shards, from one worker to another.

    Slots of workers that are gone are given to others in any case.
    """

    PREDICTIVE = 1  # shares in proportion to forecast speed, and help for what is late
    QUEUE = 2  # equal shares; a worker that is done with its own takes one that nobody has begun
    STATIC = 3  # equal shares


Shards = Annotated[list[Count], Meta(max_length=DATA_SHARDS_MAX)]


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
    policy : Policy
        What moves slots.
    lengths : list of int
        With data shards, how many rounds each slot takes part in, in descending order.
    shards : list of list of int
        Samples of the data shards of each slot, in their order; empty if samples are dealt evenly.
    is_shared : bool
        Whether all slots have the same samples, each of them some features.

    Raises
    ------
    DataError
        The rounds are not those that the samples make, or the shards do not fit.
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
    policy: Policy = Policy.PREDICTIVE
    lengths: Annotated[list[Count], Meta(max_length=SLOTS_MAX)] = []
    shards: Annotated[list[Shards], Meta(max_length=SLOTS_MAX)] = []
    is_shared: bool = False

    def __post_init__(self) -> None:
        """Check what concerns several fields at once."""
        if self.shards:
            self._check_shards()
            return
        rounds = 0 if self.kind is PlanKind.LOADER else -(-self.samples // self.batch_size)
        if self.rounds != rounds:
            msg = (
                f"a plan of {self.rounds} rounds; {self.samples} samples in rounds of "
                f"{self.batch_size} make {rounds}"
            )
            raise DataError(msg)

    def _check_shards(self) -> None:
        """Refuse shards that are not those of the slots, in the order of their batches."""
        if self.kind is PlanKind.LOADER or len(self.shards) != self.slots:
            raise DataError(f"data shards of {len(self.shards)} slots in a plan of {self.slots}")
        if self.batch_size % self.slots:
            text = f"a batch_size of {self.batch_size} is no multiple of {self.slots} slots"
            raise DataError(f"{text}, each of which has data shards of its own")
        lengths = batches(self.shards, self.batch_size)
        if lengths != self.lengths or sorted(lengths, reverse=True) != lengths:
            raise DataError(f"slots have {lengths} batches, not {self.lengths} in descending order")
        if lengths[0] != self.rounds:
            raise DataError(f"slot 0 has {lengths[0]} batches in a plan of {self.rounds} rounds")
        if sum(map(sum, self.shards)) != self.samples:
            raise DataError(f"data shards have other than {self.samples} samples together")

    @property
    def ends(self) -> list[int]:
        """The round after the last one that each slot takes part in; empty without data shards."""
        return [self.first_round + length for length in self.lengths]

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
        if self.shards:
            active = range(self.active_slots(round_))
            return sum(stop - start for _, start, stop in (self.place(round_, s) for s in active))
        start = (round_ - self.first_round) * self.batch_size
        return min(self.batch_size, self.samples - start)

    def active_slots(self, round_: int) -> int:
        """Slots of round ``round_`` that have samples: always the first so many."""
        if self.shards:
            return bisect_left(self.lengths, self.first_round - round_, key=neg)
        return min(self.slots, self.round_samples(round_))

    def slot_samples(self, round_: int, slot: int) -> int:
        """How many samples ``slot`` computes in ``round_``."""
        start, stop = self.place(round_, slot)[1:] if self.shards else self.slot_range(round_, slot)
        return stop - start

    def place(self, round_: int, slot: int) -> tuple[int, int, int]:
        """Which of its data shards a slot computes in a round, and ``[start, stop)`` of that."""
        size = self.batch_size // self.slots
        number = round_ - self.first_round
        for shard, samples in enumerate(self.shards[slot]):
            count = -(-samples // size)
            if number < count:
                start = number * size
                return shard, start, min(samples, start + size)
            number -= count
        return len(self.shards[slot]), 0, 0

    def slot_range(self, round_: int, slot: int) -> tuple[int, int]:
        """Positions ``[start, stop)`` in the pass's order that ``slot`` computes in ``round_``.

        Without data shards.
        """
        start = (round_ - self.first_round) * self.batch_size
        each, more = divmod(self.round_samples(round_), self.slots)
        first = start + slot * each + min(slot, more)
        return first, first + each + (slot < more)


def batches(shards: list[list[int]], batch_size: int) -> list[int]:
    """How many batches the data shards of each slot have.

    Parameters
    ----------
    shards : list of list of int
        Samples of the data shards of each slot.
    batch_size : int
        Samples of a round over all slots.
    """
    size = max(1, batch_size // len(shards))
    return [sum(-(-shard // size) for shard in own) for own in shards]
