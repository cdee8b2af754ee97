"""`batches`: the loop over a data set, in which this worker gets its slots of every round."""

import math
from typing import Any, TypedDict, Unpack, get_type_hints

from torch.utils.data import IterableDataset

from treefold.common.errors import ConfigError, LocalProtocolError, UnsupportedError
from treefold.common.plan import LoopPlan, PlanKind
from treefold.common.plan import batches as rounds_of
from treefold.torch import session
from treefold.torch.partition import (
    Key,
    Partition,
    ShardOrder,
    columns,
    policy_of,
    split,
)
from treefold.torch.randomness import permutation, seed_for_compute
from treefold.torch.samples import Collate, MapStyle, Order, SlotReader, Source


class CommonOptions(TypedDict, total=False):
    """Keywords of every loop; the first ones mean what they mean to torch's ``DataLoader``.

    ``seed`` is the sampler's and by default the job's.
    """

    shuffle: bool
    num_workers: int
    collate_fn: Collate | None
    seed: int | None
    policy: str


class BatchOptions(CommonOptions, total=False):
    """Keywords of `batches`.

    ``max_rounds`` ends the pass early, which ``break`` must not do, since all workers have to end
    it together.
    """

    drop_last: bool
    max_rounds: int | None
    partition: str | None
    key: Key | None
    features: int | None


class Batches:
    """The batches of one pass that fall to this worker; made by `batches`, iterated once.

    Parameters
    ----------
    source : Source
        Reads the samples.
    order : Order
        Says which ones.

    Attributes
    ----------
    plan : LoopPlan
        Rounds and slots of the pass.
    sample : int
        The first sample of the batch.
    """

    def __init__(self, source: Source, order: Order, features: int | None = None) -> None:
        self.plan = order.plan
        self._source = source
        self._order = order
        self._job = session.current()
        self._is_begun = False
        self._is_over = False
        self._samples = 0
        self._features = features
        self.sample = 0

    @property
    def columns(self) -> slice:
        """The features of this batch's slot, where they are what data is split by.

        Raises
        ------
        LocalProtocolError
            ``partition="feature"`` was not chosen, or no loop body is running.
        """
        if self._features is None or self._job.task is None:
            text = 'columns are known in the loop over ps.batches(..., partition="feature")'
            raise LocalProtocolError(text)
        return columns(self._features, self.plan.slots, self._job.task.slot)

    def __iter__(self) -> "Batches":
        if self._is_begun:
            text = (
                "this ps.batches() was iterated before; make a new one for every epoch, with "
                "epoch=, which also gives it a new order"
            )
            raise LocalProtocolError(text)
        return self

    def __next__(self) -> Any:  # noqa: ANN401 # whatever collate_fn makes of samples
        if self._is_over:
            raise StopIteration
        if self._is_begun:
            self._job.end_slot(self._samples)
        else:
            self._begin()
        task = self._job.next_slot(self.plan)
        if task is None:
            self._is_over = True
            self._source.close()
            raise StopIteration
        read = self._order.read(task.round, task.slot)
        batch = self._source.take(read, is_again=task.is_again)
        self._samples, self.sample = len(read.samples), read.samples[0]
        self._job.client.record_samples(task, read.samples)
        seed_for_compute(self._job.settings.seed, task.round, task.slot)
        return batch

    def _begin(self) -> None:
        if self._job is not session.current() or self._job.loops != self.plan.index:
            text = (
                f"this ps.batches() was made for pass {self.plan.index} of the job, which is at "
                f"pass {self._job.loops}; iterate it where it is made"
            )
            raise LocalProtocolError(text)
        self._job.begin_loop(self.plan)
        self._is_begun = True


