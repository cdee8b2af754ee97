"""Shards move to servers that have less to do, and only where that is worth it."""

from treefold.common.layout import BLOCK_ELEMENTS
from treefold.common.spec import (
    Dtype,
    OptimizerSpec,
    Placement,
    Rule,
    TableSpec,
    TensorSpec,
)
from treefold.scheduler.chains import Chains
from treefold.scheduler.declared import Declared, TableState
from treefold.scheduler.members import Happening, MemberState, Roster
from treefold.scheduler.moving import REST_MS, ROUNDS_MIN, Moves
from treefold.wire.membership import MS
from treefold.wire.messages import ChainSynced, Heartbeat
from treefold.wire.words import Member, Role

SHARDS = 8
STEPS_MAX = 100


class Cluster:
    """A scheduler's knowledge of servers and one table of eight shards of four blocks each."""

    def __init__(self, servers: int, replicas: int = 1) -> None:
        self.roster, self.declared = Roster(), Declared()
        self.chains = Chains(self.roster, self.declared, replicas)
        self.moves = Moves(self.roster, self.chains)
        self.now_ns, self.view, self.round = 0, 1, 0
        for _ in range(servers):
            self.join()
        tensor = TensorSpec("w", [4 * SHARDS * BLOCK_ELEMENTS], Dtype.FLOAT32, 0)
        optimizer = OptimizerSpec("SGD", [{"lr": 0.1}])
        spec = TableSpec("t", Rule.OPTIMIZER, Placement.ELEMENTWISE, [tensor], optimizer)
        self.declared.tables.append(TableState(spec, [99]))
        self.declared.place(1, list(range(1, servers + 1)), [99], replicas)
        self.settle()

    def join(self) -> None:
        """One more server, with the next incarnation."""
        self.roster.enroll(Member(Role.SERVER, -1, 0, "", "", 0), None, 0, 0)

    def lose(self, state: MemberState) -> None:
        """A server falls silent, and chains go on without it."""
        self.roster.part(state, Happening.SILENCE, None)
        self.view += 1
        self.chains.mend(self.view)

    def settle(self) -> None:
        """Let every step be taken, every copy arrive and every chain be confirmed."""
        for _ in range(STEPS_MAX):
            for state in self.roster.live():
                self.chains.confirm(state.member.incarnation, self.view)
            self.view += 1
            is_moving = self.chains.mend(self.view)
            for place in [p for t in self.declared.places for p in t.shards if p.joining]:
                who = place.joining[0]
                synced = ChainSynced(place.server, 0, place.shard, place.chain_view, who)
                is_moving |= self.chains.on_synced(synced, self.view)
            if not is_moving:
                return
        raise AssertionError("the chains do not come to rest")

    def beat(self, costs_ns: dict[int, int]) -> None:
        """Rounds pass in which a block costs each server so much."""
        self.round += ROUNDS_MIN
        for state in self.roster.live():
            who = state.member.incarnation
            before = 0 if state.beat is None else state.beat.spent_ns["fold"]
            spent = before + costs_ns[who] * self.chains.load.get(who, 0) * ROUNDS_MIN
            beat = Heartbeat(who, 1, 1, self.round, 0, 0, None, "", 0, 0.0, {"fold": spent})
            state.beat = beat

    def balance(self, costs_ns: dict[int, int] | None = None) -> int:
        """Let shards move until none is worth it any more; returns how many did."""
        count = 0
        while True:
            for _ in range(2):
                if costs_ns is not None:
                    self.beat(costs_ns)
                self.now_ns += REST_MS * MS
                self.view += 1
                if self.moves.begin(self.now_ns, self.view):
                    count += 1
                    assert count <= STEPS_MAX, "shards move to and fro"
                    self.settle()
                    break
            else:
                return count

    @property
    def load(self) -> list[int]:
        """Blocks on each server."""
        return [self.chains.load.get(s.member.incarnation, 0) for s in self.roster.live()]


