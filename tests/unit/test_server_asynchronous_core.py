"""A server's decisions about asynchronous tables: what is applied, once, and who is answered."""

import math

import msgspec
import pytest
from msgspec.structs import replace

from tests.unit.server_driver import (
    GROUPS,
    JOB,
    ME,
    SPEC,
    WORKER,
    control,
    data,
    member,
    meta,
    of,
    push,
    sent,
    view,
)
from treefold.common import layout
from treefold.common.round_state import Applied, decode_applied
from treefold.common.spec import Compensation, Consistency, ConsistencyKind, Hyper
from treefold.server.asynchronous import LIMIT_MS, STAGED_MAX
from treefold.server.core import ServerCore
from treefold.server.effects import (
    CorrectParts,
    Effect,
    MakeParts,
    RecordVersion,
    ReleasePayload,
    SaveShard,
)
from treefold.wire.chain import ChainApplied, ChainRound
from treefold.wire.exchange import Received, Tick
from treefold.wire.membership import MS
from treefold.wire.messages import (
    AssignTable,
    ChainDiffers,
    Heartbeat,
    HeartbeatSeen,
    PartMissing,
    Published,
    Pull,
    Refused,
    RoundLate,
    RoundStatus,
    View,
)
from treefold.wire.words import (
    Code,
    Leases,
    Member,
    Need,
    Phase,
    Role,
    ShardPlace,
    TablePlace,
)

ASYNC = Consistency(ConsistencyKind.ASYNC)
BACKUP = 7