def batches(
    dataset: MapStyle, batch_size: int, epoch: int = 0, **options: Unpack[BatchOptions]
) -> Batches:
    """Iterate over this worker's share of a data set: one batch for each slot that it computes.

    The loop body runs once per slot: forward, backward and ``optimizer.step()``. torch, numpy and
    `random` are seeded for each (round, slot), in loader processes too. After the loop every worker
    holds the same final version.

    Parameters
    ----------
    dataset : map-style data set
        With ``len`` and numbered samples.
    batch_size : int
        Samples of one round over all slots, so that it does not depend on the cluster. The last
        round of an epoch may be short.
    epoch : int
        Which pass this is; with the seed it fixes the order of the samples.
    shuffle : bool
        Whether to permute the samples; True by default.
    seed : int, optional
        The sampler's seed; the job's by default.
    num_workers : int
        Processes that read samples ahead; 0 by default.
    collate_fn : callable, optional
        Makes a batch of a list of samples; torch's ``default_collate`` by default.
    drop_last : bool
        Whether to leave out a last round that is not full; False by default. BatchNorm cannot train
        on one sample, which is what a slot may get of a short round.
    max_rounds : int, optional
        End after so many rounds.
    partition : str, optional
        Give each slot samples of its own for good: ``"range"`` (a run of them), ``"round-robin"``
        (in turn), ``"hash"`` (those with equal keys together) or ``"feature"`` (all samples, but
        some features: the iterator's ``columns``). By default each round's samples are dealt to
        slots anew. Slots may have different numbers of samples then, so that later rounds may be
        short; ``batch_size`` is a multiple of the number of slots, and with ``"feature"`` that of
        every slot.
    key : callable, optional
        With ``"hash"``: the key of a sample, given by its number; a str, bytes or an int.
    features : int, optional
        With ``"feature"``: how many there are, at least as many as slots.
    policy : str
        What moves slots between workers: ``"predictive"`` (shares in proportion to forecast speed,
        the default), ``"queue"`` (equal shares, and idle workers help with what is late) or
        ``"static"`` (equal shares). Slots of workers that are gone go to others in any case, those
        of a worker that hangs not with ``"static"``.

    Returns
    -------
    Batches
        An iterator, good for one loop, which must run to its end.

    Raises
    ------
    LocalProtocolError
        ``ps.init()`` was not called, there is no optimizer, another loop has not ended, or the job
        uses a loader of its own.
    ConfigError
        A number is out of range, or there are no samples.
    UnsupportedError
        The data set's samples are not numbered.
    SpecMismatchError
        Another worker began another pass (raised when the loop begins).
    """
    job = session.current()
    known = get_type_hints(BatchOptions)
    unknown = [name for name in options if name not in known]
    if unknown:
        msg = f"ps.batches() has no argument {unknown[0]!r}; it has {', '.join(known)}"
        raise ConfigError(msg)
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, MapStyle):
        text = (
            f"a {type(dataset).__name__} has no numbered samples (__len__ and __getitem__), so "
            "they cannot be dealt to slots; iterate over a torch DataLoader of your own and call "
            "optimizer.step() there: then every worker is one slot"
        )
        raise UnsupportedError(text)
    job.check_can_loop()
    order = _order(job, len(dataset), (batch_size, epoch), options)
    plan = order.plan
    reader = SlotReader(dataset, options.get("collate_fn"), job.settings.seed)
    processes = checked("num_workers", options.get("num_workers", 0), 0)
    source = Source(reader, order, processes, first_guess(job, plan))
    return Batches(source, order, options.get("features"))


def _order(
    job: session.Session, available: int, size: tuple[int, int], options: BatchOptions
) -> Order:
    """Which samples each slot has."""
    if available < 1:
        raise ConfigError("the data set is empty")
    _check_partition(options, job.settings.slots)
    if options.get("partition") is not None:
        return _partitioned(job, available, size, options)
    plan = _plan(job, available, size, options)
    return Order(plan, permutation(available, plan.seed, size[1]) if plan.shuffle else None)


def _check_partition(options: BatchOptions, slots: int) -> None:
    """Refuse options that say nothing without others."""
    name = options.get("partition")
    if name is not None:
        Partition.of(name)
    for option, partition in (("key", Partition.HASH), ("features", Partition.FEATURE)):
        if options.get(option) is not None and name != partition.value:
            msg = f"{option}= is for partition={partition.value!r}, not for {name!r}"
            raise ConfigError(msg)
    if name == Partition.FEATURE.value:
        checked("features", options.get("features"), slots)


