"""The data plan: every sample of a pass once, slots without samples always the last ones."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treefold.common.errors import DataError
from treefold.common.plan import LoopPlan, PlanKind, batches


def slots_plan(samples: int, batch_size: int, slots: int, first_round: int = 0) -> LoopPlan:
    """A pass over so many samples in leased slots."""
    rounds = -(-samples // batch_size)
    return LoopPlan(
        PlanKind.SLOTS, 0, first_round, rounds, slots, samples, batch_size, 0, shuffle=True, seed=0
    )


def loader_plan(slots: int) -> LoopPlan:
    """A pass over every worker's own loader."""
    return LoopPlan(PlanKind.LOADER, 0, 7, 0, slots, 0, slots, 0, shuffle=False, seed=0)


plans = st.builds(
    slots_plan,
    samples=st.integers(0, 300),
    batch_size=st.integers(1, 64),
    slots=st.integers(1, 20),
    first_round=st.integers(0, 1000),
)


def samples_in_order(plan: LoopPlan) -> list[int]:
    """Positions that all slots of all rounds compute, round by round and slot by slot."""
    return [
        position
        for round_ in range(plan.first_round, plan.end_round)
        for slot in range(plan.slots)
        for position in range(*plan.slot_range(round_, slot))
    ]


@given(plans)
def test_every_sample_of_a_pass_is_in_exactly_one_slot_of_one_round(plan: LoopPlan) -> None:
    assert samples_in_order(plan) == list(range(plan.samples))


@given(plans)
def test_slots_with_samples_are_the_first_ones_and_slot_0_always_is(plan: LoopPlan) -> None:
    for round_ in range(plan.first_round, plan.end_round):
        ranges = [plan.slot_range(round_, slot) for slot in range(plan.slots)]
        sizes = [stop - start for start, stop in ranges]
        active = plan.active_slots(round_)
        assert active >= 1
        assert [size > 0 for size in sizes] == [slot < active for slot in range(plan.slots)]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1
        assert sum(sizes) == plan.round_samples(round_)


class PlanThatForgetsTheRest(LoopPlan, frozen=True):
    """Deals only what comes out even, as naive sharding does."""

    def slot_range(self, round_: int, slot: int) -> tuple[int, int]:
        each = self.round_samples(round_) // self.slots
        start = (round_ - self.first_round) * self.batch_size + slot * each
        return start, start + each


def test_a_plan_that_forgets_the_rest_would_be_noticed() -> None:
    """The negative control."""
    right = slots_plan(samples=100, batch_size=32, slots=5)
    wrong = PlanThatForgetsTheRest(*msgspec.structs.astuple(right))
    assert samples_in_order(right) == list(range(100))
    assert samples_in_order(wrong) != list(range(100))


def test_a_short_last_round_leaves_the_last_slots_out() -> None:
    plan = slots_plan(samples=35, batch_size=32, slots=8, first_round=10)
    assert plan.end_round == 12
    assert plan.active_slots(10) == 8
    assert plan.round_samples(11) == 3
    assert plan.active_slots(11) == 3
    assert [plan.slot_range(11, slot) for slot in range(4)] == [
        (32, 33),
        (33, 34),
        (34, 35),
        (35, 35),
    ]


def test_with_loaders_of_their_own_every_worker_is_a_slot_in_every_round() -> None:
    plan = loader_plan(slots=3)
    assert [plan.active_slots(round_) for round_ in (7, 8, 1_000_000)] == [3, 3, 3]


@pytest.mark.parametrize("rounds", [0, 3, 5])
def test_a_plan_whose_rounds_are_not_what_its_samples_make_is_refused(rounds: int) -> None:
    right = slots_plan(samples=100, batch_size=30, slots=8)
    with pytest.raises(DataError, match=f"{rounds} rounds; 100 samples in rounds of 30 make 4"):
        msgspec.structs.replace(right, rounds=rounds)


@pytest.mark.parametrize("field", ["slots", "batch_size"])
def test_a_plan_without_slots_or_samples_in_a_round_does_not_decode(field: str) -> None:
    plan = msgspec.structs.replace(loader_plan(slots=3), **{field: 0})
    with pytest.raises(msgspec.ValidationError, match=">= 1"):
        msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=LoopPlan)


def shards_plan(shards: list[list[int]], batch: int, first_round: int = 0) -> LoopPlan:
    """A pass over data shards of slots, which take so many samples of each round."""
    batch_size, samples = batch * len(shards), sum(map(sum, shards))
    lengths = batches(shards, batch_size)
    return LoopPlan(
        PlanKind.SLOTS, 0, first_round, lengths[0], len(shards), samples, batch_size, 0,
        shuffle=True, seed=0, lengths=lengths, shards=shards,
    )  # fmt: skip


dealt = st.builds(
    lambda shards, batch, first: shards_plan(
        sorted(shards, key=lambda own: -batches([own], batch)[0]), batch, first
    ),
    st.lists(st.lists(st.integers(0, 30), max_size=4), min_size=1, max_size=6),
    st.integers(1, 7),
    st.integers(0, 1000),
)


@given(dealt)
def test_every_sample_of_a_data_shard_is_in_exactly_one_round_of_its_slot(plan: LoopPlan) -> None:
    for slot, shards in enumerate(plan.shards):
        places = [plan.place(round_, slot) for round_ in range(plan.first_round, plan.ends[slot])]
        found = [(shard, n) for shard, start, stop in places for n in range(start, stop)]
        assert found == [(shard, n) for shard, size in enumerate(shards) for n in range(size)]
        assert all(0 < stop - start <= plan.batch_size // plan.slots for _, start, stop in places)


@given(dealt)
def test_slots_with_data_shards_left_are_the_first_ones(plan: LoopPlan) -> None:
    for round_ in range(plan.first_round, plan.end_round + 1):
        active = plan.active_slots(round_)
        assert [end > round_ for end in plan.ends] == [s < active for s in range(plan.slots)]
        sizes = [plan.slot_samples(round_, slot) for slot in range(active)]
        assert plan.round_samples(round_) == sum(sizes)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lengths": [3, 2]}, r"slots have \[3, 1\] batches, not \[3, 2\]"),
        ({"shards": [[2], [5]], "lengths": [1, 3]}, "in descending order"),
        ({"rounds": 4}, "slot 0 has 3 batches in a plan of 4 rounds"),
        ({"samples": 8}, "other than 8 samples"),
        ({"batch_size": 5}, "5 is no multiple of 2 slots"),
        ({"shards": [[5, 1]], "lengths": [3]}, "data shards of 1 slots in a plan of 2"),
    ],
)
def test_data_shards_that_do_not_fit_are_refused(change: dict[str, object], text: str) -> None:
    right = shards_plan([[5], [2]], 2)
    assert right.lengths == [3, 1]
    with pytest.raises(DataError, match=text):
        msgspec.structs.replace(right, **change)
