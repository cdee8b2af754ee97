"""`data_shards`: the loop over data shards, files for instance, of which this worker gets some."""

import inspect
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, islice
from pathlib import PurePath
from typing import Any, Unpack, get_type_hints

import torch

from treefold.common.errors import ConfigError, DataError, LocalProtocolError
from treefold.common.plan import LoopPlan
from treefold.torch import session
from treefold.torch.loop import (
    Batches,
    CommonOptions,
    checked,
    first_guess,
    plan_of_shards,
    seed_of,
)
from treefold.torch.partition import ShardOrder, deal
from treefold.torch.randomness import permutation
from treefold.torch.samples import MapStyle, SlotReader, Source

OPEN_MAX = 8  # data shards that a process holds open
COUNT = "count"  # in the place of sizes
Load = Callable[..., Any]


class ShardOptions(CommonOptions, total=False):
    """Keywords of `data_shards`."""

    load: Load | None
    sizes: Sequence[int] | str | None


class ShardedData:
    """Samples of all data shards, numbered one after the other.

    Parameters
    ----------
    items : sequence
        What the script calls them.
    load : callable or None
        Makes a data set of an item; None if items are data sets.
    sizes : sequence of int, str or None
        Samples of each; None to ask the data sets, ``"count"`` to read those that do not know.

    Attributes
    ----------
    sizes : list of int
        Samples of each.
    is_sequential : bool
        Whether they can be read in their own order only.

    Raises
    ------
    ConfigError
        A data set has no length, and sizes are not given; or they are not those of the items.
    """

    def __init__(
        self, items: Sequence[object], load: Load | None, sizes: Sequence[int] | str | None
    ) -> None:
        self._items = items
        self._load: Load = _itself if load is None else load
        self._has_start = load is not None and "start" in inspect.signature(load).parameters
        self._open: OrderedDict[int, MapStyle | _Cursor] = OrderedDict()
        self.is_sequential = not isinstance(self._opened(0), MapStyle)
        if isinstance(sizes, str) and sizes != COUNT:
            raise ConfigError(f"sizes is {sizes!r}; it is {COUNT!r}, or a number for each")
        if sizes is None or isinstance(sizes, str):
            is_counted = sizes is not None
            sizes = [self._size(number, is_counted) for number in range(len(items))]
        if len(sizes) != len(items):
            msg = f"sizes has {len(sizes)} entries for {len(items)} data shards"
            raise ConfigError(msg)
        self.sizes = [checked(f"sizes[{number}]", size, 0) for number, size in enumerate(sizes)]
        self._ends = list(accumulate(self.sizes))
        self._open.clear()  # loader processes get a copy

    def __len__(self) -> int:
        """Samples of all of them."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> object:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[object]:
        """Samples of one data shard."""
        number = self.number(indices[0])
        first = self._ends[number] - self.sizes[number]
        own = [index - first for index in indices]
        data = self._opened(number)
        if isinstance(data, _Cursor):
            return self._read_on(number, data, own)
        several: Callable[[list[int]], list[object]] | None
        several = getattr(data, "__getitems__", None)
        return [data[index] for index in own] if several is None else several(own)

    def number(self, index: int) -> int:
        """The data shard that a sample belongs to."""
        return bisect_right(self._ends, index)

    def samples(self, number: int) -> torch.Tensor:
        """The samples of a data shard, int64 [n]."""
        return torch.arange(self._ends[number] - self.sizes[number], self._ends[number])

    def _size(self, number: int, is_counted: bool) -> int:
        data = self._opened(number)
        if isinstance(data, MapStyle):
            return len(data)
        if is_counted:
            del self._open[number]  # it will be at its end
            return sum(1 for _ in data.samples)
        msg = (
            f"data shard {number}, {self._items[number]!r}, is a {type(data).__name__} without "
            "len(): pass sizes=, the number of samples of each data shard, or sizes='count' to "
            "have each read to its end once"
        )
        raise ConfigError(msg)

    def _opened(self, number: int) -> "MapStyle | _Cursor":
        if number not in self._open:
            data = self._begin(number, 0)
            self._open[number] = data if isinstance(data, MapStyle) else _Cursor(iter(data), 0)
            while len(self._open) > OPEN_MAX:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def _begin(self, number: int, start: int) -> Any:  # noqa: ANN401 # whatever load makes
        item = self._items[number]
        data = self._load(item, start=start) if self._has_start else self._load(item)
        if not isinstance(data, MapStyle | Iterable):
            made = f"data shard {number}, {item!r}, is a {type(data).__name__}"
            raise ConfigError(f"{made}, which can neither be indexed nor iterated: pass load=")
        return data

    def _read_on(self, number: int, cursor: "_Cursor", own: list[int]) -> list[object]:
        """The next samples of one that has to be read in its own order."""
        if cursor.position != own[0]:
            data = iter(self._begin(number, own[0]))
            if not self._has_start:
                data = islice(data, own[0], None)
            cursor = self._open[number] = _Cursor(data, own[0])
        found = list(islice(cursor.samples, len(own)))
        cursor.position += len(found)
        if len(found) < len(own):
            msg = (
                f"data shard {number}, {self._items[number]!r}, ended after {cursor.position} "
                f"samples; sizes says {self.sizes[number]}"
            )
            raise DataError(msg)
        return found


class _Cursor:
    """Where one that has to be read in its own order stands."""

    def __init__(self, samples: Iterator[object], position: int) -> None:
        self.samples = samples
        self.position = position


class DataShard:
    """A visit of this worker to one data shard: an iterator over batches.

    A visit goes on from the last batch of the shard that anybody contributed, and ends with the
    shard, or before that, where this worker goes on with another one.

    Attributes
    ----------
    number : int
        Which one, in the order in which they were given.
    item : object
        What the script calls it.
    size : int
        Its samples.
    """

    def __init__(self, loop: "DataShards", number: int, item: object, size: int) -> None:
        self.number = number
        self.item = item
        self.size = size
        self._loop = loop

    def __repr__(self) -> str:
        return f"DataShard(number={self.number}, item={self.item!r}, size={self.size})"

    def __iter__(self) -> "DataShard":
        return self

    def __next__(self) -> Any:  # noqa: ANN401 # whatever collate_fn makes of samples
        return self._loop.next_batch(self)


class DataShards:
    """The data shards of one pass that fall to this worker; made by `data_shards`.

    Attributes
    ----------
    plan : LoopPlan
        Rounds and slots of the pass.
    """

    def __init__(self, loop: Batches, data: ShardedData, items: Sequence[object]) -> None:
        self.plan = loop.plan
        self._loop = loop
        self._data = data
        self._items = items
        self._batch: object = None
        self._number = -1
        self._visit: DataShard | None = None
        self._has_batch = False

    def __iter__(self) -> "DataShards":
        iter(self._loop)
        return self

    def __next__(self) -> DataShard:
        if self._visit is not None:
            text = (
                f"the batches of {self._visit} were not iterated to their end: the loop over the "
                "batches of a data shard must not be left, nor left out"
            )
            raise LocalProtocolError(text)
        if not self._has_batch:
            self._fetch()
        number = self._number
        self._visit = DataShard(self, number, self._items[number], self._data.sizes[number])
        return self._visit

    def next_batch(self, visit: DataShard) -> object:
        """The next batch of a visit."""
        if visit is not self._visit:
            raise StopIteration
        if not self._has_batch:
            try:
                self._fetch()
            except StopIteration:
                self._visit = None
                raise
        if self._number != visit.number:
            self._visit = None
            raise StopIteration
        self._has_batch = False
        return self._batch

    def _fetch(self) -> None:
        self._batch = next(self._loop)
        self._number = self._data.number(self._loop.sample)
        self._has_batch = True


def data_shards(
    items: Sequence[object],
    batch_size: int,
    epoch: int = 0,
    **options: Unpack[ShardOptions],
) -> DataShards:
    """Iterate over this worker's share of data shards, and over the batches of each.

        for shard in ps.data_shards(files, batch_size=512, load=read):
            for x, y in shard:
                optimizer.zero_grad()
                loss_of(model(x), y).backward()
                optimizer.step()

    Each slot has some of the data shards, the same in every run, and reads them one after the
    other. Every sample counts once per pass, whatever happens to workers: who takes over a shard
    goes on after the last batch that was contributed. After the loop every worker holds the same
    final version.

    Parameters
    ----------
    items : sequence
        What is to be read: names of files for instance, or data sets.
    batch_size : int
        Samples of one round over all slots, a multiple of their number; each batch has the samples
        of one slot. The last batch of a data shard may be short.
    epoch : int
        Which pass this is; with the seed it fixes the order of data shards and samples.
    load : callable, optional
        Makes a data set of an item: map-style, or an iterable that gives the same samples in the
        same order each time. With a parameter ``start`` the latter begins with that sample,
        otherwise it is read from its beginning when another worker takes over. By default items
        are data sets themselves.
    sizes : sequence of int or str, optional
        Samples of each data shard; by default each is loaded and asked for its length. With
        ``"count"`` those that do not know it are read to their end once, by every worker; what was
        counted is remembered for later passes over the same items.
    policy : str
        What moves data shards between workers: ``"predictive"`` (shares in proportion to forecast
        speed, the default), ``"queue"`` (equal shares, and a worker that is done takes one that
        nobody has begun) or ``"static"`` (equal shares). Those of workers that are gone go to
        others in any case.
    shuffle : bool
        Whether to permute data shards, and samples within each if they can be indexed; True by
        default.
    seed : int, optional
        The sampler's seed; the job's by default.
    num_workers : int
        Processes that read samples ahead; 0 by default.
    collate_fn : callable, optional
        Makes a batch of a list of samples; torch's ``default_collate`` by default.

    Returns
    -------
    DataShards
        An iterator over `DataShard`, good for one loop, which must run to its end.

    Raises
    ------
    LocalProtocolError, SpecMismatchError
        As `batches`; or a loop over the batches of a data shard was left.
    ConfigError
        A number is out of range, a name is unknown, sizes are not known or there are no samples.
    DataError
        A data shard has fewer samples than ``sizes`` says.
    """
    job = session.current()
    known = get_type_hints(ShardOptions)
    unknown = [name for name in options if name not in known]
    if unknown:
        msg = f"ps.data_shards() has no argument {unknown[0]!r}; it has {', '.join(known)}"
        raise ConfigError(msg)
    if not len(items):
        raise ConfigError("there are no data shards")
    job.check_can_loop()
    data = ShardedData(items, options.get("load"), _known_sizes(job, items, options))
    if not len(data):
        raise ConfigError("the data shards have no samples")
    job.shard_sizes = (list(items), options.get("load"), data.sizes)
    plan, numbers = _plan(job, data, (batch_size, epoch), options)
    order = ShardOrder(plan, numbers, data.samples)
    reader = SlotReader(data, options.get("collate_fn"), job.settings.seed)
    processes = checked("num_workers", options.get("num_workers", 0), 0)
    loop = Batches(Source(reader, order, processes, first_guess(job, plan)), order)
    return DataShards(loop, data, items)


def _known_sizes(
    job: session.Session, items: Sequence[object], options: ShardOptions
) -> Sequence[int] | str | None:
    """What was counted in the pass before, if this one is over the same."""
    sizes, (known, load, counted) = options.get("sizes"), job.shard_sizes
    is_same = load is options.get("load") and len(known) == len(items)
    is_same = is_same and all(map(_is_same, known, items))
    return counted if sizes == COUNT and is_same else sizes


def _is_same(one: object, other: object) -> bool:
    """Whether two items are the same one, names by what they say."""
    return one is other or (isinstance(one, str | bytes | int | PurePath) and one == other)


def _plan(
    job: session.Session, data: ShardedData, size: tuple[int, int], options: ShardOptions
) -> tuple[LoopPlan, list[list[int]]]:
    """The pass, and the data shards of each slot."""
    slots, epoch = job.settings.slots, size[1]
    batch_size = checked("batch_size", size[0], slots)
    if batch_size % slots:
        msg = f"batch_size is {batch_size}; with data shards it is a multiple of {slots} slots"
        raise ConfigError(msg)
    order = list(range(len(data.sizes)))
    if options.get("shuffle", True):
        order = permutation(len(order), seed_of(job, options), epoch).tolist()
    numbers, shards = deal(data.sizes, slots, batch_size // slots, order)
    if data.is_sequential:  # their samples stay in their own order
        options = {**options, "shuffle": False}
    return plan_of_shards(job, (batch_size, epoch), options, shards), numbers


def _itself(item: object) -> object:
    return item
