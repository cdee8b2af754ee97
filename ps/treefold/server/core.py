"""The server's decisions: which node is taken in, when a round is complete, who gets which version.

Pure: no socket, clock, thread or tensor. A payload is a number that the shell can turn into a
tensor. What a server must never do is decided here: count a slot twice, publish before the root of
every part is there, answer with a version that does not exist yet.
"""

from typing import TYPE_CHECKING

from treefold.common.errors import InvariantError
from treefold.common.layout import Layout, ShardSpan
from treefold.common.story import Story
from treefold.server import lateness
from treefold.server.chains import Chain
from treefold.server.effects import (
    CloseShard,
    Connect,
    Disconnect,
    Effect,
    Event,
    OpenShard,
    ReleasePayload,
    RestoreShard,
    ServerDrainAsked,
    ServerFailed,
)
from treefold.server.exchange import Exchange
from treefold.server.fencing import AboutShard, refusal_of_view
from treefold.server.holding import Shard
from treefold.server.limits import ServerLimits
from treefold.server.rounds import Arrived, RoundState
from treefold.wire.chain import ChainApplied, ChainAsk, ChainRound, UnitCopy, UnitTaken
from treefold.wire.decisions import HealthDecision, NormDecision, QuorumDecision
from treefold.wire.exchange import (
    SCHEDULER,
    Halt,
    Level,
    Note,
    Peer,
    PeerLost,
    Received,
    Send,
    Tick,
)
from treefold.wire.links import Links
from treefold.wire.membership import MS, Membership, Standing
from treefold.wire.messages import (
    Accepted,
    AssignTable,
    DrainRequest,
    Fenced,
    HeartbeatSeen,
    Leave,
    Pull,
    Push,
    Refused,
    Registered,
    RoundHyper,
    RoundLate,
    RoundMeta,
    RoundStatus,
    SavedSeen,
    Stop,
    View,
)
from treefold.wire.words import Code, Outcome, Phase, ShardPlace, Source

if TYPE_CHECKING:
    from treefold.common.spec import TableSpec

ABOUT_SHARDS = (Push, Pull, RoundMeta, RoundHyper, ChainRound, ChainAsk, UnitCopy)
FOLLOWING = (ChainApplied, UnitTaken, RoundStatus)
DRAIN_CALL = 1
DRAIN_RETRY_MS = 1_000  # then the scheduler is asked again, which may just be started again
DRAIN_MAX_MS = 60_000  # how long a server that is asked to stop waits for others to take over


