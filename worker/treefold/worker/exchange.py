"""A worker's exchange with servers: pulls, pushes, and what is sent again when a server asks.

Part of `treefold.worker.core` in a file of its own; just as pure. Effects are appended to the
core's list.
"""

from collections.abc import Collection

from treefold.common.lineup import Lineup
from treefold.common.plan import LoopPlan
from treefold.common.spec import Rule
from treefold.wire.exchange import Send
from treefold.wire.links import Links
from treefold.wire.membership import MS, Membership
from treefold.wire.messages import (
    Published,
    Pull,
    Pulled,
    RoundStatus,
    View,
)
from treefold.wire.words import INITIAL_ROUND, Need, Phase, Role
from treefold.worker.aligned import Alignment
from treefold.worker.asynchronous import Asynchronous
from treefold.worker.effects import (
    Connect,
    Contributed,
    Disconnect,
    Effect,
    HyperKnown,
    ReleasePayload,
    Retire,
    SlotFinished,
    Snapshot,
)
from treefold.worker.pulls import ShardPull, Table
from treefold.worker.rounds import Held, LocalRound, Pushed
from treefold.worker.sending import Sending
from treefold.worker.streams import Stream, torn_version

NOTHING_HELD = -1
# A server may hear of a new table, or of a shard that it leads now, a little later than its
# workers, and does not answer until then. Doubles each time.
FIRST_RETRY_MS = 20


