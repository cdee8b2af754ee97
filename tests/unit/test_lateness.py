"""When a server calls a round late: counted from when it is wanted, once for all shards."""

import msgspec

from treefold.common.layout import ShardSpan
from treefold.common.round_state import NOTHING_APPLIED
from treefold.common.spec import (
    Consistency,
    ConsistencyKind,
    Dtype,
    OptimizerSpec,
    Placement,
    Rule,
    TableSpec,
    TensorSpec,
)
from treefold.common.tree import Node
from treefold.server import lateness
from treefold.server.chains import Chain
from treefold.server.holding import Shard, Wait
from treefold.server.rounds import Held, RoundState
from treefold.wire.membership import MS
from treefold.wire.messages import RoundMeta
from treefold.wire.words import Need

AFTER = lateness.LATE_AFTER_MS * MS
PERIOD = 400 * MS  # of the rounds before


def make_shard(table: int, rule: Rule = Rule.OPTIMIZER) -> Shard:
    """A shard of one part that has published versions 0 and 1, and takes `PERIOD` for a round."""
    optimizer = OptimizerSpec("SGD", [{"lr": 0.1}]) if rule is Rule.OPTIMIZER else None
    tensor = TensorSpec("w", [4], Dtype.FLOAT32, 0)
    spec = TableSpec(f"t{table}", rule, Placement.ELEMENTWISE, [tensor], optimizer)
    shard = Shard(
        table, 0, 1, Chain(1, 1, 1), spec, ShardSpan(0, 1), [(0, 4)], [1], [Dtype.FLOAT32]
    )
    for now_ns in (1, 1 + PERIOD):
        if shard.round is not None:
            shard.publish(now_ns, shard.round)
    return shard


def want(now_ns: int, shard: Shard) -> None:
    """Somebody waits for the version that the shard collects."""
    shard.waits["worker"] = Wait(shard.version + 1, {0: None})
    lateness.begin(now_ns, shard)


def bring(now_ns: int, shard: Shard, slot: int) -> None:
    """A contribution of one of four slots arrives."""
    assert shard.round is not None
    if shard.round.active == 0:
        shard.round.open(4, 1)
        lateness.open_round(now_ns, shard)
    shard.round.take(0, Node(0, slot), 1, Held(None, 1), [])


def reports(now_ns: int, *shards: Shard) -> list[tuple[int, list[int]]]:
    """What is reported of these shards."""
    return lateness.reports(now_ns, {(shard.table, 0): shard for shard in shards})


def test_a_round_of_which_nothing_comes_is_late_half_a_round_after_its_usual_time() -> None:
    shard = make_shard(0)
    want(0, shard)
    assert reports(PERIOD * 3 // 2 - 1, shard) == []
    assert reports(PERIOD * 3 // 2, shard) == [(1, [])]


def test_a_round_is_late_half_its_usual_time_after_its_first_contribution() -> None:
    shard = make_shard(0)
    want(0, shard)
    bring(0, shard, 2)
    assert reports(PERIOD // 2 - 1, shard) == []
    assert reports(PERIOD // 2, shard) == [(1, [0, 1, 3])]


def test_a_late_round_is_reported_again_as_long_as_it_is_not_complete() -> None:
    shard = make_shard(0)
    want(0, shard)
    bring(0, shard, 2)
    reports(PERIOD // 2, shard)
    assert reports(PERIOD // 2 + 1, shard) == []
    bring(PERIOD, shard, 3)
    assert reports(PERIOD, shard) == [(1, [0, 1])]


def test_tiny_rounds_are_not_called_late_at_once() -> None:
    shard = make_shard(0)
    shard.round_time_ns = 1
    want(0, shard)
    assert reports(AFTER - 1, shard) == []
    assert reports(AFTER, shard) == [(1, [])]


def test_a_round_is_reported_once_for_all_shards_with_what_any_of_them_lacks() -> None:
    first, second = make_shard(0), make_shard(1)
    for shard, slots in ((first, (0, 1, 2)), (second, (0, 1))):
        want(0, shard)
        for slot in slots:
            bring(0, shard, slot)
    assert reports(PERIOD, first, second) == [(1, [0, 2, 3])]
    assert reports(PERIOD + 1, first, second) == []


def test_a_round_that_nobody_waits_for_is_not_late() -> None:
    shard = make_shard(0)
    want(0, shard)
    shard.waits.clear()
    assert reports(10 * PERIOD, shard) == []
    assert shard.late_ns is None


def test_a_round_that_waits_for_the_norm_is_not_late() -> None:
    shard = make_shard(0)
    want(0, shard)
    bring(0, shard, 0)
    assert shard.round is not None
    shard.round.state = RoundState.MEASURING
    shard.round.meta = RoundMeta(1, 1, 1, 0, 0, 1, 4, [], 1.0, b"")
    assert reports(10 * PERIOD, shard) == []


def test_a_round_that_was_measured_and_lacks_the_end_of_slot_0_is_late() -> None:
    shard = make_shard(0)
    want(0, shard)
    for slot in range(4):
        bring(0, shard, slot)
    assert shard.round is not None
    shard.round.state = RoundState.MEASURING
    assert reports(10 * PERIOD, shard) == [(1, [0])]


def test_initial_values_and_constant_tables_are_never_late() -> None:
    constant = make_shard(0, Rule.CONSTANT)
    lateness.begin(0, constant)
    assert constant.late_ns is None


def test_a_pause_of_the_script_does_not_count_as_a_long_round() -> None:
    shard = make_shard(0)
    assert shard.round is not None
    shard.publish(1 + PERIOD + 100 * PERIOD, shard.round)
    assert shard.round_time_ns < 2 * PERIOD


def test_a_round_of_an_asynchronous_table_takes_as_long_as_a_version_of_every_slot() -> None:
    shard = make_shard(0)
    rule = Consistency(ConsistencyKind.ASYNC)
    shard.spec = msgspec.structs.replace(shard.spec, consistency=rule)
    shard.applied = msgspec.structs.replace(NOTHING_APPLIED, clocks=[3, 3, 2, 3])
    shard.waits["worker"] = Wait(0, {0: None}, Need(0, 0, 3, 0, 4))
    lateness.begin(0, shard)
    assert reports(4 * PERIOD, shard) == []
    assert reports(6 * PERIOD, shard) == [(2, [2])]