class ServerCore:
    """One server: its membership, its shards, and the exchange with workers.

    Parameters
    ----------
    membership : Membership
        The scheduler's side of this process's life.
    limits : ServerLimits
        Times and bounds.

    Attributes
    ----------
    members : dict of int to str
        Names of all members that were in some view, by incarnation.
    """

    def __init__(self, membership: Membership, limits: ServerLimits) -> None:
        self.membership = membership
        self.limits = limits
        self.story = Story()
        self.view = 0
        self.specs: dict[int, TableSpec] = {}
        self.places: dict[tuple[int, int], ShardPlace] = {}
        self._started_ns: int | None = None
        self._traffic_ns = 0
        self._is_silence_noted = False
        self._is_failed = False
        self._known: dict[tuple[int, int], None] = {}
        self._sources: dict[int, Source | None] = {}
        self.members: dict[int, str] = {}
        self._drain_ns: int | None = None
        self._drain_retry_ns: int | None = None
        self._due_ns: int | None = None
        self._links = Links()
        self._out: list[Effect] = []
        self.exchange = Exchange(membership, self.story, limits.check_every, self._out)

    @property
    def shards(self) -> dict[tuple[int, int], Shard]:
        """The shards that this server holds, as primary or not."""
        return self.exchange.shards

    # ---- the interface of every core ----------------------------------------------------------

    def handle(self, now_ns: int, event: Event) -> list[Effect]:
        """Take in one event and say what is to be done."""
        if self._started_ns is None:
            self._started_ns = self._traffic_ns = now_ns
        else:
            stalled_ns = self.membership.forgive_stall(now_ns)
            self._started_ns += stalled_ns
            self._traffic_ns += stalled_ns
        match event:
            case Received(peer, message) if peer == SCHEDULER:
                self._on_control(now_ns, message)
            case Received(peer, message, payloads):
                if isinstance(message, Pull):  # which only workers send
                    self._traffic_ns = now_ns
                self._on_data(now_ns, peer, message, payloads)
            case PeerLost(peer):
                for held in self.shards.values():
                    held.waits.pop(peer, None)
            case ServerDrainAsked():
                self._on_drain_asked(now_ns)
            case ServerFailed(text):
                self._is_failed = True
                self._out.append(Note(Level.ERROR, text))
                self._out += self.membership.leave(now_ns, Outcome.FAILED, text)
            case Tick():
                pass
            case _:
                self.exchange.on_done(now_ns, event)
        self._on_time(now_ns)
        effects = list(self._out)
        self._out.clear()
        return effects

    def next_deadline_ns(self) -> int | None:
        """When a `Tick` is needed at the latest."""
        return self._soonest_ns() if self._started_ns is None else self._due_ns

    def _soonest_ns(self) -> int | None:
        times = [self.membership.next_deadline_ns(), self._drain_ns, self._drain_retry_ns]
        times.append(self.exchange.saves.next_deadline_ns())
        for shard in self.exchange.shards.values():
            times += (shard.late_ns, shard.decision_retry_ns, shard.chain.retry_ns)
            times.append(shard.limited_ns)
        return min([time_ns for time_ns in times if time_ns is not None], default=None)

    def check_invariants(self) -> None:
        """Raise `InvariantError` if the state contradicts itself."""
        for key, shard in self.shards.items():
            current = shard.round
            if current is None:
                continue
            if current.is_complete and current.state is RoundState.OPEN and not current.is_closed:
                raise InvariantError(
                    f"round {current.number} of shard {key} is complete and open",
                    self.story.lines(),
                )
            if current.number != shard.version:
                raise InvariantError(f"shard {key} collects {current.number}", self.story.lines())

    # ---- the scheduler ------------------------------------------------------------------------

    def _on_control(self, now_ns: int, message: object) -> None:
        match message:
            case Registered():
                self._on_registered(now_ns, message)
            case HeartbeatSeen():
                self.membership.on_heartbeat_seen(now_ns, message)
                if message.incarnation == self.membership.incarnation and message.confirmed:
                    self.exchange.replication.confirm(now_ns, message.confirmed)
            case Fenced():
                if self.membership.on_fenced(now_ns, message):
                    self._begin_anew()
            case AssignTable(table, spec):
                self.specs.setdefault(table, spec)
                self.exchange.saves.know(spec)
                self.membership.vitals.tables = len(self.specs)
                self._open_shards(now_ns)
            case View():
                self._on_view(now_ns, message)
            case NormDecision() | QuorumDecision() | HealthDecision():
                self.exchange.on_decision(now_ns, message)
            case SavedSeen():
                self.exchange.saves.on_seen(message)
            case Refused() | Accepted():
                self._on_answer(now_ns, message)
            case Stop():
                self._on_stop(message)
            case _:
                text = f"the scheduler sent {type(message).__name__}: ignored"
                self._out.append(Note(Level.WARNING, text))

    def _on_registered(self, now_ns: int, message: Registered) -> None:
        if self.membership.job not in (0, message.job):
            text = "the scheduler runs another job now; this server's job is lost"
            self._out.append(Halt(1, text))
        elif self.membership.on_registered(now_ns, message):
            self.membership.job = message.job

    def _on_answer(self, now_ns: int, message: Refused | Accepted) -> None:
        """An answer to a drain that this server has asked for."""
        if isinstance(message, Accepted):
            self._drain_retry_ns = None
        elif message.call == DRAIN_CALL:
            self._leave_now(now_ns)
        else:
            self._out.append(Halt(3, message.text))

    def _on_drain_asked(self, now_ns: int) -> None:
        """Let others take over the shards first, if the scheduler can see to it."""
        if not self.shards or not self.membership.is_member:
            self._leave_now(now_ns)
            return
        self._drain_ns = now_ns + DRAIN_MAX_MS * MS
        self._out.append(Note(Level.INFO, "asked to stop: others take over this server's shards"))
        self._ask_to_drain(now_ns)

    def _ask_to_drain(self, now_ns: int) -> None:
        self._drain_retry_ns = now_ns + DRAIN_RETRY_MS * MS
        name = f"server-{self.membership.rank}"
        who = self.membership.incarnation
        self._out.append(Send(SCHEDULER, DrainRequest(DRAIN_CALL, name, who)))

    def _leave_now(self, now_ns: int) -> None:
        self._drain_ns = self._drain_retry_ns = None
        self._out += self.membership.leave(now_ns, Outcome.DRAINED, "the server was asked to stop")

    def _begin_anew(self) -> None:
        """Others hold our shards by now: let go of them and offer ourselves again."""
        text = "the scheduler had given this server up; it registers again, without its shards"
        self._out.append(Note(Level.WARNING, text))
        for key in list(self.places):
            self._close(key)
        self.places = {}
        self.exchange.saves.forget()

    def _on_stop(self, message: Stop) -> None:
        if self.membership.standing is Standing.GONE:
            return  # told twice; one farewell is enough
        if self.exchange.saves.is_busy and self.membership.is_member:
            return  # the next heartbeat is answered with it again
        self.membership.on_stop(message)
        who = self.membership.incarnation
        self._out.append(Send(SCHEDULER, Leave(who, message.outcome, "")))
        status = {Outcome.FAILED: 1, Outcome.NOT_FORMED: 3}.get(message.outcome, 0)
        self._out.append(Halt(status, message.text))

    def _on_view(self, now_ns: int, view: View) -> None:
        # A view may overtake the answer that names us, for the first time or anew.
        is_named = self.membership.standing is not Standing.JOINING
        if not is_named or view.number <= self.view or view.phase is Phase.ENDED:
            return
        self.view = view.number
        self.membership.vitals.view = view.number
        self.exchange.asynchronous.note_slots(len(view.leases.workers))
        self._sources = {t.table: t.source for t in view.tables}
        self._known = {(t.table, place.shard): None for t in view.tables for place in t.shards}
        me, held = self.membership.incarnation, self.places
        self.places = {
            (table.table, place.shard): place
            for table in view.tables
            for place in table.shards
            if me in (place.server, *place.backups, *place.joining)
        }
        names = {m.incarnation: f"{m.role.name.lower()}-{m.rank}" for m in view.members}
        self.members |= names
        self._link(view)
        for key in [key for key in held if key not in self.places]:
            self._close(key)
        is_changed = any(place != held.get(key) for key, place in self.places.items())
        for key, place in self.places.items():
            if key in self.shards:
                self._adopt(now_ns, self.shards[key], place)
        self._open_shards(now_ns)
        if is_changed:  # the scheduler is to hear at once that this view is here
            self._out.append(Send(SCHEDULER, self.membership.heartbeat()))

    def _link(self, view: View) -> None:
        """Have a link to every other server of our chains."""
        chains = [[p.server, *p.backups, *p.joining] for p in self.places.values()]
        wanted = dict.fromkeys(who for chain in chains for who in chain)
        wanted.pop(self.membership.incarnation, None)
        servers = {m.incarnation: m.address for m in view.members if m.incarnation in wanted}
        gone, new = self._links.follow(servers)
        self._out += [Disconnect(who) for who in gone]
        self._out += [Connect(who, address) for who, address in new.items()]

    def _close(self, key: tuple[int, int]) -> None:
        """Others hold this shard from now on."""
        shard = self.shards.pop(key, None)
        if shard is not None:
            self.exchange.close(shard)
            self._out.append(CloseShard(*key))

    def _adopt(self, now_ns: int, shard: Shard, place: ShardPlace) -> None:
        """Take over what a view says of a shard that is here."""
        chain = shard.chain
        if chain.view == place.chain_view:
            return
        was_primary, was_joining = chain.is_primary, chain.is_joining
        primary = chain.primary
        chain.adopt(place)
        if chain.is_joining and (not was_joining or place.server != primary):
            self.exchange.reopen(shard)  # somebody copies to this server, from the start
        shard.view = place.view
        self.exchange.replication.settle(now_ns, shard, was_primary=was_primary)

    def _open_shards(self, now_ns: int) -> None:
        me = self.membership.incarnation
        for (table, number), place in self.places.items():
            spec = self.specs.get(table)
            if spec is None or (table, number) in self.shards:
                continue
            span = ShardSpan(place.first_block, place.blocks)
            layout = Layout(spec)
            parts = layout.parts(span)
            pieces = [len(layout.pieces(*part)) for part in parts]
            wires = [layout.wire(part) for part in parts]
            chain = Chain(me)
            chain.adopt(place)
            if chain.is_joining:
                chain.units, chain.is_started = {}, False
            shard = Shard(table, number, place.view, chain, spec, span, parts, pieces, wires)
            self.shards[table, number] = shard
            self._out.append(OpenShard(table, number, spec, span))
            source = self._sources.get(table)
            if source is not None and not chain.is_joining:
                chain.is_started = False
                restore = RestoreShard(table, number, source.folder, source.version)
                self._out.append(restore)
            self.exchange.replication.settle(now_ns, shard, was_primary=True)

    # ---- workers and other servers ------------------------------------------------------------

    def _on_data(self, now_ns: int, peer: Peer, message: object, payloads: tuple[int, ...]) -> None:
        """A message about a shard, of a worker or of another server of its chain."""
        if isinstance(message, FOLLOWING):
            self._on_follower(now_ns, peer, message)
            return
        if isinstance(message, Refused) and isinstance(peer, int):
            level = Level.DEBUG if message.code is Code.STALE_VIEW else Level.WARNING
            self._out.append(Note(level, f"server {peer} refuses: {message.text}"))
            return
        if not isinstance(message, ABOUT_SHARDS):
            text = f"a server takes pushes and pulls, not {type(message).__name__}"
            self._out.append(Send(peer, Refused(0, Code.BAD_MESSAGE, text)))
            return
        shard = self._shard_for(peer, message)
        if shard is None:
            self._out += [ReleasePayload(payload) for payload in payloads]
            return
        match message:
            case Push():
                self.exchange.on_push(now_ns, peer, shard, Arrived(message, payloads))
            case Pull():
                self.exchange.on_pull(now_ns, peer, shard, message)
            case ChainAsk():
                self.exchange.replication.on_ask(peer, shard)
            case ChainRound():
                self.exchange.replication.on_round(now_ns, peer, shard, message)
            case UnitCopy():
                self.exchange.replication.copies.on_copy(now_ns, peer, shard, message, payloads)
            case _:
                self.exchange.on_hyper(now_ns, peer, shard, message)

    def _on_follower(
        self, now_ns: int, peer: Peer, message: ChainApplied | UnitTaken | RoundStatus
    ) -> None:
        """Another member of a chain answers its primary."""
        shard = self.shards.get((message.table, message.shard))
        if shard is None or not shard.chain.is_primary or not isinstance(peer, int):
            return
        replication = self.exchange.replication
        if isinstance(message, RoundStatus):
            replication.on_lacking(shard, peer, message)
        elif message.view != shard.chain.view:
            return
        elif isinstance(message, ChainApplied):
            replication.on_applied(now_ns, shard, message)
        else:
            replication.copies.on_taken(now_ns, shard, message)

    def _shard_for(
        self,
        peer: Peer,
        message: AboutShard,
    ) -> Shard | None:
        """The shard that is meant; None with a refusal, or in silence while we are behind."""
        key = (message.table, message.shard)
        shard = self.shards.get(key)
        if self.membership.job == 0:
            return None  # the scheduler's answer has not arrived yet; we will be asked again
        refusal: Refused | None = None
        if message.job != self.membership.job:
            refusal = Refused(0, Code.JOB_MISMATCH, "this server belongs to another job")
        elif message.view > self.view:
            return None  # the view that names us has not arrived yet; we will be asked again
        elif shard is None and key in self.places:
            return None  # the same for the table's spec
        elif shard is None and key not in self._known and message.view >= self.view:
            known = ", ".join(f"{table}/{number}" for table, number in self.shards) or "none"
            text = (
                f"this server has no shard {message.shard} of table {message.table}; it has {known}"
            )
            refusal = Refused(0, Code.UNKNOWN_TABLE, text)
        elif shard is None:
            text = f"shard {message.shard} of table {message.table} is held by others by now"
            refusal = Refused(0, Code.STALE_VIEW, text)
        else:
            refusal = refusal_of_view(shard, message)
        if refusal is not None:
            self._out.append(Send(peer, refusal))
            return None
        return shard

    # ---- time ---------------------------------------------------------------------------------

    def _on_time(self, now_ns: int) -> None:
        self._due_ns = self._soonest_ns()
        if self._due_ns is not None and now_ns >= self._due_ns:
            self._on_due(now_ns)
            self._due_ns = self._soonest_ns()
        self._check_orphaned(now_ns)
        is_gone = self.membership.standing is Standing.GONE
        if is_gone and not any(isinstance(effect, Halt) for effect in self._out):
            self._out.append(Halt(int(self._is_failed), "the server has left"))

    def _on_due(self, now_ns: int) -> None:
        for round_, missing in lateness.reports(now_ns, self.shards):
            late = RoundLate(self.membership.incarnation, round_, missing)
            self._out.append(Send(SCHEDULER, late))
        if self._drain_ns is not None and now_ns >= self._drain_ns:
            self._leave_now(now_ns)
        elif self._drain_retry_ns is not None and now_ns >= self._drain_retry_ns:
            self._ask_to_drain(now_ns)
        self.exchange.ask_again(now_ns)
        self.exchange.saves.retry(now_ns, self.shards)
        self.exchange.replication.retry(now_ns)
        due_ns = self.membership.next_deadline_ns()
        if due_ns is not None and now_ns >= due_ns:
            vitals = self.membership.vitals
            vitals.round = max([shard.version for shard in self.shards.values()], default=0)
            waits = (self.exchange.waiting_for(shard) for shard in self.shards.values())
            vitals.norms = self.exchange.norms()
            vitals.staleness = self.exchange.asynchronous.counts()
            vitals.waiting = next((text for text in waits if text), "")
            self._out += self.membership.tick(now_ns)

    def _check_orphaned(self, now_ns: int) -> None:
        started = self._started_ns or 0
        if not self.membership.registrations and self.membership.incarnation == 0:
            waited = now_ns - started
            if waited > self.limits.connect_timeout_ns:
                self.membership.give_up()
                self._out.append(Halt(3, f"no scheduler answered within {waited / 1e9:.0f} s"))
            return
        quiet = now_ns - max(self._traffic_ns, self.membership.heard_ns)
        is_leaving = self.membership.standing in (Standing.LEAVING, Standing.GONE)
        if not is_leaving and quiet > self.limits.orphan_after_ns:
            self.membership.give_up()
            self._out.append(
                Halt(1, f"neither scheduler nor workers were heard for {quiet / 1e9:.0f} s")
            )
        silent_ns = now_ns - self.membership.heard_ns
        is_lost = not is_leaving and silent_ns > self.limits.orphan_after_ns
        if is_lost and self.exchange.replication.stuck_ns(now_ns) > self.limits.orphan_after_ns:
            self.membership.give_up()
            text = f"the scheduler was not heard for {silent_ns / 1e9:.0f} s, and a shard waits"
            self._out.append(Halt(1, f"{text} for it"))
        is_silent = self.membership.is_silent(now_ns)
        if is_silent and not self._is_silence_noted:
            self._out.append(
                Note(Level.WARNING, "the scheduler does not answer; rounds go on, changes wait")
            )
        self._is_silence_noted = is_silent
