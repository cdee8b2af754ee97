"""The server's decisions: which node is taken in, when a round is complete, who gets which version.

Pure: no socket, clock, thread or tensor. A payload is a number that the shell can turn into a
tensor. What a server must never do is decided here: count a slot twice, publish before the root of
every part is there, answer with a version that does not exist yet.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from treefold.common.errors import InvariantError
from treefold.common.layout import Layout, ShardSpan
from treefold.common.story import Story
from treefold.server import answers, lateness
from treefold.server.effects import (
    ComputeNorm,
    Effect,
    Event,
    MakeParts,
    NormComputed,
    OpenShard,
    RecordVersion,
    ReleasePayload,
    ReleaseVersion,
    ServerDrainAsked,
    ServerFailed,
)
from treefold.server.rounds import (
    Arrived,
    HyperOf,
    Round,
    RoundState,
    Shard,
    Wait,
)
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
from treefold.wire.membership import MS, Membership, Standing
from treefold.wire.messages import (
    AssignTable,
    Code,
    Fenced,
    HeartbeatSeen,
    Leave,
    NormDecision,
    NormReport,
    Outcome,
    Phase,
    Pull,
    Push,
    Refused,
    Registered,
    RoundHyper,
    RoundLate,
    RoundMeta,
    ShardPlace,
    Stop,
    View,
)

if TYPE_CHECKING:
    from treefold.common.spec import TableSpec

ANSWER_PARTS_MAX = 8  # parts (MiB) that are made before those who wait hear of them
STATUS_PARTS_MAX = 64  # parts named in one RoundStatus; the worker asks again for the rest
NORM_RETRY_MS = 500


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Times and bounds of a server.

    Attributes
    ----------
    connect_timeout_ns : int
        How long to wait for the scheduler's first answer.
    orphan_after_ns : int
        Without a word from the scheduler and from any worker for so long, the server ends.
    """

    connect_timeout_ns: int
    orphan_after_ns: int = 30_000 * MS


