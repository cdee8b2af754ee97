"""What goes on between the servers of a chain: rounds relayed, applied, and copies of units.

The primary relays the root of each part; the others run the same code on it as on a push of a
worker. A round that is complete at the primary is a version as soon as the chain has applied it.

Part of `treefold.server.core` in a file of its own; just as pure. Effects are appended to the
core's list.
"""

from typing import Protocol

from treefold.common.tree import root_level
from treefold.server.copies import RETRY_MS, Copies
from treefold.server.effects import (
    ComputeDigest,
    DigestComputed,
    Effect,
    ReadyPart,
    RecordVersion,
    ReleasePayload,
    UnitCopied,
)
from treefold.server.holding import Shard
from treefold.server.rounds import HyperOf, Round
from treefold.wire.chain import ChainApplied, ChainAsk, ChainRound
from treefold.wire.exchange import SCHEDULER, Level, Note, Peer, Send
from treefold.wire.membership import MS, Membership
from treefold.wire.messages import (
    ChainDiffers,
    Push,
    RoundHyper,
    RoundMeta,
    RoundStatus,
)
from treefold.wire.words import INITIAL_ROUND, RUN_PARTS_MAX

LACKING_MAX = 64  # parts named in one answer to a round that lacks some


class Rounds(Protocol):
    """What replication needs of the `treefold.server.exchange.Exchange` that it is part of."""

    shards: dict[tuple[int, int], Shard]

    def advance(self, now_ns: int, shard: Shard) -> None:
        """Do what can be done with what is there now."""

    def reopen(self, shard: Shard) -> None:
        """Begin anew with a shard, without anything that is here of it."""

    def release_oldest(self, shard: Shard, current: Round) -> None:
        """Make room for the version after the round's own."""


