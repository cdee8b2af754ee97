"""Samples of a slot: read in this process, or ahead of time in loader processes; the same bits.

A slot's samples are read under a seed of their own, so that it does not matter where and when.
Which slots this worker will compute is only foreseen; what was read in vain is dropped, what was
not foreseen is read on the spot.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from treefold.common.plan import LoopPlan
from treefold.torch.randomness import seed_for_data

Collate = Callable[[list[object]], object]


@runtime_checkable
class MapStyle(Protocol):
    """A data set whose samples are numbered, as torch's map-style ones."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def __getitem__(self, index: int, /) -> object:
        """Sample ``index``."""
        ...


@dataclass(frozen=True, slots=True)
class Read:
    """What is to be read: the samples of one slot of one round."""

    round: int
    slot: int
    samples: list[int]

    @property
    def key(self) -> tuple[int, int]:
        """Round and slot."""
        return self.round, self.slot


class Order:
    """Which samples each slot of a pass has.

    Parameters
    ----------
    plan : LoopPlan
        The pass.
    indices : Tensor, int64 [n]
        The samples in the order of the pass; None for the data set's own order.
    """

    def __init__(self, plan: LoopPlan, indices: Tensor | None) -> None:
        self.plan = plan
        self._indices = indices

    def read(self, round_: int, slot: int) -> Read:
        """The samples of one slot of one round."""
        start, stop = self.plan.slot_range(round_, slot)
        if self._indices is None:
            return Read(round_, slot, list(range(start, stop)))
        samples: list[int] = self._indices[start:stop].tolist()
        return Read(round_, slot, samples)


class SlotReader(Dataset[object]):
    """Reads the samples of a slot; copied into every loader process.

    Parameters
    ----------
    dataset : map-style data set
        The user's.
    collate : callable or None
        Makes a batch of samples; torch's ``default_collate`` if None.
    seed : int
        The job's.
    """

    def __init__(self, dataset: MapStyle, collate: Collate | None, seed: int) -> None:
        self._dataset = dataset
        self._collate: Collate = default_collate if collate is None else collate
        self._seed = seed

    def read(self, what: Read) -> object:
        """One batch, read under the seed of its round and slot."""
        seed_for_data(self._seed, what.round, what.slot)
        several: Callable[[Sequence[int]], list[object]] | None
        several = getattr(self._dataset, "__getitems__", None)
        if several is not None:
            return self._collate(several(what.samples))
        return self._collate([self._dataset[index] for index in what.samples])

    def __getitem__(self, what: Read) -> tuple[Read, object]:
        return what, self.read(what)


class _Foreseen(Sampler[Read]):
    """Asks, whenever a loader process is free, what to read next."""

    def __init__(self, following: Callable[[], Iterator[Read]]) -> None:
        self._following = following

    def __iter__(self) -> Iterator[Read]:
        return self._following()


class Source:
    """Batches of one pass, slot by slot.

    Parameters
    ----------
    reader : SlotReader
        Reads.
    order : Order
        Says what.
    processes : int
        Loader processes; 0 reads everything in this one.
    slots : list of int
        The slots that this worker will probably compute.

    Attributes
    ----------
    reads_ahead : int
        How many batches came from loader processes.
    """

    def __init__(self, reader: SlotReader, order: Order, processes: int, slots: list[int]) -> None:
        self._reader = reader
        self._order = order
        self._processes = processes
        self._slots = slots
        self._seen: list[int] = []
        self._round = -1
        self._asked: deque[tuple[int, int]] = deque()
        self._early: dict[tuple[int, int], object] = {}
        self._loader: Iterator[tuple[Read, object]] | None = None
        self.reads_ahead = 0

    def take(self, what: Read, *, is_again: bool = False) -> object:
        """The batch of a slot; one that ``is_again`` says nothing of those that come next."""
        if is_again:
            return self._reader.read(what)
        self._note(what)
        if self._processes and self._loader is None:
            self._loader = iter(self._make_loader())
        while self._asked and self._asked[0][0] < self._round:  # in vain: they would stay for good
            self._receive()
        while what.key not in self._early and what.key in self._asked:
            self._receive()
        if what.key in self._early:
            self.reads_ahead += 1
            return self._early.pop(what.key)
        return self._reader.read(what)

    def close(self) -> None:
        """End the loader processes."""
        self._loader = None
        self._early.clear()

    def _note(self, what: Read) -> None:
        """Learn from the slots of one round which ones the next will have."""
        if what.round != self._round:
            self._slots = sorted(self._seen) or self._slots
            self._seen = []
            self._round = what.round
            for key in [key for key in self._early if key[0] < self._round]:
                del self._early[key]
        self._seen.append(what.slot)
        if what.slot not in self._slots:
            self._slots = sorted([*self._slots, what.slot])

    def _receive(self) -> None:
        if self._loader is None:
            return
        self._asked.popleft()
        read, batch = next(self._loader)
        if read.round >= self._round:
            self._early[read.key] = batch

    def _following(self) -> Iterator[Read]:
        """What this worker will probably need, in that order, as far as known at each moment."""
        plan = self._order.plan
        round_ = self._round
        while round_ < plan.end_round:
            for slot in list(self._slots):
                is_past = round_ < self._round or (round_ == self._round and slot in self._seen)
                if slot < plan.active_slots(round_) and not is_past:
                    self._asked.append((round_, slot))
                    yield self._order.read(round_, slot)
            round_ = max(round_ + 1, self._round)

    def _make_loader(self) -> DataLoader[tuple[Read, object]]:
        return DataLoader(
            self._reader,  # type: ignore[arg-type] # its items are pairs of what was read and the batch
            batch_size=None,
            sampler=_Foreseen(self._following),
            num_workers=self._processes,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # torch draws from it, and not from the script's own
        )


def _as_it_is(item: object) -> object:
    return item
