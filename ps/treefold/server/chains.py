"""Who holds a shard beside this server, and how far they are. Pure bookkeeping.

A chain changes only by a view. The servers of a chain that the scheduler has not yet confirmed, and
those of the ones before it back to the last confirmed one, all have to hold a version before it is
published: so whoever the scheduler may promote holds every version that a worker was told of.
"""

from dataclasses import dataclass, field

import msgspec

from treefold.wire.chain import UnitCopy
from treefold.wire.exchange import Peer
from treefold.wire.words import INITIAL_ROUND, ShardPlace

NOTHING_APPLIED = INITIAL_ROUND


class Flight(msgspec.Struct, frozen=True, gc=False):
    """A copy of a unit that is on its way."""

    message: UnitCopy
    payloads: tuple[int, ...]
    sent_ns: int


@dataclass(slots=True)
class Copying:
    """How far the copy to a joining member is.

    Attributes
    ----------
    began : int
        The view in which the member joined.
    since : dict of int to int
        The version that each unit was copied at; from then on the member takes part in its rounds.
    flying : dict of int to Flight
        Copies that the member has not acknowledged.
    next_ns : int
        When the next unit may leave.
    asked : dict of int to None
        Units that the shell is copying.
    told_ns : int or None
        When the scheduler was last told that the member holds everything.
    """

    began: int
    since: dict[int, int] = field(default_factory=dict)
    flying: dict[int, Flight] = field(default_factory=dict)
    asked: dict[int, None] = field(default_factory=dict)
    next_ns: int = 0
    told_ns: int | None = None


@dataclass(slots=True)
class Chain:
    """The chain of one shard, as one of its servers knows it.

    Attributes
    ----------
    me : int
        This server's incarnation.
    view : int
        The view that last changed the chain; 0 before the first.
    former : dict of int to None
        Others that were in sync in chains since the last confirmed one.
    is_confirmed : bool
        Whether the scheduler has confirmed this chain.
    applied : dict of int to int
        The version that each other member is known to hold.
    copies : dict of int to Copying
        Joining members, at the primary.
    units : dict of int to None, or None
        Units that are here, while this server is joining; None: all of them.
    began : int
        The view in which this server joined, as its primary says; 0 if it never did.
    is_started : bool
        Whether this server knows the version at which it takes part.
    asker : Peer or None
        Where the primary's messages come from.
    retry_ns : int or None
        When members are to be asked again.
    """

    me: int
    view: int = 0
    primary: int = 0
    backups: list[int] = field(default_factory=list)
    joining: list[int] = field(default_factory=list)
    former: dict[int, None] = field(default_factory=dict)
    is_confirmed: bool = False
    applied: dict[int, int] = field(default_factory=dict)
    copies: dict[int, Copying] = field(default_factory=dict)
    units: dict[int, None] | None = None
    is_started: bool = True
    began: int = 0
    asker: Peer | None = None
    retry_ns: int | None = None

    @property
    def is_primary(self) -> bool:
        """Whether this server is the one that workers speak to."""
        return self.primary == self.me

    @property
    def is_joining(self) -> bool:
        """Whether this server is being copied to."""
        return self.me in self.joining

    @property
    def others(self) -> list[int]:
        """The members that this server tells of its rounds, or would if it were promoted."""
        chosen = [*self.backups, *self.joining] if self.is_primary else self.backups
        return [who for who in chosen if who not in (self.me, self.primary)]

    @property
    def keeps_roots(self) -> bool:
        """Whether roots are needed once they are applied here, for members that lack them."""
        return bool(self.others)

    def adopt(self, place: ShardPlace) -> None:
        """Take over what a view says of this chain."""
        synced = [who for who in (self.primary, *self.backups) if who and who != self.me]
        before = {} if self.is_confirmed else self.former
        self.former = before | dict.fromkeys(synced) if self.view else {}
        self.is_confirmed = False
        self.view = place.chain_view
        self.primary = place.server
        self.backups, self.joining = list(place.backups), list(place.joining)
        self.applied = {who: self.applied.get(who, NOTHING_APPLIED) for who in self.others}

    def confirm(self, view: int) -> bool:
        """The scheduler has confirmed a view; True if that settles this chain now."""
        if self.is_confirmed or not self.is_primary or view < self.view:
            return False
        self.is_confirmed = True
        self.former = {}
        return True

    def holds(self, version: int) -> bool:
        """Whether everybody holds a version who has to, before workers are told of it."""
        needed = dict.fromkeys(self.others)
        if not self.is_confirmed:
            needed |= self.former
        return all(
            self.applied.get(who, NOTHING_APPLIED) >= version
            for who in needed
            if who not in self.copies or self.copies[who].since
        )

    def lagging(self, version: int) -> list[int]:
        """Other members that are not known to hold a version."""
        return [who for who in self.others if self.applied[who] < version]

    def takes(self, who: int, unit: int, round_: int) -> bool:
        """Whether a member takes part in a round of a unit."""
        copying = self.copies.get(who)
        return copying is None or copying.since.get(unit, round_ + 1) <= round_