class Replication:
    """The chains of a server's shards.

    Parameters
    ----------
    rounds : Rounds
        The exchange.
    membership : Membership
        Who this server is.
    check_every : int
        Rounds between two comparisons of copies, 0 for none.
    out : list of Effect
        The core's effects.
    """

    def __init__(
        self, rounds: Rounds, membership: Membership, check_every: int, out: list[Effect]
    ) -> None:
        self._rounds = rounds
        self._check_every = check_every
        self._membership = membership
        self._out = out
        self.copies = Copies(rounds, membership, out)

    # ---- views --------------------------------------------------------------------------------

    def settle(self, now_ns: int, shard: Shard, *, was_primary: bool) -> None:
        """A view has changed the shard's chain."""
        chain, current = shard.chain, shard.round
        self.copies.settle(now_ns, shard)
        if shard.spec.is_asynchronous and shard.version != INITIAL_ROUND:
            self._release(tuple(shard.begin_round_anew()))
            current = shard.round
        if not chain.is_primary:
            self._release(tuple(shard.unstage()))
            shard.waits.clear()
            if current is not None:
                current.reopen()
                self._release(tuple(current.drop_leaves()))
            shard.late_ns = shard.decision_retry_ns = chain.retry_ns = shard.stuck_ns = None
        elif not was_primary:
            shard.is_settled = shard.version == INITIAL_ROUND
            shard.stuck_ns = None if shard.is_settled else now_ns
            if current is not None:
                current.lead()
        if chain.is_primary:
            for who in chain.others:
                self._bring_up(shard, who)
                if not shard.is_settled and who not in chain.copies:
                    self._ask(shard, who)
            chain.retry_ns = now_ns + RETRY_MS * MS
            self.copies.copy(now_ns, shard)
        if not chain.keeps_roots:
            self.drop_roots(shard)
        self._rounds.advance(now_ns, shard)

    def confirm(self, now_ns: int, view: int) -> None:
        """The scheduler has confirmed a view of this server."""
        for shard in self._rounds.shards.values():
            if shard.chain.confirm(view):
                self._rounds.advance(now_ns, shard)

    def settle_version(self, shard: Shard) -> bool:
        """Whether a server that was promoted may speak of its version since just now.

        Its primary may have died before others of the chain had that version.
        """
        chain = shard.chain
        if shard.is_settled or not chain.is_primary or not chain.holds(shard.version):
            return False
        shard.is_settled = True
        shard.stuck_ns = None
        version, senders = shard.version, shard.contributors
        self._out.append(
            RecordVersion(shard.table, shard.number, version, senders, is_primary=True)
        )
        return True

    def drop_roots(self, shard: Shard) -> None:
        """Let go of what was kept for other members."""
        for done in (shard.last, shard.round):
            for ready in done.roots.values() if done is not None else ():
                self._release(() if ready.root is None else (ready.root,))
            if done is not None:
                done.roots.clear()
        shard.last = None

    def close(self, shard: Shard) -> None:
        """The shard is held elsewhere from now on: release what is held for it."""
        self.drop_roots(shard)
        self.copies.close(shard)
        if shard.round is not None:
            self._release(tuple(shard.round.payloads()))

    # ---- the primary: rounds ------------------------------------------------------------------

    def relay_hyper(self, shard: Shard, current: Round) -> None:
        """Tell the other members early what a round is stepped with."""
        if shard.chain.is_primary:
            for who in shard.chain.others:
                self._send_hyper(shard, who, current)

    def _send_hyper(self, shard: Shard, who: int, current: Round) -> None:
        hyper = current.hyper
        if hyper is None or hyper.groups is None or current.number == INITIAL_ROUND:
            return
        message = RoundHyper(
            self._membership.job, shard.chain.me, shard.chain.view, shard.table, shard.number,
            current.number, current.active, hyper.groups, hyper.norm_max,
        )  # fmt: skip
        self._out.append(Send(who, message))

    def relay(self, shard: Shard, current: Round, ready: list[ReadyPart]) -> None:
        """Send roots to the other members, as far as they take part."""
        if shard.chain.is_primary:
            for who in shard.chain.others:
                self._send_roots(shard, who, current, ready)

    def _send_roots(self, shard: Shard, who: int, current: Round, ready: list[ReadyPart]) -> None:
        taken = [
            one for one in ready if shard.chain.takes(who, shard.unit_of(one.part), current.number)
        ]
        for run in _runs_of(taken, shard):
            first, payloads = run[0].part, tuple(one.root for one in run if one.root is not None)
            marks = [one.absent for one in run]
            push = Push(
                self._membership.job, shard.chain.me, shard.chain.view, shard.table, shard.number,
                first, len(run), current.number, current.active, root_level(current.active), 0,
                marks if any(any(mark) for mark in marks) else [],
                shard.frame(first, len(run), current.number) if payloads else None,
            )  # fmt: skip
            self._out.append(Send(who, push, payloads or None))

    def is_applied(self, now_ns: int, shard: Shard, current: Round) -> bool:
        """Whether a round that is complete here may become a version; the chain is told of it."""
        chain = shard.chain
        if not chain.is_primary:
            return True
        if not current.is_closed:
            current.is_closed = True
            version = current.number + 1
            if self._check_every and version % self._check_every == 0 and chain.others:
                current.is_checked = True
                self._out.append(ComputeDigest(shard.table, shard.number, version))
            shard.stuck_ns = now_ns
            chain.retry_ns = now_ns + RETRY_MS * MS
            for who in chain.lagging(current.number + 1):
                self._send_round(shard, who, current)
        return chain.holds(current.number + 1)

    def _send_round(self, shard: Shard, who: int, done: Round) -> None:
        """Tell a member that a round is complete, if it takes part in any."""
        chain, hyper = shard.chain, done.hyper
        parts: list[int] | None = None
        if who in chain.copies:
            if not chain.copies[who].since:
                return
            numbers = range(shard.parts_count)
            parts = [n for n in numbers if chain.takes(who, shard.unit_of(n), done.number)]
        state = b"" if done.meta is None else done.meta.state
        message = ChainRound(
            self._membership.job, chain.me, chain.view, shard.table, shard.number, done.number,
            done.active, [] if hyper is None or hyper.groups is None else hyper.groups,
            0.0 if hyper is None else hyper.norm_max, done.norm, state, parts,
            done.contributors(), done.is_checked and who not in chain.copies,
        )  # fmt: skip
        self._out.append(Send(who, message))

    def on_published(self, shard: Shard, done: Round) -> None:
        """A version is whole here: keep its roots for those who may lack them, or let them go."""
        chain = shard.chain
        shard.stuck_ns = None
        if chain.is_primary or not chain.keeps_roots:
            for ready in done.roots.values():
                self._release(() if ready.root is None else (ready.root,))
            done.roots.clear()
        if shard.last is not None:
            for ready in shard.last.roots.values():
                self._release(() if ready.root is None else (ready.root,))
        shard.last = None if chain.is_primary else done
        if not chain.is_primary and done.is_checked:
            self._out.append(ComputeDigest(shard.table, shard.number, shard.version))
        elif not chain.is_primary and chain.asker is not None:
            self._answer_applied(shard, chain.asker)

    def _bring_up(self, shard: Shard, who: int) -> None:
        """Send a member everything that it may lack of the last round and of this one."""
        for done in (shard.last, shard.round):
            if done is None or done.active == 0:
                continue
            self._send_hyper(shard, who, done)
            self._send_roots(shard, who, done, _in_order(done))
            if done.is_closed or done is shard.last:
                self._send_round(shard, who, done)

    def _ask(self, shard: Shard, who: int) -> None:
        chain = shard.chain
        message = ChainAsk(self._membership.job, chain.me, chain.view, shard.table, shard.number)
        self._out.append(Send(who, message))

    def on_applied(self, now_ns: int, shard: Shard, message: ChainApplied) -> None:
        """A member holds a version."""
        chain = shard.chain
        copying = chain.copies.get(message.sender)
        is_from_before = copying is not None and copying.began != message.began
        if message.sender not in chain.applied or is_from_before:
            return
        version, digest = shard.digest
        if copying is None and _is_astray(shard, message):
            self._tell_differs(shard, message.sender, "has applied what nobody else has")
            return
        if copying is None and message.digest and version == message.version:
            self._compare(shard, message, digest)
        known = chain.applied[message.sender]
        chain.applied[message.sender] = max(known, message.version)
        if copying is None and message.version < shard.version:
            if shard.last is None or shard.last.number != message.version:
                self._tell_differs(shard, message.sender, "lacks a round that is not kept any more")
            else:
                self._bring_up(shard, message.sender)
        self._rounds.advance(now_ns, shard)
        self.copies.copy(now_ns, shard)

    def on_lacking(self, shard: Shard, who: int, status: RoundStatus) -> None:
        """A member lacks something of a round that is complete here."""
        copying = shard.chain.copies.get(who)
        for done in (shard.last, shard.round):
            if done is None or done.number != status.round or who not in shard.chain.others:
                continue
            parts = [one.part for one in status.missing]
            lacking = [done.roots[part] for part in parts if part in done.roots]
            # Of a round that this server was copied into it has the roots of some parts only.
            is_over = done is shard.last
            gone = [n for n in parts if n not in done.roots and (is_over or n in done.made)]
            if copying is None and gone:
                self._tell_differs(shard, who, "lacks a round that is not kept any more")
            self._send_hyper(shard, who, done)
            self._send_roots(shard, who, done, lacking)
            units = dict.fromkeys(shard.unit_of(part) for part in parts)
            for unit in units if copying is not None else ():
                if copying is not None and unit in copying.flying:
                    self.copies.send(who, copying.flying[unit])
            if status.is_meta_missing and (done.is_closed or done is shard.last):
                self._send_round(shard, who, done)

    # ---- the other members --------------------------------------------------------------------

    def on_round(self, now_ns: int, peer: Peer, shard: Shard, message: ChainRound) -> None:
        """The primary says that a round is complete."""
        chain, current = shard.chain, shard.round
        chain.asker = peer
        if not chain.is_started:
            return
        if message.round < shard.version or current is None:
            self._answer_applied(shard, peer)
            return
        if message.round > shard.version:
            self._out.append(Send(peer, shard.status(LACKING_MAX)))
            return
        if current.active == 0:
            current.open(message.active, shard.parts_count)
        is_initial = message.round == INITIAL_ROUND
        if current.hyper is None and not is_initial:
            current.hyper = HyperOf(message.groups, message.norm_max)
        current.norm, current.is_norm_known = message.norm, True
        if current.meta is None and not is_initial:
            current.meta = RoundMeta(
                message.job, message.sender, message.view, message.table, message.shard,
                message.round, message.active, message.groups, message.norm_max, message.state,
            )  # fmt: skip
        current.wanted = message.parts
        current.is_checked = message.is_checked
        current.contributed = message.contributors
        version = shard.version
        self._rounds.advance(now_ns, shard)
        if shard.version == version:
            self._out.append(Send(peer, shard.lacking(LACKING_MAX)))

    def on_ask(self, peer: Peer, shard: Shard) -> None:
        """The primary wants to know how far this server is."""
        if shard.chain.is_started:
            self._answer_applied(shard, peer)

    def on_done(self, now_ns: int, event: DigestComputed | UnitCopied) -> None:
        """The shell has done what was asked for."""
        if isinstance(event, UnitCopied):
            self.copies.on_copied(now_ns, event)
        else:
            self._on_digest(event)

    def _on_digest(self, event: DigestComputed) -> None:
        """A version was summed up: compare it with what its primary has, or let that do so."""
        shard = self._rounds.shards.get((event.table, event.shard))
        if shard is None:
            return
        shard.digest = (event.version, event.digest)
        if not shard.chain.is_primary and shard.chain.asker is not None:
            self._answer_applied(shard, shard.chain.asker)

    def _answer_applied(self, shard: Shard, peer: Peer) -> None:
        chain = shard.chain
        version, digest = shard.digest
        message = ChainApplied(
            self._membership.job, chain.me, chain.view, shard.table, shard.number, chain.began,
            shard.version, digest if version == shard.version else b"", shard.applied.last,
        )  # fmt: skip
        self._out.append(Send(peer, message))

    # ---- time ---------------------------------------------------------------------------------

    def retry(self, now_ns: int) -> None:
        """Send again what was not answered in time, and what is due."""
        for shard in self._rounds.shards.values():
            chain = shard.chain
            if chain.retry_ns is None or now_ns < chain.retry_ns:
                continue
            chain.retry_ns = None
            self.copies.copy(now_ns, shard)
            self._ask_again(now_ns, shard)

    def _ask_again(self, now_ns: int, shard: Shard) -> None:
        chain, current = shard.chain, shard.round
        is_waiting = bool(chain.copies)
        for who in chain.lagging(shard.version) if not shard.is_settled else ():
            is_waiting = True
            self._ask(shard, who)
        self.copies.retry(now_ns, shard)
        if current is not None and current.is_closed:
            for who in chain.lagging(current.number + 1):
                is_waiting = True
                self._send_round(shard, who, current)
        if is_waiting:
            chain.retry_ns = min(chain.retry_ns or 1 << 62, now_ns + RETRY_MS * MS)

    def stuck_ns(self, now_ns: int) -> int:
        """How long the chain of some shard has kept it from going on."""
        since = [one.stuck_ns for one in self._rounds.shards.values() if one.stuck_ns is not None]
        return now_ns - min(since, default=now_ns)

    def describe(self, shard: Shard) -> str:
        """What a shard waits for in its chain, in words; empty if for nothing."""
        chain, current = shard.chain, shard.round
        if current is None or not current.is_closed or not chain.is_primary:
            return ""
        lagging = chain.lagging(current.number + 1)
        what = f"table {shard.spec.name} shard {shard.number} round {current.number}"
        if lagging:
            return f"{what}: servers {', '.join(map(str, lagging))} to apply it"
        return f"{what}: the scheduler to confirm view {chain.view}"

    def _release(self, payloads: tuple[int, ...]) -> None:
        self._out += [ReleasePayload(payload) for payload in payloads]

    def _compare(self, shard: Shard, message: ChainApplied, digest: bytes) -> None:
        if message.digest == digest:
            return
        what = f"table {shard.spec.name} shard {shard.number} version {message.version}"
        text = f"{what}: server {message.sender} has {message.digest.hex()}, not {digest.hex()}"
        self._out.append(Note(Level.ERROR, f"copies differ: {text}"))
        self._tell_differs(shard, message.sender, "holds something else")

    def _tell_differs(self, shard: Shard, who: int, why: str) -> None:
        """A member is not in sync and has to be copied to again."""
        chain = shard.chain
        what = f"table {shard.spec.name} shard {shard.number}: server {who} {why}"
        self._out.append(Note(Level.WARNING, f"{what}; it is copied to again"))
        message = ChainDiffers(chain.me, shard.table, shard.number, chain.view, who)
        self._out.append(Send(SCHEDULER, message))


def _is_astray(shard: Shard, message: ChainApplied) -> bool:
    """Whether a member of an asynchronous table's chain has another version than this one.

    It may have got one of the primary before, which nobody else has.
    """
    if not shard.spec.is_asynchronous or message.version <= 0 or message.version < shard.version:
        return False
    if message.version == shard.version:
        return message.last != shard.applied.last
    current = shard.round
    is_next = current is not None and current.is_closed and message.version == shard.version + 1
    return current is None or not is_next or [message.last] != current.contributed


def _in_order(done: Round) -> list[ReadyPart]:
    return [done.roots[part] for part in sorted(done.roots)]


def _runs_of(ready: list[ReadyPart], shard: Shard) -> list[list[ReadyPart]]:
    """Adjacent parts that can travel in one message."""
    runs: list[list[ReadyPart]] = []
    for one in ready:
        last = runs[-1][-1] if runs else None
        if (
            last is not None
            and one.part == last.part + 1
            and len(runs[-1]) < RUN_PARTS_MAX
            and shard.wires[one.part] is shard.wires[last.part]
            and (one.root is None) == (last.root is None)
        ):
            runs[-1].append(one)
        else:
            runs.append([one])
    return runs
