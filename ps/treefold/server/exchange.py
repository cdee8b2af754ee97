"""A server's exchange with workers: nodes in, versions out.

Part of `treefold.server.core` in a file of its own; just as pure. Effects are appended to the
core's list.
"""

import math

from treefold.common.errors import InvariantError
from treefold.common.spec import Rule
from treefold.common.story import Story
from treefold.common.tree import Node
from treefold.server import answers, lateness
from treefold.server.asynchronous import Asynchronous
from treefold.server.checkpoints import Saves
from treefold.server.effects import (
    CloseShard,
    ComputeNorm,
    DigestComputed,
    Effect,
    MakeParts,
    NormComputed,
    OpenShard,
    ProductsComputed,
    RecordVersion,
    ReleasePayload,
    ReleaseVersion,
    ShardRestored,
    ShardStored,
    UnitCopied,
)
from treefold.server.guarding import Guarding
from treefold.server.holding import Kept, Shard, Wait
from treefold.server.quorum import Quorum
from treefold.server.replication import Replication
from treefold.server.rounds import Arrived, HyperOf, Round, RoundState
from treefold.wire.decisions import HealthDecision, NormDecision, NormReport, QuorumDecision
from treefold.wire.exchange import SCHEDULER, Peer, Send
from treefold.wire.membership import MS, Membership
from treefold.wire.messages import (
    Pull,
    Refused,
    RoundHyper,
    RoundMeta,
)
from treefold.wire.words import INITIAL_ROUND, Code

Done = (
    NormComputed | DigestComputed | UnitCopied | ShardStored | ShardRestored | ProductsComputed
)  # fmt: skip
ANSWER_PARTS_MAX = 8  # parts (MiB) that are made before those who wait hear of them
STATUS_PARTS_MAX = 64  # parts named in one RoundStatus; the worker asks again for the rest
NORM_RETRY_MS = 500