class ServerCore:
    """One server: its membership, its shards, and the exchange with workers.

    Parameters
    ----------
    membership : Membership
        The scheduler's side of this process's life.
    limits : ServerLimits
        Times and bounds.
    """

    def __init__(self, membership: Membership, limits: ServerLimits) -> None:
        self.membership = membership
        self.limits = limits
        self.story = Story()
        self.view = 0
        self.specs: dict[int, TableSpec] = {}
        self.places: dict[tuple[int, int], ShardPlace] = {}
        self.shards: dict[tuple[int, int], Shard] = {}
        self.duplicates = 0
        self._started_ns: int | None = None
        self._traffic_ns = 0
        self._is_silence_noted = False
        self._is_failed = False
        self._out: list[Effect] = []

    # ---- the interface of every core ----------------------------------------------------------

    def handle(self, now_ns: int, event: Event) -> list[Effect]:
        """Take in one event and say what is to be done."""
        self._out = []
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
                self._traffic_ns = now_ns
                self._on_worker(now_ns, peer, message, payloads)
            case NormComputed(table, shard, round_, sums):
                self._on_norm_computed(now_ns, (table, shard), round_, sums)
            case PeerLost(peer):
                for held in self.shards.values():
                    held.waits.pop(peer, None)
            case ServerDrainAsked():
                self._out += self.membership.leave(
                    now_ns, Outcome.DRAINED, "the server was asked to stop"
                )
            case ServerFailed(text):
                self._is_failed = True
                self._out.append(Note(Level.ERROR, text))
                self._out += self.membership.leave(now_ns, Outcome.FAILED, text)
            case Tick():
                pass
        self._on_time(now_ns)
        return self._out

    def next_deadline_ns(self) -> int | None:
        """When a `Tick` is needed at the latest."""
        times = [self.membership.next_deadline_ns()]
        times += [shard.late_ns for shard in self.shards.values() if shard.late_ns is not None]
        times += [
            shard.norm_retry_ns for shard in self.shards.values() if shard.norm_retry_ns is not None
        ]
        return min((time for time in times if time is not None), default=None)

    def check_invariants(self) -> None:
        """Raise `InvariantError` if the state contradicts itself."""
        for key, shard in self.shards.items():
            current = shard.round
            if current is None:
                continue
            if current.is_complete and current.state is RoundState.OPEN:
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
            case Fenced():
                if self.membership.on_fenced(now_ns, message):
                    self._out.append(
                        Halt(1, "the scheduler gave this server up for dead; its shards are lost")
                    )
            case AssignTable(table, spec):
                self.specs.setdefault(table, spec)
                self.membership.vitals.tables = len(self.specs)
                self._open_shards()
            case View():
                self._on_view(message)
            case NormDecision():
                self._on_norm_decision(now_ns, message)
            case Refused():
                self._out.append(Halt(3, message.text))
            case Stop():
                self._on_stop(message)
            case _:
                self._out.append(
                    Note(Level.WARNING, f"the scheduler sent {type(message).__name__}: ignored")
                )

    def _on_registered(self, now_ns: int, message: Registered) -> None:
        if self.membership.job not in (0, message.job):
            text = "the scheduler runs another job now; this server's job is lost"
            self._out.append(Halt(1, text))
        elif self.membership.on_registered(now_ns, message):
            self.membership.job = message.job

    def _on_stop(self, message: Stop) -> None:
        if self.membership.standing is Standing.GONE:
            return  # told twice; one farewell is enough
        self.membership.on_stop(message)
        who = self.membership.incarnation
        self._out.append(Send(SCHEDULER, Leave(who, message.outcome, "")))
        status = {Outcome.FAILED: 1, Outcome.NOT_FORMED: 3}.get(message.outcome, 0)
        self._out.append(Halt(status, message.text))

    def _on_view(self, view: View) -> None:
        is_named = self.membership.incarnation > 0  # a view may overtake the answer that names us
        if not is_named or view.number <= self.view or view.phase is Phase.ENDED:
            return
        self.view = view.number
        self.membership.vitals.view = view.number
        for table in view.tables:
            for place in table.shards:
                if place.server == self.membership.incarnation:
                    self.places[table.table, place.shard] = place
        self._open_shards()

    def _open_shards(self) -> None:
        for (table, number), place in self.places.items():
            spec = self.specs.get(table)
            if spec is None or (table, number) in self.shards:
                continue
            span = ShardSpan(place.first_block, place.blocks)
            layout = Layout(spec)
            parts = layout.parts(span)
            pieces = [len(layout.pieces(*part)) for part in parts]
            wires = [layout.wire(part) for part in parts]
            self.shards[table, number] = Shard(
                table, number, place.view, spec, parts, pieces, wires
            )
            self._out.append(OpenShard(table, number, spec, span))

    # ---- workers ------------------------------------------------------------------------------

    def _on_worker(
        self, now_ns: int, peer: Peer, message: object, payloads: tuple[int, ...]
    ) -> None:
        if not isinstance(message, Push | RoundHyper | RoundMeta | Pull):
            text = f"a server takes pushes and pulls, not {type(message).__name__}"
            self._out.append(Send(peer, Refused(0, Code.BAD_MESSAGE, text)))
            return
        shard = self._shard_for(peer, message)
        if shard is None:
            self._out += [ReleasePayload(payload) for payload in payloads]
        elif isinstance(message, Push):
            self._on_push(now_ns, peer, shard, Arrived(message, payloads))
        elif isinstance(message, Pull):
            self._on_pull(now_ns, peer, shard, message)
        else:
            self._on_hyper(now_ns, peer, shard, message)

    def _shard_for(self, peer: Peer, message: Push | RoundHyper | RoundMeta | Pull) -> Shard | None:
        """The shard a worker means; None with a refusal, or in silence while we are behind."""
        shard = self.shards.get((message.table, message.shard))
        refusal: Refused | None = None
        if self.membership.job == 0:
            return None  # the scheduler's answer has not arrived yet; the worker will ask again
        if message.job != self.membership.job:
            refusal = Refused(0, Code.JOB_MISMATCH, "this server belongs to another job")
        elif message.view > self.view:
            return None  # the view that names us has not arrived yet; the worker will ask again
        elif shard is None and (message.table, message.shard) in self.places:
            return None  # the same for the table's spec
        elif shard is None:
            known = ", ".join(f"{table}/{number}" for table, number in self.shards) or "none"
            text = (
                f"this server has no shard {message.shard} of table {message.table}; it has {known}"
            )
            refusal = Refused(0, Code.UNKNOWN_TABLE, text)
        elif message.view < shard.view:
            text = f"view {message.view} is too old for this shard, it is {shard.view} now"
            refusal = Refused(0, Code.STALE_VIEW, text)
        if refusal is not None:
            self._out.append(Send(peer, refusal))
            return None
        return shard

    def _on_push(self, now_ns: int, peer: Peer, shard: Shard, arrived: Arrived) -> None:
        """Take in one node of a run of parts, and make what can be made of it."""
        push = arrived.push
        refusal = shard.refusal_of(push) or shard.out_of_turn(push.round, push.active)
        is_late = push.round < shard.version or shard.round is None
        if refusal is not None or is_late:
            self._out += [ReleasePayload(payload) for payload in arrived.payloads]
            self.duplicates += push.count if refusal is None else 0
            self._out += [] if refusal is None else [Send(peer, refusal)]
            return
        current = self._open_round(now_ns, shard, push.active)
        for number in range(push.count):
            held = arrived.held(number)
            if not current.take(push.part + number, push, held, self._out):
                self.duplicates += 1
                if held.payload is not None:
                    self._out.append(ReleasePayload(held.payload))
            else:  # at once, while the sum is in the processor's cache
                self._make_parts(shard, current)
        self._advance(now_ns, shard)

    def _open_round(self, now_ns: int, shard: Shard, active: int) -> Round:
        current = shard.round
        if current is None:
            raise InvariantError("a push into a closed shard", self.story.lines())
        if current.active == 0:
            current.open(active, shard.parts_count)
            lateness.open_round(now_ns, shard)
        return current

    def _on_hyper(
        self, now_ns: int, peer: Peer, shard: Shard, message: RoundHyper | RoundMeta
    ) -> None:
        refusal = shard.refusal_of_hyper(message)
        refusal = refusal or shard.out_of_turn(message.round, message.active)
        if refusal is not None:
            self._out.append(Send(peer, refusal))
            return
        if message.round < shard.version or shard.round is None:
            self.duplicates += 1
            return
        current = self._open_round(now_ns, shard, message.active)
        if current.hyper is None:
            current.hyper = HyperOf(message.groups, message.norm_max)
        if isinstance(message, RoundMeta) and current.meta is None:
            current.meta = message
        self._advance(now_ns, shard)

    # ---- a round's way to its version ---------------------------------------------------------

    def _advance(self, now_ns: int, shard: Shard) -> None:
        """Do what can be done with what is there now."""
        current = shard.round
        if current is None:
            return
        hyper = current.hyper
        if hyper is not None and hyper.norm_max > 0:
            self._measure(now_ns, shard, current)
        else:
            self._make_parts(shard, current)
        self._out += answers.made(shard, current)
        if current.is_complete:
            self._publish(now_ns, shard, current)

    def _measure(self, now_ns: int, shard: Shard, current: Round) -> None:
        if current.state is not RoundState.OPEN or not current.is_rooted:
            return
        current.state = RoundState.MEASURING
        shard.norm_retry_ns = now_ns + NORM_RETRY_MS * MS
        ready = current.ready()
        self._out.append(ComputeNorm(shard.table, shard.number, current.number, ready))

    def _make_parts(self, shard: Shard, current: Round) -> None:
        """Step what is rooted, if that is possible yet: parts one by one, or all at once."""
        hyper = current.hyper
        if hyper is None or not current.rooted:
            return
        is_measured = hyper.norm_max == 0 or current.is_norm_known
        if not is_measured or (shard.is_whole and not current.is_rooted):
            return
        if not current.made:
            self._release_oldest(shard, current)
        ready = current.ready()
        self._out.append(
            MakeParts(
                shard.table,
                shard.number,
                current.number + 1,
                ready,
                hyper.groups,
                hyper.norm_max,
                current.norm,
            )
        )
        current.made.update(current.rooted)
        current.rooted.clear()
        current.fresh += [part.part for part in ready]
        if len(current.fresh) >= ANSWER_PARTS_MAX:
            self._out += answers.made(shard, current)

    def _release_oldest(self, shard: Shard, current: Round) -> None:
        """The version before the round's own makes room for the one after it.

        Nobody needs it any more: every slot of this round was computed from the round's version,
        which exists on all servers then.
        """
        oldest = current.number - 1
        if shard.kept.pop(oldest, None) is not None:
            self._out.append(ReleaseVersion(shard.table, shard.number, oldest))

    def _on_norm_computed(
        self, now_ns: int, key: tuple[int, int], round_: int, sums: list[float]
    ) -> None:
        shard = self.shards[key]
        if shard.round is None or shard.round.number != round_:
            return
        shard.round.sums = sums
        shard.norm_retry_ns = now_ns + NORM_RETRY_MS * MS
        self._out.append(Send(SCHEDULER, self._norm_report(shard)))

    def _norm_report(self, shard: Shard) -> NormReport:
        current = shard.round
        if current is None:
            raise InvariantError("a norm report without a round", self.story.lines())
        who = self.membership.incarnation
        return NormReport(who, shard.table, shard.number, current.number, current.sums)

    def _on_norm_decision(self, now_ns: int, decision: NormDecision) -> None:
        for (table, _), shard in self.shards.items():
            current = shard.round
            if table != decision.table or current is None or current.number != decision.round:
                continue
            if current.state is RoundState.MEASURING and not current.is_norm_known:
                current.norm, current.is_norm_known = decision.norm, True
                shard.norm_retry_ns = None
                self._make_parts(shard, current)
                self._advance(now_ns, shard)

    def _publish(self, now_ns: int, shard: Shard, current: Round) -> None:
        version = current.number + 1
        self._out.append(RecordVersion(shard.table, shard.number, version, current.contributors()))
        self.story.add(now_ns, f"table {shard.table} shard {shard.number}: version {version}")
        shard.publish(now_ns, current)
        self._out += answers.published(shard)

    # ---- pulls --------------------------------------------------------------------------------

    def _on_pull(self, now_ns: int, peer: Peer, shard: Shard, pull: Pull) -> None:
        parts = list(dict.fromkeys(pull.parts)) or list(range(shard.parts_count))
        if any(part >= shard.parts_count for part in parts):
            text = f"shard {shard.number} of table {shard.table} has {shard.parts_count} parts"
            self._out.append(Send(peer, Refused(0, Code.BAD_MESSAGE, text)))
        elif pull.version <= shard.version:
            self._out += answers.of_version(peer, shard, pull.version, parts)
        else:
            lateness.begin(now_ns, shard)
            self._out += answers.wait(peer, shard, Wait(pull.version, dict.fromkeys(parts)))
            if pull.attempt > 0:
                self._out.append(Send(peer, shard.status(STATUS_PARTS_MAX)))

    # ---- time ---------------------------------------------------------------------------------

    def _on_time(self, now_ns: int) -> None:
        for round_, missing in lateness.reports(now_ns, self.shards):
            late = RoundLate(self.membership.incarnation, round_, missing)
            self._out.append(Send(SCHEDULER, late))
        for shard in self.shards.values():
            if shard.norm_retry_ns is not None and now_ns >= shard.norm_retry_ns:
                shard.norm_retry_ns = now_ns + NORM_RETRY_MS * MS
                self._out.append(Send(SCHEDULER, self._norm_report(shard)))
        due_ns = self.membership.next_deadline_ns()
        if due_ns is not None and now_ns >= due_ns:
            vitals = self.membership.vitals
            vitals.round = max([shard.version for shard in self.shards.values()], default=0)
            waits = (shard.waiting_for() for shard in self.shards.values())
            vitals.waiting = next((text for text in waits if text), "")
            self._out += self.membership.tick(now_ns)
        self._check_orphaned(now_ns)
        is_gone = self.membership.standing is Standing.GONE
        if is_gone and not any(isinstance(effect, Halt) for effect in self._out):
            self._out.append(Halt(int(self._is_failed), "the server has left"))

    def _check_orphaned(self, now_ns: int) -> None:
        started = self._started_ns or 0
        if not self.membership.registrations and self.membership.incarnation == 0:
            waited = now_ns - started
            if waited > self.limits.connect_timeout_ns:
                self.membership.give_up()
                self._out.append(Halt(3, f"no scheduler answered within {waited / 1e9:.0f} s"))
            return
        quiet = now_ns - max(self._traffic_ns, self.membership.heard_ns)
        if self.membership.is_member and quiet > self.limits.orphan_after_ns:
            self.membership.give_up()
            self._out.append(
                Halt(1, f"neither scheduler nor workers were heard for {quiet / 1e9:.0f} s")
            )
        if self.membership.is_silent(now_ns) and not self._is_silence_noted:
            self._out.append(
                Note(Level.WARNING, "the scheduler does not answer; rounds go on, changes wait")
            )
        self._is_silence_noted = self.membership.is_silent(now_ns)
