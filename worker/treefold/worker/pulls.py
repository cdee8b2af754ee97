"""Pulls in progress: which parts of which version of a shard are here. Pure bookkeeping."""

import math
from dataclasses import dataclass, field

from treefold.common.layout import Layout, ShardSpan
from treefold.common.round_state import (
    NO_PROGRESS,
    Progress,
    decode_applied,
    decode_progress,
    record_of,
)
from treefold.common.spec import Dtype, TableSpec
from treefold.wire.messages import Published, Pulled, RoundStatus
from treefold.wire.words import Need, ShardPlace, TablePlace
from treefold.worker.effects import Effect, ReleasePayload, Snapshot

HANDED_ON = 0  # in the place of the payload of a part that was handed on
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
    fresh : list of (int, int)
        Parts, with their payloads, that are to be handed on now.
    is_whole : bool
        Whether the server has said that the version is complete.
    is_begun : bool
        Whether the server has said what goes with the version.
    heard_ns : int
        When a server last said anything about the shard.
    is_streaming : bool
        Whether parts are handed on as they come; ``got`` has `HANDED_ON` for them.
    need : Need or None
        What must be in the version, for an asynchronous table.
    """

    version: int
    parts_count: int
    attempt: int
    deadline_ns: int
    delay_ns: int
    got: dict[int, int] = field(default_factory=dict)
    fresh: list[tuple[int, int]] = field(default_factory=list)
    is_whole: bool = False
    is_begun: bool = False
    is_streaming: bool = False
    state: bytes = b""
    norm: float = math.nan
    status: RoundStatus | None = None
    heard_ns: int = 0
    need: Need | None = None

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
            elif self.is_streaming:
                self.got[part] = HANDED_ON
                self.fresh.append((part, payload))
            else:
                self.got[part] = payload

    def payloads(self) -> list[int]:
        """Payloads that are held here."""
        held = [payload for payload in self.got.values() if payload != HANDED_ON]
        return held + [payload for _, payload in self.fresh]

    def stream(self) -> None:
        """Hand on what is here, and what comes."""
        self.fresh = sorted(self.got.items())
        self.got = dict.fromkeys(self.got, HANDED_ON)
        self.is_streaming = True

    def finish(self, published: Published, effects: list[Effect]) -> None:
        """A version is whole, or has begun."""
        self._move_up(published.version, effects)
        need = self.need
        if need is not None and not need.is_met(decode_applied(published.state).clocks):
            if published.version == self.version:  # what was sent before is here once more
                self._move_up(published.version + 1, effects)
        elif published.version == self.version:
            self.is_begun = True
            self.is_whole |= published.is_whole
            self.state, self.norm = published.state, published.norm

    def _move_up(self, version: int, effects: list[Effect]) -> None:
        if version > self.version:
            effects += [ReleasePayload(old) for old in self.payloads()]
            self.got.clear()
            self.fresh.clear()
            self.version = version
            self.is_whole = self.is_begun = self.is_streaming = False

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
    progress: Progress = NO_PROGRESS
    _buffer_parts: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Work out the flat space."""
        self.layout = Layout(self.spec)

    def settle(self, place: TablePlace) -> list[int]:
        """Learn, or learn anew, where the shards are; returns those whose primary is another."""
        before = self.place.shards if self.place is not None else place.shards
        self.place = place
        moved = [
            new.shard for old, new in zip(before, place.shards, strict=True) if old.view != new.view
        ]
        if self.parts:
            return moved
        for shard in place.shards:
            cut = self.layout.parts(ShardSpan(shard.first_block, shard.blocks))
            self.parts += [
                PartRange(
                    shard.shard, n, a, b, len(self.layout.pieces(a, b)), self.layout.wire((a, b))
                )
                for n, (a, b) in enumerate(cut)
            ]
        has_buffers = self.layout.has_buffers
        self._buffer_parts = [
            (part.shard, part.number) for part in self.parts if has_buffers(part.start, part.stop)
        ]
        self.numbers = {(part.shard, part.number): n for n, part in enumerate(self.parts)}
        return moved

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

    @property
    def are_buffers_here(self) -> bool:
        """Whether every part with buffers is here, which a loop body needs before it begins."""
        return all(number in self.pulls[shard].got for shard, number in self._buffer_parts)

    def urgent(self, shard: int) -> list[int]:
        """Parts of a shard that a loop body needs before it begins."""
        return [number for own, number in self._buffer_parts if own == shard]

    def snapshot(self) -> Snapshot:
        """Hand over what was pulled; the pulls begin anew afterwards."""
        payloads = [self.pulls[part.shard].got[part.number] for part in self.parts]
        first = self.pulls[0]
        self.held = first.version
        self.pulls = {}
        which = self.number, first.version
        if self.spec.is_quorum:
            self.progress = decode_progress(first.state)
            return Snapshot(*which, self.progress.record, first.norm, payloads)
        if not self.spec.is_asynchronous:
            state = record_of(self.spec, first.state)
            return Snapshot(*which, state, first.norm, payloads)
        applied = decode_applied(first.state)
        return Snapshot(*which, applied.record, first.norm, payloads, front=applied.front)
