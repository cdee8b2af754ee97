"""A worker's exchange with servers: pulls, pushes, and what is sent again when a server asks.

Part of `treefold.worker.core` in a file of its own; just as pure. Effects are appended to the
core's list.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from treefold.common.spec import Dtype, Rule
from treefold.wire.exchange import Send
from treefold.wire.membership import MS, Membership
from treefold.wire.messages import (
    INITIAL_ROUND,
    RUN_PARTS_MAX,
    Frame,
    Published,
    Pull,
    Pulled,
    Push,
    RoundHyper,
    RoundMeta,
    RoundStatus,
    View,
)
from treefold.worker.effects import (
    Contributed,
    Effect,
    HyperKnown,
    Initial,
    ReleasePayload,
    SlotFinished,
)
from treefold.worker.pulls import ShardPull, Table
from treefold.worker.rounds import Held, LocalRound, Pushed

ItemT = TypeVar("ItemT")

NOTHING_HELD = -1
FIRST_RETRY_MS = (
    20  # a server may hear of a new table a little later than its workers; doubles each time
)


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
    """

    def __init__(self, membership: Membership, retry_ns: int, out: list[Effect]) -> None:
        self.membership = membership
        self.retry_ns = retry_ns
        self.tables: dict[int, Table] = {}
        self.local: LocalRound | None = None
        self.asked_ns = 0
        self._out = out

    def trained(self) -> list[Table]:
        """Tables that have rounds."""
        return [table for table in self.tables.values() if table.spec.rule is Rule.OPTIMIZER]

    @property
    def is_declaring(self) -> bool:
        """Whether the script waits for the first version of a table."""
        return any(table.declare_call is not None for table in self.tables.values())

    @property
    def is_unplaced(self) -> bool:
        """Whether a declared table waits for a view that says where it is."""
        tables = self.tables.values()
        return any(table.declare_call is not None and not table.pulls for table in tables)

    @property
    def is_asking(self) -> bool:
        """Whether a server owes a part of a version."""
        return any(table.pulls and not table.is_pulled for table in self.tables.values())

    def next_deadline_ns(self) -> int | None:
        """When a pull is to be sent again."""
        pulls = [pull for table in self.tables.values() for pull in table.pulls.values()]
        return min((pull.deadline_ns for pull in pulls if not pull.is_complete), default=None)

    def take(self, now_ns: int, pulled: Pulled, payloads: tuple[int, ...]) -> Table | None:
        """Take in parts of a version; the table if all of its shards are here now."""
        table = self.tables.get(pulled.table)
        pull = table.pulls.get(pulled.shard) if table else None
        last = pulled.part + pulled.count - 1
        if table is None or pull is None or pull.is_complete or last >= pull.parts_count:
            self._out += [ReleasePayload(payload) for payload in payloads]
            return None
        pull.take(pulled, payloads, self._out)
        return self._taken(now_ns, table, pull)

    def take_word(self, now_ns: int, published: Published) -> Table | None:
        """A version of a shard is whole; the table if all of its shards are here now."""
        table = self.tables.get(published.table)
        pull = table.pulls.get(published.shard) if table else None
        if table is None or pull is None or pull.is_complete:
            return None
        pull.finish(published, self._out)
        return self._taken(now_ns, table, pull)

    def _taken(self, now_ns: int, table: Table, pull: ShardPull) -> Table | None:
        pull.deadline_ns = now_ns + pull.delay_ns
        pull.status = None
        return table if pull.is_complete and table.is_pulled else None

    def contribute(self, leaf: Contributed) -> None:
        """Take in parts of a slot; push what cannot grow here."""
        local = self.local
        is_over = leaf.table in self.tables and self.tables[leaf.table].is_pulled
        if local is None or leaf.round != local.number or is_over:
            self._out += [ReleasePayload(payload) for payload in leaf.payloads]
            return
        pushed: list[tuple[tuple[int, int], Pushed]] = []
        for number in range(leaf.count):
            key = (leaf.table, leaf.part + number)
            payload = leaf.payloads[number] if leaf.payloads else None
            if local.has(key, leaf.slot):
                self._out += [] if payload is None else [ReleasePayload(payload)]
                continue
            mask = int.from_bytes(leaf.absent[number], "little") if leaf.absent else 0
            ready = local.contribute(key, leaf.slot, Held(payload, mask), self._out)
            pushed += [(key, one) for one in ready]
        self.push(pushed)

    def know_hyper(self, event: HyperKnown) -> None:
        """Tell servers early what slot 0 steps with."""
        local, table = self.local, self.tables.get(event.table)
        if local is None or table is None or event.slot != 0 or event.round != local.number:
            return
        local.hypers[event.table] = event
        for shard in table.place.shards if table.place else []:
            self._send_hyper(table, shard.shard)

    def finish(self, event: SlotFinished) -> None:
        """The loop body of a slot is over: what it did not contribute is absent."""
        local = self.local
        if local is None or event.round != local.number:
            return
        local.in_hand = None
        local.done[event.slot] = None
        for table in self.trained():
            for number, part in enumerate(table.parts):
                if not local.has((table.number, number), event.slot):
                    marks = ((1 << part.pieces) - 1).to_bytes(-(-part.pieces // 8), "little")
                    self.contribute(
                        Contributed(table.number, number, 1, event.round, event.slot, (), [marks])
                    )
            if event.slot == 0 and table.number in event.metas:
                local.metas[table.number] = event.metas[table.number]
                for shard in table.place.shards if table.place else []:
                    self.send_meta(table, shard.shard)

    def retry(self, now_ns: int) -> None:
        """Send again what was not answered in time."""
        late = [
            (table, shard, pull)
            for table in self.tables.values()
            for shard, pull in table.pulls.items()
            if not pull.is_complete and now_ns >= pull.deadline_ns
        ]
        if not late:
            return
        trained = [pull for table, _, pull in late if table.spec.rule is Rule.OPTIMIZER]
        version = self._torn_version(trained)
        if version is not None:
            for table in self.trained():
                if table.pulls:
                    self.pull(now_ns, table, version, attempt=1)
            return
        for table, shard, pull in late:
            pull.backoff(now_ns, self.retry_ns)
            self._send_pull(table, shard)

    def _torn_version(self, late: list[ShardPull]) -> int | None:
        """The version to begin with where some shards have the next and others may never get it.

        Those who computed the round between may be gone. Every shard still has the version before,
        so a worker that is not in that round itself begins with that and computes the round again.
        """
        complete = [
            pull.version
            for table in self.trained()
            for pull in table.pulls.values()
            if pull.is_complete
        ]
        newest = max(complete, default=0)
        rounds = [pull.status.round for pull in late if pull.status is not None]
        if newest == 0 or newest - 1 not in rounds:
            return None
        is_in_round = self.local is not None and self.local.number >= newest - 1
        return None if is_in_round else newest - 1

    def begin_anew(self, now_ns: int, position: int) -> None:
        """What was pulled is overwritten by now; whatever round it belongs to, others did it."""
        self.drop_round()
        for table in self.trained():
            table.held = NOTHING_HELD
            self.pull(now_ns, table, position, attempt=0)

    def drop_round(self) -> None:
        """Let go of what this worker has of the round it was in."""
        if self.local is not None:
            self._out += [ReleasePayload(payload) for payload in self.local.payloads()]
            self.local = None

    def drop_pulls(self) -> None:
        """Give up every pull, and the declarations that wait for one."""
        for table in self.tables.values():
            for pull in table.pulls.values():
                self._out += [ReleasePayload(payload) for payload in pull.got.values()]
            table.declare_call = None
            table.pulls = {}

    def is_consistent(self, now_ns: int, table: Table) -> bool:
        """Whether all shards are at one version; pulls those again that lag."""
        version = table.pulled_version
        lagging = [shard for shard, pull in table.pulls.items() if pull.version < version]
        for shard in lagging:
            self._pull_shard(now_ns, table, shard, version, attempt=0)
        return not lagging

    def on_status(self, status: RoundStatus) -> None:
        """A server says what it lacks: send again what of it is ours."""
        table = self.tables.get(status.table)
        if table is None or table.shard(status.shard) is None:
            return
        if status.shard in table.pulls:
            table.pulls[status.shard].status = status
        if status.round == INITIAL_ROUND:
            self._push_initial(table, status)
        if self.local is None or status.round != self.local.number:
            return
        again: list[tuple[tuple[int, int], Pushed]] = []
        for missing in status.missing:
            part = table.part_id(status.shard, missing.part)
            if part is None:
                continue
            for pushed in self.local.parts[table.number, part].pushed:
                low = pushed.node.index << pushed.node.level
                high = (pushed.node.index + 1) << pushed.node.level
                if not missing.slots or any(low <= slot < high for slot in missing.slots):
                    again.append(((table.number, part), pushed))
        self.push(again)
        if status.is_meta_missing and table.number in self.local.hypers:
            self._send_hyper(table, status.shard)
        if status.is_meta_missing and table.number in self.local.metas:
            self.send_meta(table, status.shard)

    def _push_initial(self, table: Table, status: RoundStatus) -> None:
        place = table.shard(status.shard)
        is_ours = table.place is not None and table.place.initializer == self.membership.incarnation
        if place is None or not is_ours:
            return
        wanted = dict.fromkeys(missing.part for missing in status.missing)
        parts = [p for p in table.parts if p.shard == status.shard and p.number in wanted]
        for run in runs(parts, lambda one, after: after.number == one.number + 1):
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
        old = table.pulls.get(shard)
        if old is not None:
            self._out += [ReleasePayload(payload) for payload in old.got.values()]
        is_first = table.declare_call is not None
        delay_ns = FIRST_RETRY_MS * MS if is_first else self.retry_ns
        parts_count = table.parts_of(shard)
        table.pulls[shard] = ShardPull(version, parts_count, attempt, now_ns + delay_ns, delay_ns)
        self._send_pull(table, shard)

    def _send_pull(self, table: Table, shard: int) -> None:
        place, pull = table.shard(shard), table.pulls[shard]
        if place is None:
            return
        message = Pull(
            self.membership.job, self.membership.origin, place.view, table.number, shard,
            pull.version, pull.attempt, pull.missing(),
        )  # fmt: skip
        self._out.append(Send(place.server, message))

    def push(self, pushed: list[tuple[tuple[int, int], Pushed]]) -> None:
        """Send nodes, each for part ``(table, part)``; those of adjacent parts in one message."""
        for run in runs(pushed, self._is_next):
            self._push_run(run)

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

    def _push_run(self, run: list[tuple[tuple[int, int], Pushed]]) -> None:
        (number, _), pushed = run[0]
        table, local = self.tables[number], self.local
        parts = [table.parts[part] for (_, part), _ in run]
        place = table.shard(parts[0].shard)
        if place is None or local is None:
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

    def _send_hyper(self, table: Table, shard: int) -> None:
        """Send one shard what slot 0 steps with."""
        place, local = table.shard(shard), self.local
        if place is None or local is None:
            return
        known = local.hypers[table.number]
        message = RoundHyper(
            self.membership.job, self.membership.origin, place.view, table.number, shard,
            local.number, local.active, known.groups, known.norm_max,
        )  # fmt: skip
        self._out.append(Send(place.server, message))

    def send_meta(self, table: Table, shard: int) -> None:
        """Send one shard what slot 0 brings."""
        place, local = table.shard(shard), self.local
        if place is None or local is None:
            return
        meta = local.metas[table.number]
        message = RoundMeta(
            self.membership.job, self.membership.origin, place.view, table.number, shard,
            local.number, local.active, meta.groups, meta.norm_max, meta.state,
        )  # fmt: skip
        self._out.append(Send(place.server, message))

    def describe(self, view: View | None) -> str:
        """What the first pull that is not answered waits for, in words; empty if there is none."""
        for table in self.tables.values():
            for shard, pull in table.pulls.items():
                if not pull.is_complete:
                    return self._describe(view, table, shard, pull)
        return ""

    def _describe(self, view: View | None, table: Table, shard: int, pull: ShardPull) -> str:
        names = {m.incarnation: f"server-{m.rank}" for m in view.members} if view else {}
        place = table.shard(shard)
        server = names.get(place.server, "a server that is gone") if place else "no server yet"
        text = f"version {pull.version} of table {table.spec.name} shard {shard} from {server}"
        if pull.status is None:
            return text
        slots = sorted({slot: None for missing in pull.status.missing for slot in missing.slots})
        lacks = ", ".join(map(str, slots)) or "all"
        return f"{text}, which lacks slots {lacks} of round {pull.status.round}"


def runs(items: Sequence[ItemT], is_next: Callable[[ItemT, ItemT], bool]) -> list[list[ItemT]]:
    """Consecutive items in groups within which each one is the next of the one before."""
    found: list[list[ItemT]] = []
    for item in items:
        if found and len(found[-1]) < RUN_PARTS_MAX and is_next(found[-1][-1], item):
            found[-1].append(item)
        else:
            found.append([item])
    return found