class Exchange:
    """Tables of a worker and the messages about them.

    Parameters
    ----------
    membership : Membership
        Who this worker is.
    retry_ns : int
        Silence after which a server is asked again.
    out : list of Effect
        The core's effects.

    Attributes
    ----------
    tables : dict of int to Table
        By number.
    local : LocalRound or None
        The round being computed.
    plan : LoopPlan or None
        The pass over the data that the script is in.
    asked_ns : int
        When a version was last asked for, retries left aside.
    stream : Stream
        The version whose parts are handed on as they come, if there is one.
    sending : Sending
        What is sent of this worker's slots.
    alignment : Alignment
        The read of all shards alike, if there is one.
    """

    def __init__(self, membership: Membership, retry_ns: int, out: list[Effect]) -> None:
        self.membership = membership
        self.retry_ns = retry_ns
        self.tables: dict[int, Table] = {}
        self.local: LocalRound | None = None
        self.plan: LoopPlan | None = None
        self.asked_ns = 0
        self._trained: list[Table] = []
        self._folded: list[Table] = []
        self._sorted = 0
        self._links = Links()
        self._out = out
        self.stream = Stream(self, out)
        self.asynchronous = Asynchronous(self)
        self.sending = Sending(self, membership, out)
        self.alignment = Alignment(self, out)

    def trained(self) -> list[Table]:
        """Tables that have rounds."""
        self._sort()
        return self._trained

    def folded(self) -> list[Table]:
        """Those of them in which a round is one step."""
        self._sort()
        return self._folded

    def _sort(self) -> None:
        """Note what kind of table each is; there are more of them now and then, and never fewer."""
        if self._sorted != len(self.tables):
            tables = self.tables.values()
            self._sorted = len(tables)
            self._trained = [table for table in tables if table.spec.rule is Rule.OPTIMIZER]
            self._folded = [table for table in self._trained if not table.spec.is_asynchronous]

    @property
    def is_declaring(self) -> bool:
        """Whether the script waits for the first version of a table."""
        return any(table.declare_call is not None for table in self.tables.values())

    @property
    def is_waited_for(self) -> bool:
        """Whether the script waits for a server, beside its call for a slot."""
        return self.is_declaring or self.stream.is_open or self.alignment.call is not None

    @property
    def is_unplaced(self) -> bool:
        """Whether a declared table waits for a view that says where it is."""
        tables = self.tables.values()
        return any(table.declare_call is not None and not table.pulls for table in tables)

    @property
    def is_asking(self) -> bool:
        """Whether a server owes a part of a version."""
        return any(table.pulls and not table.is_pulled for table in self.tables.values())

    def link(self, view: View) -> None:
        """Have links to servers of a view alone: what is queued for others would keep us here."""
        servers = {m.incarnation: m.address for m in view.members if m.role is Role.SERVER}
        used = [*view.tables, *(t.place for t in self.tables.values() if t.place is not None)]
        leading = {shard.server: None for place in used for shard in place.shards}
        gone, new = self._links.follow(servers, leading)
        self._out += [Disconnect(who) for who in gone]
        self._out += [Connect(who, address) for who, address in new.items()]

    def settle(self, now_ns: int, view: View | None) -> None:
        """Begin the first pull of every table that has its place by now.

        A shard that has another primary than before is asked for again there at once.
        """
        if view is None or view.phase is Phase.ENDED:  # then servers may be gone
            return
        for place in view.tables:
            table = self.tables.get(place.table)
            if table is None:
                continue
            moved = table.settle(place)
            if moved:
                self._out.append(Retire())
                self.asynchronous.is_moved = True
            for shard in moved:
                pull = table.pulls.get(shard)
                if pull is not None and not pull.is_complete:
                    pull.status = None
                    pull.attempt += 1
                    pull.delay_ns = FIRST_RETRY_MS * MS
                    pull.deadline_ns = now_ns + pull.delay_ns
                    self._send_pull(table, shard)
            if table.declare_call is not None and not table.pulls:
                self.pull(now_ns, table, 0, attempt=1)

    def open_round(self, number: int, plan: LoopPlan, tried: Lineup | None = None) -> LocalRound:
        """Begin this worker's share of a round."""
        parts = {table.number: len(table.parts) for table in self.trained()}
        apart = [table.number for table in self.trained() if table.spec.is_asynchronous]
        self.local = LocalRound(number, plan, parts, tried, apart)
        if tried is None and any(table.spec.is_guarded for table in self.trained()):
            self.local.take_apart()
        return self.local

    def catch_up(self, now_ns: int, position: int) -> None:
        """Bring tables that were declared at different versions to one."""
        if not self.is_at(position):
            for table in self.trained():
                if not table.pulls:
                    self.pull(now_ns, table, position, attempt=0)

    def is_at(self, position: int) -> bool:
        """Whether the script has of every table what a round begins with."""
        is_held = all(table.held == position for table in self.folded())
        return is_held and self.asynchronous.has_all_before(position)

    def has_all_before(self, now_ns: int, table: Table, round_: int) -> bool:
        """Whether what was pulled of an asynchronous table will do; asks for more if not."""
        if self.asynchronous.is_met(table, round_):
            return True
        self.pull(now_ns, table, round_, attempt=0)
        return False

    def hand_over(self) -> list[Snapshot]:
        """What was pulled of every table, for the script."""
        for table in self.trained():
            if table.spec.is_asynchronous:
                self.asynchronous.handed_over(table)
        return [table.snapshot() for table in self.trained()]

    def next_deadline_ns(self) -> int | None:
        """When a pull is to be sent again."""
        due_ns: int | None = None
        for table in self.tables.values():
            for pull in table.pulls.values():
                is_sooner = due_ns is None or pull.deadline_ns < due_ns
                if is_sooner and not pull.is_complete:
                    due_ns = pull.deadline_ns
        return due_ns

    def take(self, now_ns: int, pulled: Pulled, payloads: tuple[int, ...]) -> Table | None:
        """Take in parts of a version; the table if all of its shards are here now."""
        table = self.tables.get(pulled.table)
        pull = table.pulls.get(pulled.shard) if table else None
        last = pulled.part + pulled.count - 1
        if table is None or pull is None or pull.is_complete or last >= pull.parts_count:
            self._out += [ReleasePayload(payload) for payload in payloads]
            return None
        was = pull.version
        pull.take(pulled, payloads, self._out)
        return self._taken(now_ns, table, pull, is_newer=pull.version > was)

    def take_word(self, now_ns: int, published: Published) -> Table | None:
        """A version of a shard is whole; the table if all of its shards are here now."""
        table = self.tables.get(published.table)
        pull = table.pulls.get(published.shard) if table else None
        if table is None or pull is None or pull.is_complete:
            return None
        was = pull.version
        pull.finish(published, self._out)
        return self._taken(now_ns, table, pull, is_newer=pull.version > was)

    def _taken(self, now_ns: int, table: Table, pull: ShardPull, *, is_newer: bool) -> Table | None:
        pull.deadline_ns = now_ns + pull.delay_ns
        pull.heard_ns = now_ns
        pull.status = None
        if self.stream.is_open and table.spec.rule is Rule.OPTIMIZER:
            self.stream.on_taken(now_ns, is_newer=is_newer)
            return None
        if self.alignment.call is not None:
            self.alignment.on_pulled(now_ns)
            return None
        is_begun = table.declare_call is None and pull.is_begun
        return table if is_begun or (pull.is_complete and table.is_pulled) else None

    def contribute(self, leaf: Contributed) -> None:
        """Take in parts of a slot; push what cannot grow here."""
        local = self.local
        slot = None if local is None else local.slot_of(leaf.round, leaf.slot)
        is_over = leaf.table in self.tables and self.tables[leaf.table].is_pulled
        is_over = is_over and not self.stream.is_open
        if local is None or slot is None or is_over:
            self._out += [ReleasePayload(payload) for payload in leaf.payloads]
            return
        pushed: list[tuple[tuple[int, int], Pushed]] = []
        for number in range(leaf.count):
            key = (leaf.table, leaf.part + number)
            payload = leaf.payloads[number] if leaf.payloads else None
            if local.has(key, slot):
                self._out += [] if payload is None else [ReleasePayload(payload)]
                continue
            mask = int.from_bytes(leaf.absent[number], "little") if leaf.absent else 0
            ready = local.contribute(key, slot, Held(payload, mask), self._out)
            pushed += [(key, one) for one in ready]
        self.sending.push(pushed, local)

    def know_hyper(self, event: HyperKnown) -> None:
        """Tell servers early what slot 0 steps with."""
        local, table = self.local, self.tables.get(event.table)
        if local is None or table is None or event.slot != 0 or event.round != local.number:
            return
        if table.spec.is_asynchronous or table.spec.is_gathered:
            return  # nothing is stepped before all of it is there
        local.hypers[event.table] = event
        for shard in table.place.shards if table.place else []:
            self.sending.send_hyper(table, shard.shard, local)

    def finish(self, event: SlotFinished) -> None:
        """The loop body of a slot is over: what it did not contribute is absent."""
        local = self.local
        slot = None if local is None else local.slot_of(event.round, event.slot)
        if local is None or slot is None:
            return
        local.done[slot] = None
        for table in self.trained():
            for number, part in enumerate(table.parts):
                if not local.has((table.number, number), slot):
                    marks = ((1 << part.pieces) - 1).to_bytes(-(-part.pieces // 8), "little")
                    self.contribute(
                        Contributed(table.number, number, 1, event.round, event.slot, (), [marks])
                    )
            counts = slot == 0 or table.spec.is_asynchronous or table.spec.is_gathered
            if counts and table.number in event.metas:
                local.metas[table.number, slot] = event.metas[table.number]
                for shard in table.place.shards if table.place else []:
                    self.sending.send_meta(table, shard.shard, local, slot)
        local.in_hand = None

    def retry(self, now_ns: int) -> None:
        """Send again what was not answered in time."""
        late = [
            (table, shard, pull)
            for table in self.tables.values()
            for shard, pull in table.pulls.items()
            if now_ns >= pull.deadline_ns and not pull.is_complete
        ]
        if not late:
            return
        trained = self.trained()
        version = torn_version(self, [pull for table, _, pull in late if table in trained])
        if version is not None:
            for table in self.trained():
                if table.pulls:
                    self.pull(now_ns, table, version, attempt=1)
            return
        for table, shard, pull in late:
            pull.backoff(now_ns, self.retry_ns)
            self._send_pull(table, shard)

    def begin_anew(self, now_ns: int, position: int) -> None:
        """What was pulled is overwritten by now; whatever round it belongs to, others did it."""
        self.drop_round()
        self.load_anew(now_ns, position)

    def load_anew(self, now_ns: int, position: int) -> None:
        """Ask for all of a version, whatever was pulled before."""
        for table in self.trained():
            table.held = NOTHING_HELD
            self.pull(now_ns, table, position, attempt=0)

    def drop_round(self) -> None:
        """Let go of what this worker has of the round it was in."""
        self.stream.drop()
        if self.local is not None:
            self._out += [ReleasePayload(payload) for payload in self.local.payloads()]
            self.local = None

    @property
    def calls(self) -> list[int | None]:
        """Calls that are answered when servers have answered."""
        return [self.alignment.call, *(table.declare_call for table in self.tables.values())]

    def fail(self, error: Exception) -> None:
        """Nothing more will come: give up every pull, and the calls that wait for one."""
        self.stream.fail(error)
        self.alignment.call = None
        for table in self.tables.values():
            for pull in table.pulls.values():
                self._out += [ReleasePayload(payload) for payload in pull.payloads()]
            table.declare_call = None
            table.pulls = {}

    def ask(
        self, now_ns: int, need: Need, attempt: int, refusing: Collection[tuple[int, int]]
    ) -> None:
        """Ask for a version of all shards of asynchronous tables, as soon as something is in it.

        Of those that refuse what is needed, ask for it at once.
        """
        self.asked_ns = now_ns
        for table in [table for table in self.trained() if table.spec.is_asynchronous]:
            for shard in table.place.shards if table.place else []:
                is_refusing = (table.number, shard.shard) in refusing
                pull = ShardPull(0, 0, attempt, 0, 0, need=None if is_refusing else need)
                self._begin_pull(now_ns, table, shard.shard, pull)

    def stop_asking(self) -> None:
        """Ask for nothing any more."""
        for table in self.trained():
            for pull in table.pulls.values():
                self._out += [ReleasePayload(payload) for payload in pull.payloads()]
            table.pulls = {}

    def is_consistent(self, now_ns: int, table: Table) -> bool:
        """Whether all shards are at one version; pulls those again that lag.

        Those of an asynchronous table never have to be.
        """
        if table.spec.is_asynchronous:
            self.asynchronous.handed_over(table)
            return True
        version = table.pulled_version
        lagging = [shard for shard, pull in table.pulls.items() if pull.version < version]
        for shard in lagging:
            self._pull_shard(now_ns, table, shard, version, attempt=0)
        return not lagging

    def quiet_ns(self, now_ns: int) -> int:
        """How long nothing was heard of a shard that is waited for, of the quietest one."""
        pulls = [pull for table in self.tables.values() for pull in table.pulls.values()]
        return max((now_ns - pull.heard_ns for pull in pulls if not pull.is_complete), default=0)

    def on_status(self, now_ns: int, status: RoundStatus) -> None:
        """A server says what it lacks: send again what of it is ours."""
        table = self.tables.get(status.table)
        if table is None or table.shard(status.shard) is None:
            return
        if status.is_stale:
            self.asynchronous.on_too_stale(now_ns, status)
            return
        if status.shard in table.pulls:
            table.pulls[status.shard].status = status
            table.pulls[status.shard].heard_ns = now_ns
        if status.round == INITIAL_ROUND:
            self.sending.push_initial(table, status)
        local = self.stream.round_of(status.round)
        if local is not None:
            self._send_again(table, local, status)

    def _send_again(self, table: Table, local: LocalRound, status: RoundStatus) -> None:
        again: list[tuple[tuple[int, int], Pushed]] = []
        for missing in status.missing:
            part = table.part_id(status.shard, missing.part)
            if part is None:
                continue
            for pushed in local.parts[table.number, part].pushed:
                low = pushed.node.index << pushed.node.level
                high = (pushed.node.index + 1) << pushed.node.level
                if not missing.slots or any(low <= slot < high for slot in missing.slots):
                    again.append(((table.number, part), pushed))
        self.sending.push(again, local)
        if status.is_meta_missing and table.number in local.hypers:
            self.sending.send_hyper(table, status.shard, local)
        for number, slot in local.metas if status.is_meta_missing else ():
            if number == table.number:
                self.sending.send_meta(table, status.shard, local, slot)

    def pull(self, now_ns: int, table: Table, version: int, attempt: int) -> None:
        """Ask for a version of every shard of a table."""
        self.asked_ns = now_ns
        for shard in table.place.shards if table.place else []:
            self._pull_shard(now_ns, table, shard.shard, version, attempt)

    def _pull_shard(
        self, now_ns: int, table: Table, shard: int, version: int, attempt: int
    ) -> None:
        if table.spec.is_asynchronous:
            need = self.asynchronous.before(version)
            self._begin_pull(now_ns, table, shard, ShardPull(0, 0, attempt, 0, 0, need=need))
            return
        self._begin_pull(now_ns, table, shard, ShardPull(version, 0, attempt, 0, 0))

    def _begin_pull(self, now_ns: int, table: Table, shard: int, pull: ShardPull) -> None:
        old = table.pulls.get(shard)
        if old is not None:
            self._out += [ReleasePayload(payload) for payload in old.payloads()]
        is_first = table.declare_call is not None
        pull.delay_ns = FIRST_RETRY_MS * MS if is_first else self.retry_ns
        pull.deadline_ns = now_ns + pull.delay_ns
        pull.parts_count = table.parts_of(shard)
        pull.heard_ns = now_ns
        table.pulls[shard] = pull
        self._send_pull(table, shard)

    def _send_pull(self, table: Table, shard: int) -> None:
        place, pull = table.shard(shard), table.pulls[shard]
        if place is None:
            return
        is_apart = table.spec.is_asynchronous or table.spec.rule is Rule.CONSTANT
        message = Pull(
            self.membership.job, self.membership.origin, place.view, table.number, shard,
            pull.version, pull.attempt, pull.missing(),
            pull.need or (None if is_apart else self.asynchronous.end_at(pull.version)),
        )  # fmt: skip
        self._out.append(Send(place.server, message))
