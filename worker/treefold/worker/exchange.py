"""A worker's exchange with servers: pulls, pushes, and what is sent again when a server asks.

Part of `treefold.worker.core` in a file of its own; just as pure. Effects are appended to the
core's list.
"""

from treefold.common.spec import Dtype, Rule
from treefold.wire.exchange import Send
from treefold.wire.links import Links
from treefold.wire.membership import MS, Membership
from treefold.wire.messages import (
    Published,
    Pull,
    Pulled,
    Push,
    RoundHyper,
    RoundMeta,
    RoundStatus,
    View,
)
from treefold.wire.words import INITIAL_ROUND, Frame, Need, Phase, Role
from treefold.worker.asynchronous import Asynchronous
from treefold.worker.effects import (
    Connect,
    Contributed,
    Disconnect,
    Effect,
    HyperKnown,
    Initial,
    ReleasePayload,
    Retire,
    SlotFinished,
)
from treefold.worker.pulls import PartRange, ShardPull, Table
from treefold.worker.rounds import Held, LocalRound, Pushed, runs
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
    asked_ns : int
        When a version was last asked for, retries left aside.
    stream : Stream
        The version whose parts are handed on as they come, if there is one.
    """

    def __init__(self, membership: Membership, retry_ns: int, out: list[Effect]) -> None:
        self.membership = membership
        self.retry_ns = retry_ns
        self.tables: dict[int, Table] = {}
        self.local: LocalRound | None = None
        self.asked_ns = 0
        self._links = Links()
        self._out = out
        self.stream = Stream(self, out)
        self.asynchronous = Asynchronous(self)

    def trained(self) -> list[Table]:
        """Tables that have rounds."""
        return [table for table in self.tables.values() if table.spec.rule is Rule.OPTIMIZER]

    @property
    def is_declaring(self) -> bool:
        """Whether the script waits for the first version of a table."""
        return any(table.declare_call is not None for table in self.tables.values())

    @property
    def is_waited_for(self) -> bool:
        """Whether the script waits for a server, beside its call for a slot."""
        return self.is_declaring or self.stream.is_open

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

    def catch_up(self, now_ns: int, position: int) -> None:
        """Bring tables that were declared at different versions to one."""
        trained = self.trained()
        if any(table.held != position for table in trained):
            for table in trained:
                if not table.pulls:
                    self.pull(now_ns, table, position, attempt=0)

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
        self.push(pushed, local)

    def know_hyper(self, event: HyperKnown) -> None:
        """Tell servers early what slot 0 steps with."""
        local, table = self.local, self.tables.get(event.table)
        if local is None or table is None or event.slot != 0 or event.round != local.number:
            return
        if table.spec.is_asynchronous or table.spec.is_gathered:
            return  # nothing is stepped before all of it is there
        local.hypers[event.table] = event
        for shard in table.place.shards if table.place else []:
            self._send_hyper(table, shard.shard, local)

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
                    self.send_meta(table, shard.shard, local, slot)
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
        folded = [t for t in self.trained() if not t.spec.is_asynchronous]
        trained = [pull for table, _, pull in late if table in folded]
        version = torn_version(self, trained)
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

    def drop_pulls(self) -> None:
        """Give up every pull, and the declarations that wait for one."""
        for table in self.tables.values():
            for pull in table.pulls.values():
                self._out += [ReleasePayload(payload) for payload in pull.payloads()]
            table.declare_call = None
            table.pulls = {}

    def ask(self, now_ns: int, need: Need, attempt: int) -> None:
        """Ask for the newest version of every table, as soon as something is in it."""
        self.asked_ns = now_ns
        for table in self.trained():
            for shard in table.place.shards if table.place else []:
                pull = ShardPull(0, 0, attempt, 0, 0, need=need)
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
            self.asynchronous.declared(table)
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
        if status.shard in table.pulls:
            table.pulls[status.shard].status = status
            table.pulls[status.shard].heard_ns = now_ns
        if status.round == INITIAL_ROUND:
            self._push_initial(table, status)
        local = self.stream.round_of(status.round)
        if local is None:
            return
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
        self.push(again, local)
        if status.is_meta_missing and table.number in local.hypers:
            self._send_hyper(table, status.shard, local)
        for number, slot in local.metas if status.is_meta_missing else ():
            if number == table.number:
                self.send_meta(table, status.shard, local, slot)

    def _push_initial(self, table: Table, status: RoundStatus) -> None:
        place = table.shard(status.shard)
        is_ours = table.place is not None and table.place.initializer == self.membership.incarnation
        if place is None or not is_ours:
            return
        wanted = dict.fromkeys(missing.part for missing in status.missing)
        parts = [p for p in table.parts if p.shard == status.shard and p.number in wanted]
        for run in runs(parts, _is_after):
            frame = Frame(Dtype.FLOAT32, run[-1].stop - run[0].start)
            push = Push(
                self.membership.job, self.membership.origin, place.view, table.number,
                status.shard, run[0].number, len(run), INITIAL_ROUND, 1, 0, 0, [], frame,
            )  # fmt: skip
            ranges = [(part.start, part.stop) for part in run]
            self._out.append(Send(place.server, push, Initial(table.number, ranges)))

    def pull(self, now_ns: int, table: Table, version: int, attempt: int) -> None:
        """Ask for a version of every shard of a table."""
        self.asked_ns = now_ns
        for shard in table.place.shards if table.place else []:
            self._pull_shard(now_ns, table, shard.shard, version, attempt)

    def _pull_shard(
        self, now_ns: int, table: Table, shard: int, version: int, attempt: int
    ) -> None:
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
        message = Pull(
            self.membership.job, self.membership.origin, place.view, table.number, shard,
            pull.version, pull.attempt, pull.missing(), pull.need,
        )  # fmt: skip
        self._out.append(Send(place.server, message))

    def push(self, pushed: list[tuple[tuple[int, int], Pushed]], local: LocalRound | None) -> None:
        """Send nodes of a round, each for part ``(table, part)``; adjacent parts in one message."""
        if local is None or self.stream.is_held_back(local):
            return
        for run in runs(pushed, self._is_next):
            self._push_run(run, local)

    def push_all(self, local: LocalRound) -> None:
        """Send everything that was held back of a round."""
        self.push([(key, one) for key, part in local.parts.items() for one in part.pushed], local)
        for number, table in self.tables.items():
            for shard in table.place.shards if table.place else []:
                if number in local.hypers:
                    self._send_hyper(table, shard.shard, local)
                for slot in [slot for one, slot in local.metas if one == number]:
                    self.send_meta(table, shard.shard, local, slot)

    def _is_next(
        self, one: tuple[tuple[int, int], Pushed], after: tuple[tuple[int, int], Pushed]
    ) -> bool:
        (table, part), pushed = one
        (next_table, next_part), other = after
        parts = self.tables[table].parts
        return (
            (next_table, next_part) == (table, part + 1)
            and parts[part].shard == parts[next_part].shard
            and parts[part].wire is parts[next_part].wire
            and pushed.node == other.node
            and (pushed.held.payload is None) == (other.held.payload is None)
        )

    def _push_run(self, run: list[tuple[tuple[int, int], Pushed]], local: LocalRound) -> None:
        (number, _), pushed = run[0]
        table = self.tables[number]
        parts = [table.parts[part] for (_, part), _ in run]
        place = table.shard(parts[0].shard)
        if place is None:
            return
        payloads = tuple(one.held.payload for _, one in run if one.held.payload is not None)
        frame = Frame(parts[0].wire, parts[-1].stop - parts[0].start) if payloads else None
        marks = []
        if any(one.held.absent for _, one in run):
            marks = [
                one.held.absent.to_bytes(-(-part.pieces // 8), "little")
                for (_, one), part in zip(run, parts, strict=True)
            ]
        push = Push(
            self.membership.job, self.membership.origin, place.view, number, parts[0].shard,
            parts[0].number, len(run), local.number, local.active, pushed.node.level,
            pushed.node.index, marks, frame,
        )  # fmt: skip
        self._out.append(Send(place.server, push, payloads or None))

    def _send_hyper(self, table: Table, shard: int, local: LocalRound) -> None:
        """Send one shard what slot 0 steps with."""
        place = table.shard(shard)
        if place is None or self.stream.is_held_back(local):
            return
        known = local.hypers[table.number]
        message = RoundHyper(
            self.membership.job, self.membership.origin, place.view, table.number, shard,
            local.number, local.active, known.groups, known.norm_max,
        )  # fmt: skip
        self._out.append(Send(place.server, message))

    def send_meta(self, table: Table, shard: int, local: LocalRound, slot: int) -> None:
        """Send one shard what goes with a slot, which is slot 0 unless all count."""
        place = table.shard(shard)
        if place is None or self.stream.is_held_back(local):
            return
        meta = local.metas[table.number, slot]
        message = RoundMeta(
            self.membership.job, self.membership.origin, place.view, table.number, shard,
            local.number, local.active, meta.groups, meta.norm_max, meta.state,
            slot, local.first, self.asynchronous.bases.get((table.number, shard), 0),
            local.is_again, local.due, *local.samples(slot),
        )  # fmt: skip
        self._out.append(Send(place.server, message))


def _is_after(one: PartRange, after: PartRange) -> bool:
    """Whether two parts can travel together: only the last one of a run may be short."""
    return after.number == one.number + 1 and after.wire is one.wire