def _partitioned(
    job: session.Session, available: int, size: tuple[int, int], options: BatchOptions
) -> ShardOrder:
    """Samples of its own for each slot, as one data shard."""
    slots, partition = job.settings.slots, Partition.of(options.get("partition"))
    is_shared = partition is Partition.FEATURE
    if is_shared and any(table.may_leave_out for table in job.tables):
        text = (
            "partition='feature' needs all slots of a round, each of which has features of its "
            "own; it does not go with consistency='quorum', nor with health and aggregation"
        )
        raise UnsupportedError(text)
    batch_size = checked("batch_size", size[0], 1) * (slots if is_shared else 1)
    if batch_size % slots:
        msg = f"batch_size is {batch_size}; with a partition it is a multiple of {slots} slots"
        raise ConfigError(msg)
    each = batch_size // slots
    shares = split(available, slots, partition, options.get("key"))
    sizes = [len(share) for share in shares]
    rounds_max = options.get("max_rounds")
    if rounds_max is not None:
        most = checked("max_rounds", rounds_max, 1) * each
        sizes = [min(size, most) for size in sizes]
    if options.get("drop_last", False):
        sizes = [size - size % each for size in sizes]
    by_length = sorted(range(slots), key=lambda slot: (-sizes[slot], slot))
    if not sizes[by_length[0]]:
        msg = f"drop_last leaves nothing: no slot has the {each} samples of a batch"
        raise ConfigError(msg)
    shards = [[sizes[slot]] for slot in by_length]
    plan = plan_of_shards(job, (batch_size, size[1]), options, shards, is_shared=is_shared)
    if is_shared:  # in one order
        by_length = [0] * slots
    return ShardOrder(plan, [[number] for number in by_length], lambda number: shares[number])


def plan_of_shards(
    job: session.Session,
    size: tuple[int, int],
    options: CommonOptions,
    shards: list[list[int]],
    *,
    is_shared: bool = False,
) -> LoopPlan:
    """The pass over data shards that belong to slots.

    Parameters
    ----------
    job : Session
        The job.
    size : (int, int)
        Samples of a round, and the epoch.
    options : CommonOptions
        What the script says.
    shards : list of list of int
        Samples of the data shards of each slot, those with more batches first.
    is_shared : bool
        Whether all slots have the same samples.
    """
    lengths = rounds_of(shards, size[0])
    return LoopPlan(
        kind=PlanKind.SLOTS,
        index=job.loops,
        first_round=job.next_round,
        rounds=lengths[0],
        slots=job.settings.slots,
        samples=sum(map(sum, shards)),
        batch_size=size[0],
        epoch=size[1],
        shuffle=options.get("shuffle", True),
        seed=seed_of(job, options),
        policy=policy_of(options.get("policy", "predictive")),
        lengths=lengths,
        shards=shards,
        is_shared=is_shared,
    )


def seed_of(job: session.Session, options: CommonOptions) -> int:
    """The sampler's seed."""
    seed = options.get("seed")
    return job.settings.seed if seed is None else seed


def _plan(
    job: session.Session, available: int, size: tuple[int, int], options: BatchOptions
) -> LoopPlan:
    batch_size, epoch = checked("batch_size", size[0], 1), size[1]
    samples = available
    if options.get("drop_last", False):
        samples -= samples % batch_size
        if samples == 0:
            msg = (
                f"drop_last leaves nothing: the data set has {available} samples and a round "
                f"{batch_size} (batch_size counts a round over all slots)"
            )
            raise ConfigError(msg)
    rounds_max = options.get("max_rounds")
    if rounds_max is not None:
        samples = min(samples, checked("max_rounds", rounds_max, 1) * batch_size)
    rounds = math.ceil(samples / batch_size)
    return LoopPlan(
        kind=PlanKind.SLOTS,
        index=job.loops,
        first_round=job.next_round,
        rounds=rounds,
        slots=job.settings.slots,
        samples=samples,
        batch_size=batch_size,
        epoch=epoch,
        shuffle=options.get("shuffle", True),
        seed=seed_of(job, options),
        policy=policy_of(options.get("policy", "predictive")),
    )


def first_guess(job: session.Session, plan: LoopPlan) -> list[int]:
    """The slots of the last round, or before the first one an equal share by rank."""
    if job.slots_held:
        return sorted(job.slots_held)
    rank, size = job.client.rank, job.client.size
    return list(range(rank * plan.slots // size, min(plan.slots, (rank + 1) * plan.slots // size)))


def checked(name: str, value: object, least: int) -> int:
    """A whole number that an option has to be.

    Raises
    ------
    ConfigError
        It is none, or less than the least.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        msg = f"{name} is {value!r}; it must be a whole number of at least {least}"
        raise ConfigError(msg)
    return value
