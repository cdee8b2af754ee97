"""Data shards: who gets which samples, in which order, and what is refused by name."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import treefold.torch as ps
from tests.support.reference import ReferenceJob
from tests.support.sessions import bare, joined, parameters_of, sgd
from treefold.common.errors import ConfigError, DataError, LocalProtocolError
from treefold.common.plan import Policy
from treefold.torch.partition import Partition, columns, deal, split

SLOTS = 3
FILES = [5, 0, 17, 9, 2, 12]
SAMPLES = sum(FILES)
Visit = tuple[int, list[int]]


def numbers(number: int) -> list[int]:
    """What file ``number`` has in it."""
    return [100 * number + sample for sample in range(FILES[number])]


def mapped(number: int) -> TensorDataset:
    """The same, by number."""
    return TensorDataset(torch.tensor(numbers(number), dtype=torch.int64))


def streamed(number: int) -> Iterator[tuple[int]]:
    """The same, from the beginning to the end."""
    for value in numbers(number):
        yield (value,)


def streamed_from(number: int, start: int) -> Iterator[tuple[int]]:
    """The same, from any place on."""
    for value in numbers(number)[start:]:
        yield (value,)


def begin() -> None:
    """A script that has come to its loop."""
    model = bare()
    ps.DistributedOptimizer(sgd(parameters_of(model)), model)


def visited(**options: Any) -> list[Visit]:  # those of `data_shards`
    """Every batch of a pass, with its data shard."""
    with joined(ReferenceJob(SLOTS)):
        begin()
        shards = ps.data_shards(range(len(FILES)), 4 * SLOTS, **options)
        return [(shard.number, batch[0].tolist()) for shard in shards for batch in shard]


@pytest.mark.parametrize(
    "options",
    [
        {"load": mapped},
        {"load": mapped, "num_workers": 2},
        {"load": streamed, "sizes": FILES},
        {"load": streamed_from, "sizes": FILES},
        {"load": streamed, "sizes": "count"},
        {"load": streamed_from, "sizes": "count", "num_workers": 2},
        {"load": mapped, "sizes": "count"},
        {"load": numbers, "collate_fn": lambda samples: [torch.tensor(samples)]},
    ],
)
def test_every_sample_of_every_file_is_used_once_in_batches_of_one_file(
    options: dict[str, Any],
) -> None:
    found = visited(**options)
    used = Counter(value for _, batch in found for value in batch)
    assert used == Counter(value for number in range(len(FILES)) for value in numbers(number))
    assert all(value // 100 == number for number, batch in found for value in batch)
    assert max(len(batch) for _, batch in found) == 4


def test_the_order_follows_from_seed_and_epoch_and_can_be_that_of_the_files() -> None:
    assert visited(load=mapped) == visited(load=mapped)
    assert visited(load=mapped) != visited(load=mapped, epoch=1)
    assert visited(load=mapped) != visited(load=mapped, seed=9)
    for options in ({"load": mapped, "shuffle": False}, {"load": streamed, "sizes": FILES}):
        per_file: dict[int, list[int]] = {}
        for number, batch in visited(**options):
            per_file.setdefault(number, []).extend(batch)
        assert per_file == {n: numbers(n) for n in range(len(FILES)) if FILES[n]}


def test_a_stream_is_opened_once_unless_it_is_taken_over() -> None:
    opened: list[tuple[int, int]] = []

    def load(number: int, start: int) -> Iterator[tuple[int]]:
        opened.append((number, start))
        return streamed_from(number, start)

    visited(load=load, sizes=FILES)
    assert Counter(opened[1:]) == Counter((n, 0) for n in range(len(FILES)) if FILES[n])


def test_a_stream_that_ends_before_it_should_says_so() -> None:
    sizes = [size + 1 for size in FILES]
    with pytest.raises(DataError, match=r"data shard \d, \d, ended after \d+ samples; sizes says"):
        visited(load=streamed, sizes=sizes)


def test_shards_are_dealt_evenly_and_the_same_whatever_is_empty() -> None:
    found = deal([8, 0, 1, 7, 4, 4], 3, 2, [5, 4, 3, 2, 1, 0])
    batches = [sum(-(-size // 2) for size in own) for own in found.sizes]
    assert batches == sorted(batches, reverse=True)
    assert max(batches) - min(batches) <= 2
    assert sorted(number for own in found.numbers for number in own) == [0, 2, 3, 4, 5]


def test_a_loop_over_a_shard_that_is_left_is_an_error() -> None:
    with joined(ReferenceJob(SLOTS)):
        begin()
        shards = ps.data_shards(range(len(FILES)), 4 * SLOTS, load=mapped)
        for batch in next(shards):
            assert batch
            break
        with pytest.raises(LocalProtocolError, match=r"DataShard\(number=\d, item=\d, size=\d+\)"):
            next(shards)


@pytest.mark.parametrize(
    ("items", "options", "text"),
    [
        ([], {}, "there are no data shards"),
        ([[]], {}, "the data shards have no samples"),
        ([3], {}, "data shard 0, 3, is a int, which can neither be indexed nor iterated"),
        ([0, 1], {"load": streamed}, r"without len\(\): pass sizes="),
        ([0, 1], {"load": streamed, "sizes": "guess"}, "sizes is 'guess'; it is 'count', or"),
        ([0, 1], {"load": streamed, "sizes": [5]}, "sizes has 1 entries for 2 data shards"),
        ([0, 1], {"load": streamed, "sizes": [5, -1]}, r"sizes\[1\] is -1"),
        ([[1]], {"policy": "fastest"}, "policy='fastest'; it is one of 'predictive', 'queue'"),
        ([[1]], {"batch": 7}, r"has no argument 'batch'; it has"),
    ],
)
def test_what_is_wrong_is_refused_by_name(
    items: list[object], options: dict[str, Any], text: str
) -> None:
    with joined(ReferenceJob(SLOTS)):
        begin()
        with pytest.raises(ConfigError, match=text):
            ps.data_shards(items, SLOTS, **options)


def test_a_batch_size_is_a_multiple_of_the_slots() -> None:
    with joined(ReferenceJob(SLOTS)):
        begin()
        for make in (
            lambda: ps.data_shards([[1, 2]], 4),
            lambda: ps.batches(mapped(2), 4, partition="range"),
        ):
            with pytest.raises(ConfigError, match=r"is 4; with .* a multiple of 3 slots"):
                make()


# ---- partitions ----------------------------------------------------------------------------------


def dealt(**options: Any) -> dict[int, list[int]]:  # those of `batches`
    """The samples that each slot has of a pass."""
    found: dict[int, list[int]] = {}
    dataset = TensorDataset(torch.arange(SAMPLES))
    with joined(ReferenceJob(SLOTS)):
        begin()
        loop = ps.batches(dataset, 2 * SLOTS, **options)
        for (batch,) in loop:
            task = loop._job.task
            assert task is not None
            found.setdefault(task.slot, []).extend(batch.tolist())
    return found


def test_a_range_and_turns_are_what_they_are_called() -> None:
    found = dealt(partition="range", shuffle=False)
    assert sorted(found.values()) == [list(range(n, n + 15)) for n in (0, 15, 30)]
    found = dealt(partition="round-robin", shuffle=False)
    assert sorted(found.values()) == [list(range(slot, SAMPLES, SLOTS)) for slot in range(SLOTS)]
    first, second = dealt(partition="range"), dealt(partition="range", epoch=1)
    assert first != second
    assert [sorted(own) for own in first.values()] == [sorted(own) for own in second.values()]


def test_samples_with_equal_keys_are_in_one_slot_in_any_process() -> None:
    keys = [f"user-{sample % 7}" for sample in range(SAMPLES)]
    found = dealt(partition="hash", key=keys.__getitem__)
    assert sorted(sample for own in found.values() for sample in own) == list(range(SAMPLES))
    homes = {keys[sample]: slot for slot, own in found.items() for sample in own}
    assert all(homes[keys[sample]] == slot for slot, own in found.items() for sample in own)
    assert [len(own) for own in split(1000, 4, Partition.HASH, None)] == [261, 256, 246, 237]
    assert len(split(100, 4, Partition.HASH, lambda _: b"one")) == 4
    tensors = split(30, 4, Partition.HASH, lambda sample: torch.tensor(sample % 3))
    plain = split(30, 4, Partition.HASH, lambda sample: sample % 3)
    assert [own.tolist() for own in tensors] == [own.tolist() for own in plain]


def test_features_are_split_and_every_slot_has_every_sample() -> None:
    seen: dict[int, tuple[slice, list[int]]] = {}
    with joined(ReferenceJob(SLOTS)) as client:
        begin()
        loop = ps.batches(TensorDataset(torch.arange(SAMPLES)), 8, partition="feature", features=10)
        for (batch,) in loop:
            assert isinstance(batch, Tensor)
            task = loop._job.task
            assert task is not None
            at = seen.setdefault(task.slot, (loop.columns, []))
            at[1].extend(batch.tolist())
        with pytest.raises(LocalProtocolError, match="columns are known in the loop"):
            assert loop.columns == slice(0, 4)
        assert client is not None
    assert [own[0] for own in seen.values()] == [slice(0, 4), slice(4, 7), slice(7, 10)]
    orders = [own[1] for own in seen.values()]
    assert sorted(orders[0]) == list(range(SAMPLES))
    assert orders[0] == orders[1] == orders[2]
    assert [columns(2, 2, slot) for slot in range(2)] == [slice(0, 1), slice(1, 2)]


def test_statistics_are_means_over_slots_where_features_are_split() -> None:
    with joined(ReferenceJob(SLOTS)):
        norm = torch.nn.BatchNorm1d(2, momentum=1.0)
        optimizer = ps.DistributedOptimizer(sgd(parameters_of(norm)), norm)
        data = TensorDataset(torch.full((8, 2), 6.0))
        for (batch,) in ps.batches(data, 8, partition="feature", features=SLOTS):
            optimizer.zero_grad()
            norm(batch + torch.randn(8, 2)).sum().backward()
            optimizer.step()
    assert norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean, torch.full((2,), 6.0), atol=1.5, rtol=0.0)


def test_rounds_that_are_not_full_may_be_left_out() -> None:
    found = dealt(partition="hash", drop_last=True)
    assert all(len(own) % 2 == 0 for own in found.values())
    found = dealt(partition="range", max_rounds=2)
    assert [len(own) for own in found.values()] == [4, 4, 4]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"partition": "random"},
            "partition='random'; it is one of 'range', 'round-robin'",
        ),
        ({"key": str}, "key= is for partition='hash', not for None"),
        ({"partition": "range", "features": 4}, "features= is for partition='feature'"),
        ({"partition": "feature"}, "features is None; it must be a whole number of at least 3"),
        ({"partition": "feature", "features": 2}, "features is 2"),
        ({"partition": "hash", "key": lambda _: 1.5}, r"key\(0\) is 1.5, a float"),
        ({"policy": 3}, "policy=3; it is one of"),
    ],
)
def test_a_partition_that_is_none_is_refused_by_name(options: dict[str, Any], text: str) -> None:
    with joined(ReferenceJob(SLOTS)):
        begin()
        with pytest.raises(ConfigError, match=text):
            ps.batches(TensorDataset(torch.arange(SAMPLES)), 2 * SLOTS, **options)


@pytest.mark.parametrize("policy", list(Policy))
def test_a_policy_is_part_of_the_plan(policy: Policy) -> None:
    with joined(ReferenceJob(SLOTS)):
        begin()
        name = policy.name.lower()
        assert ps.batches(TensorDataset(torch.arange(9)), 3, policy=name).plan.policy is policy
        assert ps.data_shards([[1, 2]], 3, policy=name).plan.policy is policy


def test_what_was_counted_is_known_in_the_next_pass_over_the_same_files() -> None:
    begun: Counter[str] = Counter()

    def load(name: str) -> Iterator[tuple[int]]:
        begun[name] += 1
        return streamed(int(name))

    names = [str(number) for number in range(len(FILES))]
    with joined(ReferenceJob(SLOTS)):
        begin()
        for epoch in range(2):
            shards = ps.data_shards(
                [*names], 4 * SLOTS, epoch=epoch, load=load, sizes="count", shuffle=False
            )
            assert sum(len(batch[0]) for shard in shards for batch in shard) == SAMPLES
    counted, read = 1, 2
    assert begun[names[2]] == counted + read
    assert begun[names[1]] == counted, "there is nothing in it"
