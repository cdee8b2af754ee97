"""Which servers hold each shard: promoted when others go, copied to when copies are missing.

A chain changes step by step, each step a view: a server joins and is copied to, is in sync, is
promoted, is dropped. Fail-over, recovery, draining and moving are these steps in turn. What a step
may rely on is the last chain that its primary has confirmed: those who were in sync in that one are
promoted, others only if none of these is left, and nobody is dropped from a chain that is not
confirmed.

Part of `treefold.scheduler.core` in a file of its own; just as pure.
"""

from msgspec.structs import replace

from treefold.scheduler.declared import Declared
from treefold.scheduler.members import Roster
from treefold.wire.messages import ChainDiffers, ChainSynced
from treefold.wire.words import Role, ShardPlace

LOST_NAMED_MAX = 4  # shards named when some are lost
Key = tuple[int, int]
"""Table and shard."""


class Chains:
    """The chains of all shards.

    Parameters
    ----------
    roster : Roster
        The members.
    declared : Declared
        The tables, and where they lie.
    replicas : int
        How many servers are to hold each shard.

    Attributes
    ----------
    confirmed : dict of (table, shard) to (view, servers)
        The last chain that its primary has confirmed: its view, and who was in sync in it.
    draining : dict of int to None
        Servers that are to hold nothing.
    lost : list of (table, shard)
        Shards that no live server holds.
    moving : dict of (table, shard) to int
        Whose copy is dropped as soon as one more than wanted is in sync.
    changes : int
        How often a chain was confirmed, or a server set to drain.
    promotions : int
        How often a backup took over from a primary that was gone.
    """

    def __init__(self, roster: Roster, declared: Declared, replicas: int) -> None:
        self._roster = roster
        self._declared = declared
        self._replicas = replicas
        self.confirmed: dict[Key, tuple[int, list[int]]] = {}
        self.draining: dict[int, None] = {}
        self.lost: list[Key] = []
        self.moving: dict[Key, int] = {}
        self.changes = self.promotions = 0

    # ---- what servers say ---------------------------------------------------------------------

    def on_synced(self, message: ChainSynced, view: int) -> bool:
        """A member that was copied to holds everything, so it is a backup; True if it is news."""
        place = self._place(message.table, message.shard)
        if place is None or not self._speaks_for(place, message):
            return False
        if message.member not in place.joining:
            return False
        joining = [who for who in place.joining if who != message.member]
        backups = [*place.backups, message.member]
        new = replace(place, chain_view=view, backups=backups, joining=joining)
        self._put(message.table, new)
        return True

    def on_differs(self, message: ChainDiffers, view: int) -> bool:
        """A backup is not in sync: it is copied to again; True if it was one."""
        place = self._place(message.table, message.shard)
        if place is None or not self._speaks_for(place, message):
            return False
        if message.member not in place.backups:
            return False
        backups = [who for who in place.backups if who != message.member]
        joining = [*place.joining, message.member]
        self._put(message.table, replace(place, chain_view=view, backups=backups, joining=joining))
        return True

    def confirm(self, server: int, view: int) -> bool:
        """A server has this view, which is the newest; True if that confirms a chain."""
        is_news = False
        for key, place in self._all():
            known = self.confirmed.get(key, (0, []))[0]
            if place.server == server and known < place.chain_view <= view:
                self.confirmed[key] = (place.chain_view, [place.server, *place.backups])
                self.changes += 1
                is_news = True
        return is_news

    def _speaks_for(self, place: ShardPlace, message: ChainSynced | ChainDiffers) -> bool:
        is_primary = place.server == message.incarnation
        return is_primary and place.chain_view == message.chain_view

    # ---- steps --------------------------------------------------------------------------------

    def mend(self, view: int) -> bool:
        """Take every step that can be taken now, in the view of this number.

        Returns
        -------
        bool
            Whether any chain has changed.
        """
        is_changed = False
        for key, place in self._all():
            if key not in self.confirmed:  # a chain is in sync from its birth on
                self.confirmed[key] = (0, [place.server, *place.backups])
                self.changes += 1
            new = self._step(key, place, view)
            if new is not place:
                self._put(key[0], new)
                is_changed = True
        return is_changed

    def _step(self, key: Key, place: ShardPlace, view: int) -> ShardPlace:
        new = self._without_dead(key, place)
        if new is None:
            if key not in self.lost:
                self.lost.append(key)
            return place
        confirmed_view, _ = self.confirmed[key]
        if new == place and confirmed_view >= place.chain_view:
            new = self._moved_on(key, place)
        new = self._joined(new)
        if new == place:
            return place
        is_moved = new.server != place.server
        return replace(new, chain_view=view, view=view if is_moved else place.view)

    def _without_dead(self, key: Key, place: ShardPlace) -> ShardPlace | None:
        """The chain without servers that are gone, None if nobody is left who can lead it."""
        live = self._live()
        backups = [who for who in place.backups if who in live]
        joining = [who for who in place.joining if who in live]
        server = place.server
        if server not in live:
            _, synced = self.confirmed[key]
            able = [who for who in backups if who in synced]
            # Who was added since then was in sync when the primary said so, and was waited for from
            # then on. It comes second, since the primary could have said meanwhile that it differs.
            able = able or backups
            if not able:
                return None
            server = able[0]
            self.promotions += 1
            # The others can be promoted only if the last confirmed chain has them in sync.
            joining += [who for who in backups if who not in able]
            backups = able[1:]
        return replace(place, server=server, backups=backups, joining=joining)

    def _moved_on(self, key: Key, place: ShardPlace) -> ShardPlace:
        """One step of a confirmed chain towards servers that stay, and no more than are wanted."""
        staying = [who for who in place.backups if who not in self.draining]
        if place.server in self.draining and staying:
            backups = [who for who in place.backups if who != staying[0]]
            return replace(place, server=staying[0], backups=[*backups, place.server])
        members = len(staying) + (place.server not in self.draining)
        extra = [who for who in place.backups if who in self.draining]
        is_enough = members >= min(self._replicas, len(self.staying))
        if extra and is_enough and place.server not in self.draining:
            return replace(place, backups=staying)
        if len(place.backups) >= self._replicas:
            return self._trimmed(key, place)
        if key in self.moving and not place.joining:  # who it was to move to is gone
            del self.moving[key]
        return place

    def _trimmed(self, key: Key, place: ShardPlace) -> ShardPlace:
        """One step towards as many copies as are wanted."""
        leaving = self.moving.get(key)
        if leaving == place.server:
            newest = place.backups[-1]
            backups = [who for who in place.backups if who != newest]
            return replace(place, server=newest, backups=[*backups, leaving])
        if leaving not in place.backups:
            load = self.load
            leaving = max(place.backups, key=lambda who: (load.get(who, 0), who))
        self.moving.pop(key, None)
        return replace(place, backups=[who for who in place.backups if who != leaving])

    def _joined(self, place: ShardPlace) -> ShardPlace:
        """With another server being copied to, if copies are missing."""
        members = [place.server, *place.backups, *place.joining]
        staying = self.staying
        have = sum(who not in self.draining for who in members)
        if have >= min(self._replicas, len(staying)):
            return place
        load = self.load
        free = [who for who in staying if who not in members]
        chosen = min(free, key=lambda who: (load.get(who, 0), who))
        return replace(place, joining=[*place.joining, chosen])

    def move(self, key: Key, source: int, target: int, view: int) -> None:
        """Begin to copy a shard to ``target``, to be dropped from ``source`` then."""
        place = self._place(*key)
        if place is not None:
            self.moving[key] = source
            self._put(key[0], replace(place, chain_view=view, joining=[*place.joining, target]))

    def forget(self) -> None:
        """No shard lies anywhere any more."""
        self.confirmed.clear()
        self.lost.clear()
        self.moving.clear()
        self.changes += 1

    def drain(self, server: int) -> None:
        """A server is to hold nothing."""
        self.draining[server] = None
        self.changes += 1

    def lost_text(self) -> str:
        """Which shards are lost, in words."""
        shards = [f"shard {n} of {self._declared.tables[t].spec.name}" for t, n in self.lost]
        more = "" if len(shards) <= LOST_NAMED_MAX else f" and {len(shards) - LOST_NAMED_MAX} more"
        return f"no server is left that holds {', '.join(shards[:LOST_NAMED_MAX])}{more}"

    # ---- what there is ------------------------------------------------------------------------

    def holds(self, server: int) -> int:
        """Of how many shards a server is a member."""
        return sum(
            server in (place.server, *place.backups, *place.joining) for _, place in self._all()
        )

    def _live(self) -> dict[int, None]:
        return {state.member.incarnation: None for state in self._roster.live(Role.SERVER)}

    @property
    def staying(self) -> list[int]:
        """Live servers that are not to be drained."""
        return [who for who in self._live() if who not in self.draining]

    @property
    def is_calm(self) -> bool:
        """Whether every chain is confirmed and complete, and nothing is being copied."""
        return all(
            not place.joining
            and len(place.backups) + 1 == min(self._replicas, len(self.staying))
            and self.confirmed.get(key, (0, []))[0] >= place.chain_view
            for key, place in self._all()
        )

    def of(self, server: int) -> list[tuple[Key, ShardPlace]]:
        """The shards that a server holds, as primary or backup."""
        return [
            (key, place) for key, place in self._all() if server in (place.server, *place.backups)
        ]

    @property
    def load(self) -> dict[int, int]:
        """Blocks that each server holds or is being sent, copies among them."""
        load: dict[int, int] = {}
        for _, place in self._all():
            for who in (place.server, *place.backups, *place.joining):
                load[who] = load.get(who, 0) + place.blocks
        return load

    def _all(self) -> list[tuple[Key, ShardPlace]]:
        return [
            ((place.table, shard.shard), shard)
            for place in self._declared.places
            for shard in place.shards
        ]

    def _place(self, table: int, shard: int) -> ShardPlace | None:
        tables = self._declared.tables
        place = tables[table].place if table < len(tables) else None
        return place.shards[shard] if place is not None and shard < len(place.shards) else None

    def _put(self, table: int, new: ShardPlace) -> None:
        state = self._declared.tables[table]
        if state.place is not None:
            shards = [new if one.shard == new.shard else one for one in state.place.shards]
            state.place = replace(state.place, shards=shards)