@pytest.fixture(autouse=True)
def _tiny_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight elements make two parts of one block each."""
    monkeypatch.setattr(layout, "BLOCK_ELEMENTS", 4)
    monkeypatch.setattr(layout, "PART_BLOCKS_MAX", 1)


def begun(rule: Consistency = ASYNC) -> ServerCore:
    """A server whose shard has its initial values."""
    core = member()
    control(core, AssignTable(0, replace(SPEC, consistency=rule)))
    control(core, view(2))
    for part in (0, 1):
        data(core, push(-1, 0, part=part, active=1), part + 1)
    return core


def contribute(core: ServerCore, round_: int, slot: int, sender: int = 5) -> list[Effect]:
    """Send all of a contribution; returns what its last message makes the server do."""
    for part in (0, 1):
        first = 1000 * sender + 100 * round_ + 10 * slot
        data(core, push(round_, slot, part=part, sender=sender), first + part)
    return data(core, meta(round_, slot=slot, sender=sender, state=b"%d" % round_))


def ask(
    core: ServerCore, need: Need | None, attempt: int = 0, peer: bytes = WORKER
) -> list[Effect]:
    """Pull with a need."""
    pull = Pull(JOB, 5, 2, 0, 0, 0, attempt, [], need)
    return core.handle(0, Received(peer, pull))


def versions(effects: list[Effect]) -> list[int]:
    """Versions that are told of."""
    return [one.version for one in sent(effects, Published) if isinstance(one, Published)]


def test_a_contribution_is_applied_as_soon_as_all_of_it_is_here() -> None:
    core = begun()
    effects = data(core, meta(0, slot=1))
    effects += data(core, push(0, 1, part=0), 10)
    assert not of(effects, MakeParts)
    effects = data(core, push(0, 1, part=1), 11)
    (made,) = of(effects, MakeParts)
    assert isinstance(made, MakeParts)
    assert (made.version, made.groups) == (1, GROUPS)
    assert [part.root for part in made.parts] == [10, 11]
    assert core.shards[0, 0].version == 1


def test_contributions_of_slots_are_applied_in_the_order_in_which_they_are_whole() -> None:
    core = begun()
    data(core, push(0, 0, part=0), 10)
    contribute(core, 0, 1)
    effects = data(core, push(0, 0, part=1), 11) + data(core, meta(0))
    assert core.shards[0, 0].applied.clocks == [1, 1]
    (record,) = of(effects, RecordVersion)
    assert isinstance(record, RecordVersion)
    assert (record.version, record.contributors) == (2, [(0, 0, 5)])


def test_a_contribution_that_comes_twice_is_applied_once() -> None:
    core = begun()
    contribute(core, 0, 1)
    effects = contribute(core, 0, 1)
    again = data(core, push(0, 1, part=0), 77)
    assert not of(effects, MakeParts)
    assert ReleasePayload(77) in again
    assert core.shards[0, 0].version == 1


def test_of_two_workers_with_one_slot_the_first_that_is_whole_counts() -> None:
    core = begun()
    data(core, push(0, 1, part=0, sender=6), 60)
    effects = contribute(core, 0, 1, sender=5)
    (made,) = of(effects, MakeParts)
    assert isinstance(made, MakeParts)
    assert [part.root for part in made.parts] == [5010, 5011]
    assert ReleasePayload(60) in effects
    assert ReleasePayload(61) in data(core, push(0, 1, part=1, sender=6), 61)


def test_contributions_that_never_become_whole_do_not_pile_up() -> None:
    core = begun()
    released = []
    for sender in range(10, 10 + STAGED_MAX + 2):
        released += of(data(core, push(0, 1, part=0, sender=sender), sender), ReleasePayload)
    assert released == [ReleasePayload(10), ReleasePayload(11)]
    assert of(contribute(core, 0, 1, sender=5), MakeParts)


def test_slots_that_there_are_not_do_not_fill_the_memory() -> None:
    core = begun()
    control(core, replace(view(3), leases=Leases(0, [5, 6])))
    pushed = push(0, 2, part=0, view=3, sender=9, active=60_000)
    assert of(data(core, pushed, 22), ReleasePayload) == [ReleasePayload(22)]
    assert core.shards[0, 0].staged == {}
    data(core, push(0, 1, part=0, view=3), 21)
    assert list(core.shards[0, 0].staged) == [(1, 5)]


def test_many_slots_of_one_sender_may_be_on_their_way() -> None:
    core = begun()
    slots = range(2 * STAGED_MAX)
    for part in (0, 1):
        for slot in slots:
            data(core, push(0, slot, part=part, active=len(slots)), 100 * slot + part)
    for slot in slots:
        data(core, meta(0, slot=slot, active=len(slots)))
    assert core.shards[0, 0].version == len(slots)


def test_a_pull_waits_for_what_it_needs_and_gets_the_newest_version() -> None:
    core = begun()
    assert versions(ask(core, Need(1, 1))) == []
    assert versions(contribute(core, 0, 0)) == []
    effects = contribute(core, 0, 1)
    assert versions(effects) == [2]
    (word,) = sent(effects, Published)
    assert isinstance(word, Published)
    assert decode_applied(word.state).clocks == [1, 1]
    assert versions(ask(core, None)) == [2]


def test_the_end_of_a_pass_waits_for_every_slot_that_takes_part_in_its_last_round() -> None:
    core = begun()
    for round_, slot in ((0, 0), (0, 1), (0, 2), (1, 0)):
        contribute_of_three(core, round_, slot)
    assert versions(ask(core, Need(0, 0, 1, 1, 3))) == [4]  # the last round has one slot
    assert versions(ask(core, Need(0, 0, 1, 2, 3))) == []
    assert versions(contribute_of_three(core, 1, 1)) == [5]


def contribute_of_three(core: ServerCore, round_: int, slot: int) -> list[Effect]:
    """The same in a job with three slots."""
    for part in (0, 1):
        payload = 100 * round_ + 10 * slot + part + 50
        data(core, push(round_, slot, part=part, active=3), payload)
    return data(core, meta(round_, slot=slot, active=3))


def test_who_asks_again_is_told_what_is_lacking_of_the_contribution() -> None:
    core = begun()
    data(core, push(0, 1, part=1), 10)
    (status,) = sent(ask(core, Need(1, 1), attempt=1), RoundStatus)
    assert isinstance(status, RoundStatus)
    assert (status.round, [one.part for one in status.missing]) == (0, [0])
    assert status.is_meta_missing
    contribute(core, 0, 1)
    assert versions(ask(core, Need(1, 1), attempt=2)) == [1]


def test_with_a_bound_no_slot_gets_further_ahead_than_it_says() -> None:
    core = begun(Consistency(ConsistencyKind.SSP, 1))
    contribute(core, 0, 0)
    assert of(contribute(core, 1, 0), MakeParts)
    (refused,) = sent(contribute(core, 2, 0), Refused)
    assert isinstance(refused, Refused)
    assert refused.code is Code.FUTURE_ROUND
    assert "slot 0 is at round 2, 2 ahead of slot 1, and at most 1 (staleness)" in refused.text
    contribute(core, 0, 1)
    assert of(contribute(core, 2, 0), MakeParts)


def test_without_a_bound_a_slot_may_be_as_far_ahead_as_it_gets() -> None:
    core = begun()
    for round_ in range(5):
        assert of(contribute(core, round_, 0), MakeParts)


def test_a_pass_begins_at_its_first_round_whatever_slots_did_before() -> None:
    core = begun(Consistency(ConsistencyKind.SSP, 0))
    contribute(core, 0, 0)  # the only slot of the last round of a pass before
    effects = data(core, meta(1, slot=0, first=1))
    assert not sent(effects, Refused)
    assert sent(data(core, meta(2, slot=0, first=1)), Refused)


def test_rounds_of_a_slot_come_in_turn_and_only_of_slots_that_there_are() -> None:
    core = begun()
    (early,) = sent(data(core, meta(1, slot=1)), Refused)
    assert isinstance(early, Refused)
    assert early.code is Code.FUTURE_ROUND
    assert "slot 1 is at round 0, round 1 is not its turn" in early.text
    (beyond,) = sent(data(core, meta(0, slot=2)), Refused)
    assert isinstance(beyond, Refused)
    assert "round 0 has 2 active slots, no slot 2" in beyond.text
    assert not sent(data(core, meta(7, slot=1, first=7)), Refused)


def test_folded_nodes_and_norm_limits_are_refused_by_name() -> None:
    core = begun()
    (folded,) = sent(data(core, push(0, 0, level=1), 9), Refused)
    assert isinstance(folded, Refused)
    assert "is not one slot" in folded.text
    (limited,) = sent(data(core, meta(0, norm_max=1.0)), Refused)
    assert isinstance(limited, Refused)
    assert "no norm that all slots share" in limited.text


def test_what_goes_with_a_version_is_of_the_slot_that_is_furthest_ahead() -> None:
    core = begun()
    for round_, slot in ((0, 0), (1, 0), (0, 1)):
        contribute(core, round_, slot)
    shard = core.shards[0, 0]
    assert (shard.applied.front, shard.applied.record) == (1, b"1")
    assert shard.applied.last == (0, 1, 5)


@pytest.mark.parametrize(
    ("rule", "rates"),
    [
        (ASYNC, [0.1, 0.1, 0.1]),
        (replace(ASYNC, compensation=Compensation.LR_STALENESS), [0.1, 0.1, 0.1 / 2]),
    ],
)
def test_stale_contributions_are_counted_and_compensated_as_the_table_says(
    rule: Consistency, rates: list[float]
) -> None:
    core = begun(rule)
    found = []
    for slot, base in enumerate((0, 0, 0)):
        for part in (0, 1):
            data(core, push(0, slot, part=part, active=3), 10 * slot + part + 50)
        effects = data(core, meta(0, slot=slot, active=3, base=base))
        (made,) = of(effects, MakeParts)
        assert isinstance(made, MakeParts)
        assert made.groups is not None
        found.append(made.groups[0]["lr"])
    assert found == rates
    assert core.exchange.asynchronous.stale[0, 5][:4] == [1, 1, 1, 0]
    control(core, HeartbeatSeen(3, 2))
    (beat,) = sent(core.handle(10**9, Tick()), Heartbeat)
    assert isinstance(beat, Heartbeat)
    assert beat.staleness[0][:2] == (0, 5)


def test_a_momentum_is_corrected_by_the_mean_staleness_so_far() -> None:
    core = begun(replace(ASYNC, compensation=Compensation.MOMENTUM))
    groups: list[Hyper] = [{"lr": 0.1, "momentum": 0.9}]
    found = []
    for slot in range(3):
        for part in (0, 1):
            data(core, push(0, slot, part=part, active=3), 10 * slot + part + 50)
        message = replace(meta(0, slot=slot, active=3, base=0), groups=groups)
        (made,) = of(data(core, message), MakeParts)
        assert isinstance(made, MakeParts)
        assert made.groups is not None
        found.append(made.groups[0]["momentum"])
    assert found == pytest.approx([0.9, 0.9 - 0.5 / 1.5, 0.9 - 1 / 2])


def test_a_correction_is_made_of_the_only_contribution_before_it_is_stepped() -> None:
    rule = replace(ASYNC, compensation=Compensation.DC_ASGD, strength=0.5, versions=2)
    core = begun(rule)
    contribute(core, 0, 1)
    for part in (0, 1):
        data(core, push(0, 2, part=part, active=3), 70 + part)
    effects = data(core, meta(0, slot=2, active=3, base=0))
    corrected, made = [e for e in effects if isinstance(e, CorrectParts | MakeParts)]
    assert isinstance(corrected, CorrectParts)
    assert isinstance(made, MakeParts)
    assert (corrected.base, corrected.active, made.version) == (0, 3, 2)
    assert corrected.parts == made.parts
    assert [one.root for one in made.parts] == [70, 71]


def test_a_copy_that_has_applied_what_nobody_else_has_does_not_count() -> None:
    core = member()
    control(core, AssignTable(0, replace(SPEC, consistency=ASYNC)))
    place = ShardPlace(0, 2, 0, 2, ME, 2, [BACKUP])
    table = TablePlace(0, "t", 5, [place])
    leased = Leases(0, [])
    backup = Member(Role.SERVER, 1, BACKUP, "tcp://10.0.0.2:1", "host", 1)
    control(core, View(2, Phase.RUNNING, 5, [backup], [table], leased, leased))
    control(core, HeartbeatSeen(ME, 2, 2))
    for part in (0, 1):
        data(core, push(-1, 0, part=part, active=1), part + 1)
    core.handle(0, Received(BACKUP, applied(0, (0, 0, 0))))
    contribute(core, 0, 1)
    ask(core, Need(1, 1))
    effects = core.handle(0, Received(BACKUP, applied(1, (0, 0, 9))))
    assert sent(effects, ChainDiffers)
    assert not versions(effects)
    effects = core.handle(0, Received(BACKUP, applied(1, (0, 1, 5))))
    assert not sent(effects, ChainDiffers)
    assert versions(effects) == [1]


def test_a_backup_makes_nothing_of_a_version_before_it_has_all_of_it() -> None:
    core = member()
    control(core, AssignTable(0, replace(SPEC, consistency=ASYNC)))
    place = ShardPlace(0, 2, 0, 2, BACKUP, 2, [ME])
    table = TablePlace(0, "t", 5, [place])
    primary = Member(Role.SERVER, 1, BACKUP, "tcp://10.0.0.2:1", "host", 1)
    control(core, View(2, Phase.RUNNING, 5, [primary], [table], Leases(0, []), Leases(0, [])))
    relayed = {"sender": BACKUP, "active": 1}
    for part in (0, 1):
        core.handle(0, Received(b"chain", push(-1, 0, part=part, **relayed), (part + 1,)))
    core.handle(0, Received(b"chain", chain_round(-1, b"")))
    assert core.shards[0, 0].version == 0
    state = msgspec.msgpack.encode(Applied([0, 1], (0, 1, 5), 0, b""))
    first = core.handle(0, Received(b"chain", push(0, 0, part=0, **relayed), (10,)))
    said = core.handle(0, Received(b"chain", chain_round(0, state)))
    assert not of(first + said, MakeParts)
    last = core.handle(0, Received(b"chain", push(0, 0, part=1, **relayed), (11,)))
    (made,) = of(last, MakeParts)
    assert isinstance(made, MakeParts)
    assert [part.root for part in made.parts] == [10, 11]
    assert core.shards[0, 0].applied.clocks == [0, 1]


def chain_round(round_: int, state: bytes) -> ChainRound:
    """The primary says that a round is complete."""
    groups = [] if round_ < 0 else GROUPS
    return ChainRound(
        JOB, BACKUP, 2, 0, 0, round_, 1, groups, 0.0, math.nan, state, None, [(0, 1, 5)]
    )


def applied(version: int, last: tuple[int, int, int]) -> ChainApplied:
    """The backup says what it holds."""
    return ChainApplied(JOB, BACKUP, 2, 0, 0, 0, version, b"", last)


def test_a_server_waits_for_no_slot_in_particular() -> None:
    core = begun()
    assert core.exchange.waiting_for(core.shards[0, 0]) == ""
    rounds = begun(Consistency())
    assert rounds.exchange.waiting_for(rounds.shards[0, 0]) == "table t shard 0 round 0: any slot"


def test_a_synchronous_table_folds_as_before() -> None:
    core = begun(Consistency())
    effects = data(core, push(0, 1, part=0), 10) + data(core, meta(0, slot=1))
    assert not of(effects, MakeParts)
    assert core.shards[0, 0].staged == {}


def test_needs_are_met_by_clocks_of_slots_that_may_not_have_contributed() -> None:
    assert Need(0, 0).is_met([])
    assert not Need(1, 1).is_met([5])
    assert Need(1, 1).is_met([0, 1])
    assert Need(0, 0, 2, 0, 2).is_met([2, 2])
    assert not Need(0, 0, 2, 0, 3).is_met([2, 2])
    assert not Need(0, 0, 2, 2, 2).is_met([3, 2])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(Need(1, 2)), type=Need) == Need(1, 2)


def test_who_cannot_leave_a_round_is_told_which_slots_it_lacks() -> None:
    core = begun()
    contribute(core, 0, 0)
    data(core, push(0, 1, part=1, sender=5), 10)
    (status,) = sent(ask(core, Need(0, 0, 1, 0, 2), attempt=1), RoundStatus)
    assert isinstance(status, RoundStatus)
    assert (status.round, status.is_meta_missing) == (0, True)
    assert [(one.part, one.slots) for one in status.missing] == [(0, [1])]
    assert versions(contribute(core, 0, 1)) == [2]


def test_a_round_that_somebody_cannot_leave_is_reported_late_with_its_missing_slots() -> None:
    core = begun()
    contribute(core, 0, 0)
    ask(core, Need(0, 0, 1, 0, 2))
    due_ns = core.next_deadline_ns()
    late: list[object] = []
    while due_ns is not None and due_ns < 2_000 * MS and not late:
        late = sent(core.handle(due_ns, Tick()), RoundLate)
        due_ns = core.next_deadline_ns()
    assert late == [RoundLate(ME, 0, [1])]


def test_what_is_staler_than_the_bound_is_let_go_and_its_worker_told() -> None:
    core = begun(replace(ASYNC, staleness_max=1))
    for round_ in range(2):
        contribute(core, round_, 0)
    effects = contribute(core, 0, 1, sender=6)
    assert not of(effects, MakeParts)
    assert of(effects, ReleasePayload) == [ReleasePayload(6010), ReleasePayload(6011)]
    told = RoundStatus(0, 0, 0, [PartMissing(0, [1])], is_meta_missing=False, is_stale=True)
    assert sent(effects, RoundStatus) == [told]
    assert core.exchange.asynchronous.too_stale == 1
    for part in (0, 1):
        data(core, push(0, 1, part=part, sender=6), 70 + part)
    fresh = replace(meta(0, slot=1, sender=6), base=1)
    assert of(data(core, fresh), MakeParts), "one version behind is near enough"


def test_nothing_is_applied_beyond_what_somebody_reads_alike_for_a_moment() -> None:
    core = begun()
    contribute(core, 0, 0)
    assert versions(ask(core, Need(0, 0, exact=[1, 1]))) == []
    assert not of(contribute(core, 1, 0), MakeParts), "slot 0 is to wait"
    effects = contribute(core, 0, 1)
    assert versions(effects) == [2]
    assert core.shards[0, 0].applied.clocks == [1, 1]
    due_ns = core.next_deadline_ns()
    assert due_ns == LIMIT_MS * MS
    assert of(core.handle(due_ns, Tick()), MakeParts)
    assert core.shards[0, 0].applied.clocks == [2, 1]


def test_who_reads_alike_and_is_late_gets_what_is_in_and_no_more_is_applied() -> None:
    core = begun()
    contribute(core, 0, 0)
    contribute(core, 1, 0)
    assert versions(ask(core, Need(0, 0, exact=[1]))) == [2]
    assert not of(contribute(core, 0, 1), MakeParts)


def test_a_version_with_more_than_a_pass_in_it_is_not_saved_as_its_end() -> None:
    core = begun()
    core.membership.checkpoint, core.membership.checkpoint_every = "ckpt", 1
    for round_ in range(2):
        for slot in range(2):
            contribute(core, round_, slot)
    assert not of(ask(core, Need(0, 0, 0, 2, 2)), SaveShard), "somebody is late at its end"
    (saved,) = of(ask(core, Need(0, 0, 1, 2, 2)), SaveShard)
    assert isinstance(saved, SaveShard)
    assert saved.version == 4
