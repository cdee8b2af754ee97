"""Pulls in progress: which parts of which version of a shard are here. Pure bookkeeping."""

import math
from dataclasses import dataclass, field

from treefold.common.layout import Layout, ShardSpan
from treefold.common.spec import Dtype, TableSpec
from treefold.wire.messages import Published, Pulled, RoundStatus, ShardPlace, TablePlace
from treefold.worker.effects import Effect, ReleasePayload, Snapshot

BACKOFF_MAX = 8  # retries slow down to this multiple of the first delay


@dataclass(frozen=True, slots=True)
class PartRange:
    """A part as a worker counts them, over all shards of a table, and what it covers."""

    shard: int
    number: int
    start: int
    stop: int
    pieces: int
    wire: Dtype = Dtype.FLOAT32


@dataclass(slots=True)
class ShardPull:
    """The pull of one version of one shard.

    Attributes
    ----------
    version : int
        What is being pulled; moves up if the server has gone on.
    attempt : int
        How often it was asked for before.
    deadline_ns, delay_ns : int
        When to ask again, and how long that is after the last time.
    got : dict of int to int
        Payload of each part that is here.
    is_whole : bool
        Whether the server has said that the version is complete.
    """

    version: int
    parts_count: int
    attempt: int
    deadline_ns: int
    delay_ns: int
    got: dict[int, int] = field(default_factory=dict)
    is_whole: bool = False
    state: bytes = b""
    norm: float = math.nan
    status: RoundStatus | None = None

    @property
    def is_complete(self) -> bool:
        """Whether every part is here, and word that the version is whole."""
        return self.is_whole and len(self.got) == self.parts_count

    def missing(self) -> list[int]:
        """Parts to ask for again; empty means all of them, as in a `Pull`."""
        if not self.got:
            return []
        return [part for part in range(self.parts_count) if part not in self.got] or [0]

    def take(self, pulled: Pulled, payloads: tuple[int, ...], effects: list[Effect]) -> None:
        """Take in parts; a newer version than asked for replaces what is here."""
        self._move_up(pulled.version, effects)
        for number, payload in enumerate(payloads):
            part = pulled.part + number
            if pulled.version < self.version or part in self.got:
                effects.append(ReleasePayload(payload))
            else:
                self.got[part] = payload

    def finish(self, published: Published, effects: list[Effect]) -> None:
        """A version is whole."""
        self._move_up(published.version, effects)
        if published.version == self.version:
            self.is_whole = True
            self.state, self.norm = published.state, published.norm

    def _move_up(self, version: int, effects: list[Effect]) -> None:
        if version > self.version:
            effects += [ReleasePayload(old) for old in self.got.values()]
            self.got.clear()
            self.version = version
            self.is_whole = False

    def backoff(self, now_ns: int, retry_ns: int) -> None:
        """Count one more attempt and say when the next is due."""
        self.attempt += 1
        self.delay_ns = min(2 * self.delay_ns, BACKOFF_MAX * retry_ns)
        self.deadline_ns = now_ns + self.delay_ns


@dataclass(slots=True)
class Table:
    """A declared table as its worker knows it."""

    spec: TableSpec
    number: int
    declare_call: int | None
    place: TablePlace | None = None
    layout: Layout = field(init=False)
    parts: list[PartRange] = field(default_factory=list)
    numbers: dict[tuple[int, int], int] = field(default_factory=dict)
    pulls: dict[int, ShardPull] = field(default_factory=dict)
    held: int = 0

    def __post_init__(self) -> None:
        """Work out the flat space."""
        self.layout = Layout(self.spec)

    def settle(self, place: TablePlace) -> None:
        """Learn, or learn anew, where the shards are."""
        self.place = place
        if self.parts:
            return
        for shard in place.shards:
            cut = self.layout.parts(ShardSpan(shard.first_block, shard.blocks))
            self.parts += [
                PartRange(
                    shard.shard, n, a, b, len(self.layout.pieces(a, b)), self.layout.wire((a, b))
                )
                for n, (a, b) in enumerate(cut)
            ]
        self.numbers = {(part.shard, part.number): n for n, part in enumerate(self.parts)}

    def shard(self, number: int) -> ShardPlace | None:
        """Where a shard is."""
        shards = self.place.shards if self.place else []
        return shards[number] if number < len(shards) else None

    def part_id(self, shard: int, number: int) -> int | None:
        """This worker's number for part ``number`` of shard ``shard``."""
        return self.numbers.get((shard, number))

    def parts_of(self, shard: int) -> int:
        """How many parts a shard has."""
        return sum(1 for part in self.parts if part.shard == shard)

    @property
    def is_pulled(self) -> bool:
        """Whether every shard is here (not necessarily at one version)."""
        return bool(self.pulls) and all(pull.is_complete for pull in self.pulls.values())

    @property
    def pulled_version(self) -> int:
        """The newest version among the shards pulled."""
        return max(pull.version for pull in self.pulls.values())

    def snapshot(self) -> Snapshot:
        """Hand over what was pulled; the pulls begin anew afterwards."""
        payloads = [self.pulls[part.shard].got[part.number] for part in self.parts]
        first = self.pulls[0]
        self.held = first.version
        self.pulls = {}
        return Snapshot(self.number, first.version, first.state, first.norm, payloads)
