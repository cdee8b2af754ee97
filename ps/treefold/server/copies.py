"""The copy of a shard to a server that joins its chain: unit by unit, beside the rounds.

Each unit is copied at the version that it has at that moment, and from then on the member takes
part in its rounds. So nothing has to stand still, and no copy of a whole shard is ever made.

Part of `treefold.server.core` in a file of its own; just as pure. Effects are appended to the
core's list.
"""

from typing import Protocol

import msgspec

from treefold.server.chains import Copying, Flight
from treefold.server.effects import CopyUnit, Effect, LoadUnit, ReleasePayload, UnitCopied
from treefold.server.holding import Incoming, Kept, Shard
from treefold.server.rounds import Round
from treefold.wire.chain import KeptVersion, UnitCopy, UnitTaken
from treefold.wire.exchange import SCHEDULER, Peer, Send
from treefold.wire.membership import MS, Membership
from treefold.wire.messages import ChainSynced
from treefold.wire.words import INITIAL_ROUND

RETRY_MS = 300  # after so much silence a member of the chain is asked again
COPIES_MAX = 2  # units on their way to one joining member at a time


class Rounds(Protocol):
    """What copies need of the `treefold.server.exchange.Exchange` that they are part of."""

    shards: dict[tuple[int, int], Shard]

    def advance(self, now_ns: int, shard: Shard) -> None:
        """Do what can be done with what is there now."""

    def reopen(self, shard: Shard) -> None:
        """Begin anew with a shard, without anything that is here of it."""

    def release_oldest(self, shard: Shard, current: Round) -> None:
        """Make room for the version after the round's own."""


