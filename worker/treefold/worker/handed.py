"""What a client hands to its training thread, and takes from it: versions, slots, runs of parts."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from treefold.transport.segments import Segment, holds
from treefold.worker.arrivals import Arrivals
from treefold.worker.effects import SlotMeta


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One consistent version of a table.

    Attributes
    ----------
    table, version : int
        Which table, which version.
    state : bytes
        What slot 0 of the round that made it left for the next round.
    norm : float
        Global gradient norm of that round, NaN if none was computed.
    parts : list of (start, stop, Tensor)
        Values, of the part's wire type [stop - start], of each part of the flat space. They may
        only be read, and count only if `is_intact` still holds afterwards.
    segments : list of Segment
        Servers' memory in which some of the values lie.
    arrivals : Arrivals or None
        Brings the parts one by one, if ``parts`` has none of them.
    front : int
        The round that left ``state``, of an asynchronous table; otherwise -1.
    """

    table: int
    version: int
    state: bytes
    norm: float
    parts: list[tuple[int, int, torch.Tensor]]
    segments: list[Segment] = field(default_factory=list)
    arrivals: Arrivals | None = None
    front: int = -1

    @property
    def is_intact(self) -> bool:
        """Whether everything read so far was this version.

        A server writes to memory that it shares again when it is two versions further on, which it
        can be only if this worker was so late that others did its work.
        """
        return all(holds(segment, self.version) for segment in self.segments)

    def copy_to(self, flat: torch.Tensor) -> None:
        """Copy the values into a flat tensor, float32 [elements of the table]."""
        for start, stop, values in self.parts:
            flat[start:stop].copy_(values)

    def copies(self) -> list[tuple[int, int, torch.Tensor]]:
        """Copies of the parts, in few pieces of memory, so that all of it goes back when freed."""
        flats: dict[torch.dtype, torch.Tensor] = {}
        found = []
        for start, stop, values in self.parts:
            if values.dtype not in flats:
                flats[values.dtype] = torch.empty(self.parts[-1][1], dtype=values.dtype)
            found.append((start, stop, flats[values.dtype][start:stop].copy_(values)))
        return found

    def release(self) -> None:
        """Let go of the received buffers; the snapshot is empty afterwards."""
        self.parts.clear()
        self.segments.clear()


class Borrowed:
    """Versions that a slot computes with where they lie, in servers' memory."""

    def __init__(self) -> None:
        self._by_table: dict[int, tuple[int, list[Segment]]] = {}

    def add(self, snapshot: Snapshot) -> None:
        """Compute with this version; the snapshot may be released."""
        self._by_table[snapshot.table] = snapshot.version, list(snapshot.segments)

    def give_back(self, tables: Iterable[int]) -> None:
        """These tables have other versions now."""
        for table in tables:
            self._by_table.pop(table, None)

    @property
    def is_torn(self) -> bool:
        """Whether one was overwritten; then others have done this worker's part of the round."""
        return not all(
            holds(segment, version)
            for version, segments in self._by_table.values()
            for segment in segments
        )


@dataclass(frozen=True, slots=True)
class Task:
    """One slot of one round to compute, and the versions to load before.

    Attributes
    ----------
    round, slot : int
        Its batch, as the plan numbers them.
    is_kept : bool
        Whether the contribution stays here while another slot is computed. If not, it may be lent.
    is_lent : bool
        Whether a gradient buffer that was lent in this round is still in use.
    is_again : bool
        Whether the batch came too late for its round and is computed again.
    """

    round: int
    slot: int
    snapshots: list[Snapshot]
    is_kept: bool = True
    is_lent: bool = False
    is_again: bool = False


@dataclass(frozen=True, slots=True)
class LoopEnd:
    """The pass over the data is over; ``version`` is where the job is."""

    version: int
    snapshots: list[Snapshot]


@dataclass(frozen=True, slots=True)
class PartRun:
    """Adjacent parts of a table, counted as in `Client.parts`.

    ``absent`` is empty if every tensor has a gradient; otherwise it has a bitmap per part: bit
    ``i`` set if the part's ``i``-th tensor has none.
    """

    table: int
    part: int
    count: int
    absent: list[bytes]


@dataclass(slots=True)
class Direct:
    """State of `Client.push`, `pull` and `wait`: the slot in hand, newest values by table."""

    task: Task | None = None
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    metas: dict[int, SlotMeta] = field(default_factory=dict)
    declared: dict[int, Snapshot] = field(default_factory=dict)

    def hold(self, snapshot: Snapshot) -> bool:
        """Copy a version; False if it was not intact."""
        end = snapshot.parts[-1][1]
        flat = self.values.setdefault(snapshot.table, torch.empty(end))
        snapshot.copy_to(flat)
        is_intact = snapshot.is_intact
        snapshot.release()
        return is_intact
