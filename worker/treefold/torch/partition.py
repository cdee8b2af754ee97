"""Data shards: how a data set is split, which slot gets which of them, and in which order."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from treefold.common.errors import ConfigError
from treefold.common.plan import LoopPlan, Policy
from treefold.torch.randomness import permutation
from treefold.torch.samples import Order, Read

Key = Callable[[int], object]
ORDERS_KEPT = 64  # of data shards; they can be made again
POLICIES = {policy.name.lower(): policy for policy in Policy}


class Partition(Enum):
    """How the samples of a data set are dealt to slots, each of which keeps its own."""

    RANGE = "range"  # each slot a run of them
    ROUND_ROBIN = "round-robin"  # in turn
    HASH = "hash"  # by a key; those with equal keys are in one slot
    FEATURE = "feature"  # all slots all samples, each slot some features of them

    @classmethod
    def of(cls, value: object) -> "Partition":
        """The one that a user named.

        Raises
        ------
        ConfigError
            There is none.
        """
        names = [one.value for one in cls]
        if not isinstance(value, str) or value not in names:
            msg = f"partition={value!r}; it is one of {', '.join(map(repr, names))}"
            raise ConfigError(msg)
        return cls(value)


def policy_of(value: object) -> Policy:
    """The policy that a user named.

    Raises
    ------
    ConfigError
        There is none.
    """
    if not isinstance(value, str) or value not in POLICIES:
        msg = f"policy={value!r}; it is one of {', '.join(map(repr, POLICIES))}"
        raise ConfigError(msg)
    return POLICIES[value]


def split(samples: int, slots: int, partition: Partition, key: Key | None) -> list[Tensor]:
    """The samples of each slot.

    Parameters
    ----------
    samples : int
        Of the data set.
    slots : int
        How many shares to make.
    partition : Partition
        How.
    key : callable or None
        With `Partition.HASH`: what of a sample, given by its number, decides; its number if None.

    Returns
    -------
    list of Tensor, int64
        Numbers of samples in ascending order.

    Raises
    ------
    ConfigError
        A key is no str, bytes or int.
    """
    if partition is Partition.FEATURE:
        return [torch.arange(samples) for _ in range(slots)]
    if partition is Partition.RANGE:
        return list(torch.arange(samples).tensor_split(slots))
    if partition is Partition.ROUND_ROBIN:
        return [torch.arange(slot, samples, slots) for slot in range(slots)]
    shares: list[list[int]] = [[] for _ in range(slots)]
    for sample in range(samples):
        shares[_hashed(sample if key is None else key(sample), sample) % slots].append(sample)
    return [torch.tensor(share, dtype=torch.int64) for share in shares]


def _hashed(key: object, sample: int) -> int:
    """A number that depends on nothing but the key, in any process."""
    if isinstance(key, Tensor) and key.numel() == 1:
        key = key.item()
    if isinstance(key, str | bytes | int) or hasattr(key, "__index__"):
        if not isinstance(key, str | bytes):
            key = str(int(key))
        raw = key.encode() if isinstance(key, str) else key
        return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
    msg = f"key({sample}) is {key!r}, a {type(key).__name__}; it has to be a str, bytes or an int"
    raise ConfigError(msg)


class Dealt(NamedTuple):
    """Data shards, dealt to slots.

    Attributes
    ----------
    numbers : list of list of int
        The shards of each slot, by number.
    sizes : list of list of int
        Their samples.
    """

    numbers: list[list[int]]
    sizes: list[list[int]]


def deal(sizes: Sequence[int], slots: int, batch: int, order: Sequence[int]) -> Dealt:
    """Deal data shards to slots: the largest first, each to the slot with the fewest batches.

    Parameters
    ----------
    sizes : sequence of int
        Samples of each shard; those without any are left out.
    slots : int
        V.
    batch : int
        Samples of a batch of one slot.
    order : sequence of int
        The order in which a slot reads its shards.

    Returns
    -------
    Dealt
        Slots with more batches come first.
    """
    given: list[list[int]] = [[] for _ in range(slots)]
    batches = [0] * slots
    for number in sorted(range(len(sizes)), key=lambda one: (-sizes[one], one)):
        if sizes[number]:
            slot = min(range(slots), key=lambda one: (batches[one], one))
            given[slot].append(number)
            batches[slot] += -(-sizes[number] // batch)
    place = {number: at for at, number in enumerate(order)}
    by_length = sorted(range(slots), key=lambda slot: (-batches[slot], slot))
    numbers = [sorted(given[slot], key=lambda one: place[one]) for slot in by_length]
    return Dealt(numbers, [[sizes[number] for number in own] for own in numbers])


class ShardOrder(Order):
    """Which samples each slot of a pass over data shards has.

    Parameters
    ----------
    plan : LoopPlan
        The pass.
    numbers : list of list of int
        The data shards of each slot.
    samples : callable
        The samples of a data shard by its number, int64 [n], in the data set's own order.
    """

    def __init__(
        self, plan: LoopPlan, numbers: list[list[int]], samples: Callable[[int], Tensor]
    ) -> None:
        super().__init__(plan, None)
        self._numbers = numbers
        self._samples = samples
        self._orders: OrderedDict[int, Tensor] = OrderedDict()

    def number(self, round_: int, slot: int) -> int:
        """The data shard that a slot computes in a round."""
        return self._numbers[slot][self.plan.place(round_, slot)[0]]

    def read(self, round_: int, slot: int) -> Read:
        """The samples of one slot of one round."""
        shard, start, stop = self.plan.place(round_, slot)
        number = self._numbers[slot][shard]
        samples: list[int] = self._order(number)[start:stop].tolist()
        return Read(round_, slot, samples)

    def _order(self, number: int) -> Tensor:
        if number in self._orders:
            self._orders.move_to_end(number)
            return self._orders[number]
        samples = self._samples(number)
        if self.plan.shuffle:
            plan = self.plan
            samples = samples[permutation(len(samples), plan.seed, plan.epoch, number)]
        self._orders[number] = samples
        if len(self._orders) > ORDERS_KEPT:
            self._orders.popitem(last=False)
        return samples


def columns(features: int, slots: int, slot: int) -> slice:
    """The features of a slot: a run of them, as even as possible."""
    each, more = divmod(features, slots)
    first = slot * each + min(slot, more)
    return slice(first, first + each + (slot < more))