class Copies:
    """Copies to joining members, at the primary and at the member.

    Parameters
    ----------
    rounds : Rounds
        The exchange.
    membership : Membership
        Who this server is.
    out : list of Effect
        The core's effects.
    """

    def __init__(self, rounds: Rounds, membership: Membership, out: list[Effect]) -> None:
        self._rounds = rounds
        self._membership = membership
        self._out = out

    def settle(self, now_ns: int, shard: Shard) -> None:
        """A view has changed the shard's chain."""
        chain = shard.chain
        joining = chain.joining if chain.is_primary else []
        for who in [who for who in chain.copies if who not in joining]:
            self._drop(chain.copies.pop(who))
        for who, copying in chain.copies.items():  # what is on its way names a view that is over
            copying.told_ns = None
            for unit, flight in list(copying.flying.items()):
                renewed = msgspec.structs.replace(flight.message, view=chain.view)
                copying.flying[unit] = Flight(renewed, flight.payloads, now_ns)
                self.send(who, copying.flying[unit])
        for who in [who for who in joining if who not in chain.copies]:
            chain.copies[who] = Copying(chain.view)
            chain.applied[who] = INITIAL_ROUND  # what it held before counts for nothing
        if not chain.is_joining:
            chain.units = None

    def close(self, shard: Shard) -> None:
        """The shard is held elsewhere from now on."""
        for copying in shard.chain.copies.values():
            self._drop(copying)
        shard.chain.copies.clear()
        for incoming in shard.incoming.values():
            self._release(tuple(incoming.slices.values()))
        shard.incoming.clear()

    def retry(self, now_ns: int, shard: Shard) -> None:
        """Send again what was not acknowledged in time."""
        for who, copying in shard.chain.copies.items():
            for unit, flight in list(copying.flying.items()):
                if now_ns - flight.sent_ns >= RETRY_MS * MS:
                    copying.flying[unit] = Flight(flight.message, flight.payloads, now_ns)
                    self.send(who, copying.flying[unit])

    # ---- the primary: copies ------------------------------------------------------------------

    def copy(self, now_ns: int, shard: Shard) -> None:
        """Begin the copies that are due, and tell the scheduler of members that have all."""
        chain = shard.chain
        if not chain.is_started:
            return
        for who, copying in chain.copies.items():
            units = range(shard.units_count)
            rest = [n for n in units if n not in copying.since and n not in copying.asked]
            busy = len(copying.flying) + len(copying.asked)
            if rest and busy < COPIES_MAX and now_ns >= copying.next_ns:
                self._begin_copy(now_ns, shard, who, rest[0])
            elif not rest and not busy:
                self._tell_synced(now_ns, shard, who)

    def _begin_copy(self, now_ns: int, shard: Shard, who: int, unit: int) -> None:
        current, copying = shard.round, shard.chain.copies[who]
        is_made = current is not None and shard.parts_of(unit)[0] in current.made
        version = shard.version + is_made
        copying.since[unit] = version
        if version == INITIAL_ROUND:
            self._fly(now_ns, shard, who, UnitCopied(shard.table, shard.number, who, unit))
            return
        copying.asked[unit] = None
        older = version - 1 if version - 1 in shard.kept else None
        parts = list(shard.parts_of(unit))
        self._out.append(CopyUnit(shard.table, shard.number, who, unit, parts, older))

    def on_copied(self, now_ns: int, event: UnitCopied) -> None:
        """The shell has made the copy of a unit: send it."""
        shard = self._rounds.shards.get((event.table, event.shard))
        copying = None if shard is None else shard.chain.copies.get(event.member)
        if shard is None or copying is None or event.unit not in copying.asked:
            self._release(event.payloads)
            return
        del copying.asked[event.unit]
        self._fly(now_ns, shard, event.member, event)

    def _fly(self, now_ns: int, shard: Shard, who: int, event: UnitCopied) -> None:
        chain, copying = shard.chain, shard.chain.copies[who]
        kept = [KeptVersion(version, one.state, one.norm) for version, one in shard.kept.items()]
        message = UnitCopy(
            self._membership.job, chain.me, chain.view, shard.table, shard.number, event.unit,
            copying.began, copying.since[event.unit], shard.version, kept, event.has_older,
            event.header, len(event.payloads), 0, len(event.payloads), event.frame,
        )  # fmt: skip
        copying.flying[event.unit] = Flight(message, event.payloads, now_ns)
        self.send(who, copying.flying[event.unit])
        self.copy(now_ns, shard)

    def send(self, who: int, flight: Flight) -> None:
        """Send a copy, or send it again."""
        self._out.append(Send(who, flight.message, flight.payloads or None))

    def on_taken(self, now_ns: int, shard: Shard, message: UnitTaken) -> None:
        """A joining member has a copy: the next one leaves after as long a pause as it took."""
        chain = shard.chain
        copying = chain.copies.get(message.sender)
        if copying is None or message.unit not in copying.flying:
            return
        flight = copying.flying[message.unit]
        if (flight.message.version, copying.began) != (message.version, message.began):
            return
        del copying.flying[message.unit]
        self._release(flight.payloads)
        known = chain.applied[message.sender]
        chain.applied[message.sender] = max(known, flight.message.base)
        copying.next_ns = now_ns + (now_ns - flight.sent_ns)
        chain.retry_ns = min(chain.retry_ns or copying.next_ns, copying.next_ns)
        self._rounds.advance(now_ns, shard)
        self.copy(now_ns, shard)

    def _tell_synced(self, now_ns: int, shard: Shard, who: int) -> None:
        chain, copying = shard.chain, shard.chain.copies[who]
        if chain.applied[who] < max(copying.since.values(), default=INITIAL_ROUND):
            return
        if copying.told_ns is None or now_ns >= copying.told_ns + RETRY_MS * MS:
            copying.told_ns = now_ns
            chain.retry_ns = min(chain.retry_ns or 1 << 62, now_ns + RETRY_MS * MS)
            me = chain.me
            message = ChainSynced(me, shard.table, shard.number, chain.view, who)
            self._out.append(Send(SCHEDULER, message))

    # ---- the joining member -------------------------------------------------------------------

    def on_copy(
        self, now_ns: int, peer: Peer, shard: Shard, message: UnitCopy, payloads: tuple[int, ...]
    ) -> None:
        """Slices of a unit that is copied to this server."""
        chain, unit = shard.chain, message.unit
        if message.began > chain.began:
            if chain.began:  # what is here comes from a chain that this server was dropped from
                self._rounds.reopen(shard)
            chain.began = message.began
        is_known = chain.units is None or unit in chain.units
        is_wrong = unit >= shard.units_count or message.part + message.count > message.slices
        is_old = message.began < chain.began
        if is_known or is_wrong or is_old or (chain.is_started and message.version < shard.version):
            self._release(payloads)
            if is_known and not is_old:
                self._answer_taken(peer, shard, message)
            return
        if not chain.is_started:
            self._start(shard, message)
        if message.version > shard.version + 1:
            self._release(payloads)
            return
        incoming = shard.incoming.get(unit)
        if incoming is None or incoming.version != message.version:
            if incoming is not None:
                self._release(tuple(incoming.slices.values()))
            incoming = shard.incoming[unit] = Incoming(message.version)
        for number, payload in enumerate(payloads, message.part):
            if number in incoming.slices:
                self._release((payload,))
            else:
                incoming.slices[number] = payload
        if len(incoming.slices) == message.slices:
            self._load(shard, message)
            self._answer_taken(peer, shard, message)
            self._rounds.advance(now_ns, shard)

    def _start(self, shard: Shard, message: UnitCopy) -> None:
        """The first copy says at which version this server begins to take part."""
        shard.chain.is_started = True
        if message.base > INITIAL_ROUND:
            shard.begin_at(
                message.base, {one.version: Kept(one.state, one.norm) for one in message.kept}
            )

    def _load(self, shard: Shard, message: UnitCopy) -> None:
        incoming, unit = shard.incoming.pop(message.unit), message.unit
        current, chain = shard.round, shard.chain
        if chain.units is not None:
            chain.units[unit] = None
        if message.version == INITIAL_ROUND:
            return
        if message.version > shard.version and current is not None:
            self._rounds.release_oldest(shard, current)
            current.made.update(dict.fromkeys(shard.parts_of(unit)))
        payloads = tuple(incoming.slices[number] for number in sorted(incoming.slices))
        parts = list(shard.parts_of(unit))
        is_older_kept = message.has_older and message.version - 1 in shard.kept
        load = LoadUnit(
            shard.table,
            shard.number,
            unit,
            message.version,
            message.header,
            payloads,
            parts,
            message.has_older,
            is_older_kept,
        )
        self._out.append(load)

    def _answer_taken(self, peer: Peer, shard: Shard, message: UnitCopy) -> None:
        answer = UnitTaken(
            self._membership.job, shard.chain.me, shard.chain.view, shard.table, shard.number,
            message.unit, message.began, message.version,
        )  # fmt: skip
        self._out.append(Send(peer, answer))

    def _drop(self, copying: Copying) -> None:
        for flight in copying.flying.values():
            self._release(flight.payloads)

    def _release(self, payloads: tuple[int, ...]) -> None:
        self._out += [ReleasePayload(payload) for payload in payloads]