def test_a_server_that_joins_takes_its_share() -> None:
    cluster = Cluster(1)
    assert cluster.load == [32]
    cluster.join()
    assert cluster.balance() == 4
    assert cluster.load == [16, 16]
    cluster.join()
    cluster.join()
    cluster.balance()
    assert cluster.load == [8, 8, 8, 8]


def test_copies_are_moved_as_primaries_are_and_stay_on_servers_of_their_own() -> None:
    cluster = Cluster(2, replicas=2)
    assert cluster.load == [32, 32]
    cluster.join()
    cluster.join()
    cluster.balance()
    assert cluster.load == [16, 16, 16, 16]
    for place in cluster.declared.places[0].shards:
        assert len({place.server, *place.backups}) == 2
        assert place.joining == []
    assert cluster.chains.moving == {}


def test_a_server_with_half_the_speed_ends_with_about_half_the_load() -> None:
    cluster = Cluster(2)
    cluster.balance({1: 2 * MS, 2: MS})
    assert cluster.load == [12, 20]


def test_what_is_balanced_already_stays() -> None:
    cluster = Cluster(2)
    assert cluster.balance() == 0
    assert cluster.balance({1: MS, 2: MS}) == 0
    assert cluster.balance({1: MS, 2: MS * 11 // 10}) == 0


def test_one_shard_moves_at_a_time_and_none_while_a_copy_is_missing() -> None:
    cluster = Cluster(1)
    cluster.join()
    cluster.now_ns += REST_MS * MS
    assert cluster.moves.begin(cluster.now_ns, cluster.view)
    cluster.now_ns += REST_MS * MS
    assert not cluster.moves.begin(cluster.now_ns, cluster.view)
    assert sum(bool(place.joining) for place in cluster.declared.places[0].shards) == 1


def test_the_time_of_servers_with_next_to_nothing_to_do_is_not_believed() -> None:
    cluster = Cluster(2)
    assert cluster.balance({1: 3_000, 2: 1_000}) == 0


def test_a_move_to_a_server_that_dies_is_forgotten() -> None:
    cluster = Cluster(1)
    cluster.join()
    cluster.now_ns += REST_MS * MS
    cluster.moves.begin(cluster.now_ns, cluster.view)
    cluster.roster.part(cluster.roster.by_incarnation[2], Happening.SILENCE, None)
    cluster.settle()
    assert cluster.chains.moving == {}
    assert cluster.load == [32]


def test_a_backup_that_nobody_has_confirmed_is_promoted_if_it_alone_is_left() -> None:
    cluster = Cluster(2, replicas=2)
    first, second = cluster.roster.live()
    cluster.lose(second)
    cluster.join()
    cluster.view += 1
    cluster.chains.mend(cluster.view)
    (place, *_) = cluster.declared.places[0].shards
    server, (new,) = first.member.incarnation, place.joining
    cluster.chains.on_synced(
        ChainSynced(server, 0, place.shard, place.chain_view, new), cluster.view
    )
    cluster.lose(first)
    places = cluster.declared.places[0].shards
    assert places[0].server == new
    assert cluster.chains.lost == [(0, number) for number in range(1, SHARDS)]


def test_a_backup_that_was_confirmed_is_promoted_before_one_that_was_not() -> None:
    cluster = Cluster(3, replicas=3)
    place = cluster.declared.places[0].shards[0]
    leader = cluster.roster.by_incarnation[place.server]
    gone = cluster.roster.by_incarnation[place.backups[0]]
    cluster.lose(gone)
    cluster.join()
    cluster.view += 1
    cluster.chains.mend(cluster.view)
    place = cluster.declared.places[0].shards[0]
    confirmed, (new,) = place.backups[0], place.joining
    synced = ChainSynced(place.server, 0, place.shard, place.chain_view, new)
    cluster.chains.on_synced(synced, cluster.view)
    cluster.lose(leader)
    assert cluster.declared.places[0].shards[0].server == confirmed