class Exchange:
    """The shards of a server, and the way of their rounds to versions.

    Parameters
    ----------
    membership : Membership
        Who this server is.
    story : Story
        The core's.
    check_every : int
        Rounds between two comparisons of a shard's copies, 0 for none.
    out : list of Effect
        The core's effects.

    Attributes
    ----------
    shards : dict of (table, shard) to Shard
        Those that this server holds, as primary or not.
    replication : Replication
        What goes on between the servers of a shard's chain.
    saves : Saves
        Shards on their way to checkpoints.
    duplicates : int
        Contributions that were here already.
    made : dict of (table, shard) to [int, int]
        Versions that were made here, and the contributions in those that were as primary.
    """

    def __init__(
        self, membership: Membership, story: Story, check_every: int, out: list[Effect]
    ) -> None:
        self.membership = membership
        self.story = story
        self.shards: dict[tuple[int, int], Shard] = {}
        self.duplicates = 0
        self.made: dict[tuple[int, int], list[int]] = {}
        self.replication = Replication(self, membership, check_every, out)
        self.saves = Saves(membership, out)
        self.asynchronous = Asynchronous(self.saves, out)
        self.quorum = Quorum(membership, out)
        self.guarding = Guarding(membership, out)
        self._out = out

    def on_done(self, now_ns: int, event: Done) -> None:
        """The shell has done what was asked for."""
        match event:
            case NormComputed():
                self._on_norm_computed(now_ns, event)
            case ShardStored():
                self.saves.on_stored(now_ns, event, self.shards.get((event.table, event.shard)))
            case ShardRestored():
                self._on_restored(now_ns, event)
            case ProductsComputed():
                shard = self.shards.get((event.table, event.shard))
                if shard is not None:  # it may be closed by the time something is measured
                    self.guarding.on_products(shard, event)
                    self.advance(now_ns, shard)
            case _:
                self.replication.on_done(now_ns, event)

    # ---- contributions ------------------------------------------------------------------------

    def _gathering(self, shard: Shard) -> Quorum | Guarding | None:
        """Who keeps the contributions to a shard until it is decided what counts, if anybody."""
        if shard.spec.is_quorum:
            return self.quorum
        return self.guarding if shard.spec.is_gathered else None

    def on_push(self, now_ns: int, peer: Peer, shard: Shard, arrived: Arrived) -> None:
        """Take in one node of a run of parts, and make what can be made of it."""
        push = arrived.push
        is_first = push.round == INITIAL_ROUND or shard.version == INITIAL_ROUND
        if shard.is_by_slot and not is_first:
            if shard.spec.is_gathered and push.round == shard.version:
                lateness.open_round(now_ns, shard)
            (self._gathering(shard) or self.asynchronous).on_push(peer, shard, arrived)
            self.advance(now_ns, shard)
            return
        if not shard.chain.is_started:  # the first copy will say where to begin
            self._out += [ReleasePayload(payload) for payload in arrived.payloads]
            return
        refusal = shard.refusal_of(push) or shard.out_of_turn(push.round, push.active)
        is_late = push.round < shard.version or shard.round is None
        if refusal is not None or is_late:
            self._out += [ReleasePayload(payload) for payload in arrived.payloads]
            self.duplicates += push.count if refusal is None else 0
            self._out += [] if refusal is None else [Send(peer, refusal)]
            return
        current = self._open_round(shard, push.active)
        if shard.chain.is_primary:
            lateness.open_round(now_ns, shard)
        for number in range(push.count):
            held = arrived.held(number)
            part = push.part + number
            node = Node(push.level, push.index)
            is_here = shard.is_loaded(part)
            if shard.spec.is_watched and shard.chain.is_primary and is_here:
                self.guarding.watch(shard, arrived, number)
            is_taken = is_here and current.take(part, node, push.sender, held, self._out)
            if not is_taken:
                self.duplicates += 1
                if held.payload is not None:
                    self._out.append(ReleasePayload(held.payload))
            else:  # at once, while the sum is in the processor's cache
                self._make_parts(shard, current)
        self.advance(now_ns, shard)

    def _open_round(self, shard: Shard, active: int) -> Round:
        current = shard.round
        if current is None:
            raise InvariantError("a push into a closed shard", self.story.lines())
        if current.active == 0:
            current.open(active, shard.parts_count)
        return current

    def on_hyper(
        self, now_ns: int, peer: Peer, shard: Shard, message: RoundHyper | RoundMeta
    ) -> None:
        """Take in what slot 0 brings."""
        if not shard.chain.is_started:
            return
        if shard.is_by_slot:
            if isinstance(message, RoundMeta) and shard.version != INITIAL_ROUND:
                (self._gathering(shard) or self.asynchronous).on_meta(peer, shard, message)
                self.advance(now_ns, shard)
            return
        refusal = shard.refusal_of_hyper(message)
        refusal = refusal or shard.out_of_turn(message.round, message.active)
        if refusal is not None:
            self._out.append(Send(peer, refusal))
            return
        if message.round < shard.version or shard.round is None:
            self.duplicates += 1
            return
        current = self._open_round(shard, message.active)
        if current.hyper is None:
            current.hyper = HyperOf(message.groups, message.norm_max)
            self.replication.relay_hyper(shard, current)
        if isinstance(message, RoundMeta) and current.meta is None:
            current.meta = message
        self.advance(now_ns, shard)

    # ---- a round's way to its version ---------------------------------------------------------

    def advance(self, now_ns: int, shard: Shard) -> None:
        """Do what can be done with what is there now."""
        while self._advance(now_ns, shard):
            pass

    def _advance(self, now_ns: int, shard: Shard) -> bool:
        """Do what can be done; True if that may go on with another round at once."""
        current = shard.round
        if self.replication.settle_version(shard):
            self._answer(shard)
            if current is None or not current.made:
                self.saves.save(shard)
        if current is None:
            return False
        if shard.spec.is_asynchronous:
            self.asynchronous.begin(shard)
        elif (gathering := self._gathering(shard)) is not None:
            gathering.begin(now_ns, shard)
        hyper = current.hyper
        if hyper is not None and hyper.norm_max > 0 and not current.is_norm_known:
            if shard.chain.is_primary:
                self._measure(now_ns, shard, current)
        else:
            self._make_parts(shard, current)
        self._out += answers.made(shard, current)
        if current.is_complete and self.replication.is_applied(now_ns, shard, current):
            self._publish(now_ns, shard, current)
            return shard.spec.is_asynchronous
        return False

    def _answer(self, shard: Shard) -> None:
        """Send the newest version to those who wait for it."""
        needs = [one.need for one in shard.waits.values() if one.is_met(shard.applied.clocks)]
        self._out += answers.published(shard)
        for need in needs:
            self.saves.end_pass(shard, need)

    def _measure(self, now_ns: int, shard: Shard, current: Round) -> None:
        if current.state is not RoundState.OPEN or not current.is_rooted:
            return
        current.state = RoundState.MEASURING
        shard.decision_retry_ns = now_ns + NORM_RETRY_MS * MS
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
        is_alone = shard.spec.is_asynchronous and current.number != INITIAL_ROUND
        if is_alone and not current.is_gathered:  # another primary may make another version of it
            return
        self.release_oldest(shard, current)
        ready = current.ready()
        keeps_roots = shard.chain.keeps_roots
        self._out.append(
            MakeParts(
                shard.table,
                shard.number,
                current.number + 1,
                ready,
                hyper.groups,
                hyper.norm_max,
                current.norm,
                keeps_roots,
            )
        )
        if keeps_roots:
            current.roots.update({part.part: part for part in ready})
            self.replication.relay(shard, current, ready)
        current.made.update(current.rooted)
        current.rooted.clear()
        current.fresh += [part.part for part in ready]
        if len(current.fresh) >= ANSWER_PARTS_MAX:
            self._out += answers.made(shard, current)

    def reopen(self, shard: Shard) -> None:
        """Begin anew with a shard, without anything that is here of it."""
        self.close(shard)
        self._out.append(CloseShard(shard.table, shard.number))
        shard.restart()
        self._out.append(OpenShard(shard.table, shard.number, shard.spec, shard.span))

    def close(self, shard: Shard) -> None:
        """Release what is held of a shard."""
        self.asynchronous.close(shard)
        self.replication.close(shard)

    def release_oldest(self, shard: Shard, current: Round) -> None:
        """The version before the round's own makes room for the one after it.

        Nobody needs it any more: every slot of this round was computed from the round's version,
        which exists on all servers then.
        """
        oldest = current.number - 1
        if not current.made and shard.kept.pop(oldest, None) is not None:
            self._out.append(ReleaseVersion(shard.table, shard.number, oldest))

    def _publish(self, now_ns: int, shard: Shard, current: Round) -> None:
        version = current.number + 1
        is_primary = shard.chain.is_primary
        self._out.append(
            RecordVersion(
                shard.table, shard.number, version, current.contributors(), is_primary=is_primary
            )
        )
        if current.number != INITIAL_ROUND:
            counts = self.made.setdefault((shard.table, shard.number), [0, 0])
            counts[0] += 1
            slots = current.active if current.included is None else len(current.included)
            counts[1] += slots if is_primary else 0
        self.story.add(now_ns, f"table {shard.table} shard {shard.number}: version {version}")
        shard.publish(now_ns, current)
        self.saves.save(shard)
        self.replication.on_published(shard, current)
        self._answer(shard)

    def _on_restored(self, now_ns: int, event: ShardRestored) -> None:
        """A shard begins with a version of a checkpoint, not with initial values."""
        shard = self.shards.get((event.table, event.shard))
        if shard is None or shard.chain.is_started or shard.chain.is_joining:
            return
        shard.chain.is_started = True
        shard.begin_at(event.version, {event.version: Kept(event.state, event.norm)})
        if shard.spec.rule is Rule.CONSTANT:  # it is in no file of this job's checkpoints yet
            self.saves.save(shard)
        self._answer(shard)
        self.replication.copies.copy(now_ns, shard)
        self.advance(now_ns, shard)

    # ---- norms --------------------------------------------------------------------------------

    def _on_norm_computed(self, now_ns: int, event: NormComputed) -> None:
        """Tell the scheduler this shard's share of a gradient norm."""
        shard = self.shards[event.table, event.shard]
        if shard.round is None or shard.round.number != event.round:
            return
        shard.round.sums = event.sums
        shard.decision_retry_ns = now_ns + NORM_RETRY_MS * MS
        self._out.append(Send(SCHEDULER, self._norm_report(shard)))

    def norms(self) -> list[tuple[int, int, float]]:
        """``(table, round, norm)`` of the newest norm of each table that has any."""
        found: dict[int, tuple[int, int, float]] = {}
        for shard in self.shards.values():
            kept = shard.kept.get(shard.version)
            if kept is None or math.isnan(kept.norm) or not shard.chain.is_primary:
                continue
            known = found.get(shard.table, (0, -1, 0.0))
            if shard.version - 1 > known[1]:
                found[shard.table] = (shard.table, shard.version - 1, kept.norm)
        return list(found.values())

    def ask_again(self, now_ns: int) -> None:
        """Report again what was not decided in time; go on where nobody reads any more."""
        for shard in self.shards.values():
            if shard.limited_ns is not None and now_ns >= shard.limited_ns:
                shard.limited_ns = None
                self.advance(now_ns, shard)
            if shard.decision_retry_ns is not None and now_ns >= shard.decision_retry_ns:
                gathering = self._gathering(shard)
                if gathering is not None and gathering.report_again(now_ns, shard):
                    continue
                shard.decision_retry_ns = now_ns + NORM_RETRY_MS * MS
                self._out.append(Send(SCHEDULER, self._norm_report(shard)))

    def _norm_report(self, shard: Shard) -> NormReport:
        current = shard.round
        if current is None:
            raise InvariantError("a norm report without a round", self.story.lines())
        who = self.membership.incarnation
        return NormReport(who, shard.table, shard.number, current.number, current.sums)

    def on_decision(
        self, now_ns: int, decision: NormDecision | QuorumDecision | HealthDecision
    ) -> None:
        """The scheduler has added all shards' shares, or says what of a round counts."""
        if not isinstance(decision, NormDecision):
            for shard in self.shards.values():
                gathering = self._gathering(shard)
                if gathering is not None and gathering.on_decision(shard, decision):
                    self.advance(now_ns, shard)
            return
        for (table, _), shard in self.shards.items():
            current = shard.round
            if table != decision.table or current is None or current.number != decision.round:
                continue
            if current.state is RoundState.MEASURING and not current.is_norm_known:
                current.norm, current.is_norm_known = decision.norm, True
                shard.decision_retry_ns = None
                self._make_parts(shard, current)
                self.advance(now_ns, shard)

    # ---- pulls --------------------------------------------------------------------------------

    def on_pull(self, now_ns: int, peer: Peer, shard: Shard, pull: Pull) -> None:
        """Answer a pull, or let it wait."""
        parts = list(dict.fromkeys(pull.parts)) or list(range(shard.parts_count))
        if any(part >= shard.parts_count for part in parts):
            text = f"shard {shard.number} of table {shard.table} has {shard.parts_count} parts"
            self._out.append(Send(peer, Refused(0, Code.BAD_MESSAGE, text)))
        elif shard.spec.is_asynchronous and shard.version != INITIAL_ROUND:
            self.asynchronous.limit(now_ns, shard, pull.need)
            self.asynchronous.on_pull(peer, shard, pull, parts)
            if peer in shard.waits and pull.need is not None and not pull.need.clock:
                lateness.begin(now_ns, shard)
        else:
            self._answer_pull(now_ns, peer, shard, pull, parts)
            if not shard.spec.is_asynchronous:
                self.saves.end_pass(shard, pull.need)

    def _answer_pull(
        self, now_ns: int, peer: Peer, shard: Shard, pull: Pull, parts: list[int]
    ) -> None:
        """Answer with a version that is there, or let the worker wait for the next one."""
        if pull.version <= shard.version and not shard.can_tell(pull.version):
            shard.waits[peer] = Wait(pull.version, dict.fromkeys(parts))
        elif pull.version <= shard.version:
            self._out += answers.of_version(peer, shard, pull.version, parts)
        else:
            lateness.begin(now_ns, shard)
            self._out += answers.wait(peer, shard, Wait(pull.version, dict.fromkeys(parts)))
            if pull.attempt > 0:
                self._out.append(Send(peer, shard.status(STATUS_PARTS_MAX)))

    def waiting_for(self, shard: Shard) -> str:
        """What a shard waits for, in words; empty if for nothing."""
        chain = shard.chain
        if not chain.is_primary:
            return ""
        if not chain.is_started:
            return f"table {shard.spec.name} shard {shard.number}: the values of its checkpoint"
        is_idle = shard.spec.is_asynchronous and shard.version != INITIAL_ROUND
        return self.replication.describe(shard) or ("" if is_idle else shard.waiting_for())
