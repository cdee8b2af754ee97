"""`batches`: the loop over a data set, in which this worker gets its slots of every round."""

import math
from typing import Any, TypedDict, Unpack

from torch.utils.data import IterableDataset

from treefold.common.errors import ConfigError, LocalProtocolError, UnsupportedError
from treefold.common.plan import LoopPlan, PlanKind
from treefold.torch import session
from treefold.torch.randomness import permutation, seed_for_compute
from treefold.torch.samples import Collate, MapStyle, Order, SlotReader, Source


class BatchOptions(TypedDict, total=False):
    """Keywords of `batches`; they mean what they mean to torch's ``DataLoader``, but for two.

    ``seed`` is the sampler's and by default the job's. ``max_rounds`` ends the pass early, which
    ``break`` must not do, since all workers have to end it together.
    """

    shuffle: bool
    seed: int | None
    num_workers: int
    collate_fn: Collate | None
    drop_last: bool
    max_rounds: int | None


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
    """

    def __init__(self, source: Source, order: Order) -> None:
        self.plan = order.plan
        self._source = source
        self._order = order
        self._job = session.current()
        self._is_begun = False
        self._is_over = False
        self._samples = 0

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
        batch = self._source.take(read)
        self._samples = len(read.samples)
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
    known = BatchOptions.__annotations__
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
    plan = _plan(job, len(dataset), (batch_size, epoch), options)
    indices = permutation(len(dataset), plan.seed, epoch) if plan.shuffle else None
    order = Order(plan, indices)
    reader = SlotReader(dataset, options.get("collate_fn"), job.settings.seed)
    processes = _checked("num_workers", options.get("num_workers", 0), 0)
    return Batches(Source(reader, order, processes, _first_guess(job, plan)), order)


def _plan(
    job: session.Session, available: int, size: tuple[int, int], options: BatchOptions
) -> LoopPlan:
    batch_size, epoch = _checked("batch_size", size[0], 1), size[1]
    if available < 1:
        raise ConfigError("the data set is empty")
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
        samples = min(samples, _checked("max_rounds", rounds_max, 1) * batch_size)
    rounds = math.ceil(samples / batch_size)
    seed = options.get("seed")
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
        seed=job.settings.seed if seed is None else seed,
    )


def _first_guess(job: session.Session, plan: LoopPlan) -> list[int]:
    """The slots of the last round, or before the first one an equal share by rank."""
    if job.slots_held:
        return sorted(job.slots_held)
    rank, size = job.client.rank, job.client.size
    return list(range(rank * plan.slots // size, min(plan.slots, (rank + 1) * plan.slots // size)))


def _checked(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        msg = f"{name} is {value!r}; it must be a whole number of at least {least}"
        raise ConfigError(msg)
    return value
