"""Steps a shard again from a tape; tensors and files, no cluster."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from treefold.common.errors import DataError
from treefold.common.layout import ShardSpan
from treefold.common.spec import TableSpec
from treefold.common.tape import (
    Entry,
    TapeBegun,
    TapeEnd,
    TapeFull,
    TapeShard,
    TapeStep,
    TapeUnit,
    TapeVersion,
    files,
    read,
    read_at,
)
from treefold.common.unit_state import UnitState, decode_header
from treefold.server.digest import checksum
from treefold.server.shard import FoldedPart, ShardState


class Place(NamedTuple):
    """Where a record is, and the view that it was made in."""

    view: int
    file: Path
    offset: int
    size: int


@dataclass(slots=True)
class Track:
    """What a tape has of one shard.

    Attributes
    ----------
    steps : dict of version to dict of part to Place
        The step that counts for each part.
    units : dict of version to dict of unit to Place
        Of checkpoints that the shard began with.
    versions : dict of version to TapeVersion
        Whose contributions each one has.
    ends : list of TapeEnd
        What servers held in the end.
    """

    spec: TableSpec
    span: ShardSpan
    steps: dict[int, dict[int, Place]] = field(default_factory=dict)
    units: dict[int, dict[int, Place]] = field(default_factory=dict)
    versions: dict[int, TapeVersion] = field(default_factory=dict)
    ends: list[TapeEnd] = field(default_factory=list)

    def begin(self) -> tuple[int, int]:
        """The version that the run which counts began with, and the view in which it did."""
        found = [
            (min(place.view for place in places.values()), version)
            for version, places in [*self.units.items(), (0, self.steps.get(0, {}))]
            if places
        ]
        if not found:
            raise DataError(f"the tape has no first version of table {self.spec.name!r}")
        view, version = max(found)
        return version, view


class Tape:
    """All files of a tape.

    Parameters
    ----------
    path : str
        The name that the job was given.

    Attributes
    ----------
    tracks : dict of (table, shard) to Track
        What is in it.
    full : list of str
        Files that had no room for everything.

    Raises
    ------
    DataError
        There is no tape, it is damaged, or files of several jobs lie there.
    """

    def __init__(self, path: str) -> None:
        self.tracks: dict[tuple[int, int], Track] = {}
        self.full: list[str] = []
        self._jobs: dict[int, str] = {}
        for file in files(path):
            for entry in read(file):
                self._take(file, entry)
        if not self._jobs:
            raise DataError(f"there is no tape {path!r}: no file {path}.server-N")
        if len(self._jobs) > 1:
            names = ", ".join(self._jobs.values())
            raise DataError(f"{names} are of different jobs: move those of one elsewhere")

    def _take(self, file: Path, entry: Entry) -> None:
        record = entry.record
        match record:
            case TapeBegun():
                self._jobs.setdefault(record.job, file.name)
            case TapeFull():
                self.full.append(file.name)
            case TapeShard(table, shard, spec, span):
                known = self.tracks.setdefault((table, shard), Track(spec, span))
                if (known.spec, known.span) != (spec, span):
                    raise DataError(f"{file} has another table {spec.name!r} than other files")
            case TapeStep():
                parts = self._track(file, record).steps.setdefault(record.version, {})
                place = Place(record.view, file, entry.offset, entry.size)
                for part in record.parts:
                    _keep_newest(parts, part.part, place)
            case TapeUnit():
                units = self._track(file, record).units.setdefault(record.version, {})
                _keep_newest(units, record.unit, Place(record.view, file, entry.offset, entry.size))
            case TapeVersion():
                versions = self._track(file, record).versions
                if record.view >= versions.get(record.version, record).view:
                    versions[record.version] = record
            case TapeEnd():
                self._track(file, record).ends.append(record)

    def _track(self, file: Path, record: TapeStep | TapeUnit | TapeVersion | TapeEnd) -> Track:
        track = self.tracks.get((record.table, record.shard))
        if track is None:
            raise DataError(f"{file} has steps of a shard that it does not describe")
        return track


def _keep_newest(places: dict[int, Place], key: int, place: Place) -> None:
    if key not in places or place.view >= places[key].view:
        places[key] = place


class Replay:
    """One shard, stepped again.

    Parameters
    ----------
    track : Track
        What there is of it.

    Attributes
    ----------
    state : ShardState
        Its values and what its optimizer keeps.
    version : int
        The one that `run` has come to.
    begun : int
        The version that it begins with.
    """

    def __init__(self, track: Track) -> None:
        self.state = ShardState(track.spec, track.span)
        self._track = track
        self.begun, self._view = track.begin()
        self.version = self.begun
        units = track.units.get(self.begun, {})
        if units and min(place.view for place in units.values()) == self._view:
            for unit, place in units.items():
                self._load(unit, place)
        else:
            self._step(self._track.steps[0])

    def run(self) -> Iterator[int]:
        """Step version by version, as far as the tape goes; yields each version."""
        while True:
            parts = self._track.steps.get(self.version + 1, {})
            counting = {part: place for part, place in parts.items() if place.view >= self._view}
            if len(counting) < len(self.state.parts):
                return
            self._step(counting)
            self.version += 1
            yield self.version

    def verdicts(self) -> list[bool]:
        """Of each server that held the shard in the end: whether it had the same bits."""
        own = checksum(self.state)
        return [(end.version, end.digest) == (self.version, own) for end in self._track.ends]

    def _load(self, unit: int, place: Place) -> None:
        record = read_at(place.file, place.offset, place.size)
        if not isinstance(record, TapeUnit):
            raise DataError(f"{place.file} was changed while it was read")
        values = _tensor(record.values)
        self.state.import_unit(unit, UnitState(decode_header(record.header), values))

    def _step(self, parts: dict[int, Place]) -> None:
        """Make a version, or set the values that the first one has."""
        folded: dict[int, FoldedPart] = {}
        groups, coefficient = None, 1.0
        for place in dict.fromkeys(parts.values()):
            record = read_at(place.file, place.offset, place.size)
            if not isinstance(record, TapeStep):
                raise DataError(f"{place.file} was changed while it was read")
            groups, coefficient = record.groups, record.coefficient
            for one in record.parts:
                if parts.get(one.part) == place:
                    values = None if one.values is None else _tensor(one.values)
                    folded[one.part] = FoldedPart(one.part, values, one.absent)
        ordered = [folded[part] for part in sorted(folded)]
        if groups is not None:
            self.state.step(ordered, groups, coefficient)
            return
        for part in ordered:
            if part.gradient is not None:
                self.state.initialize(part.part, part.gradient)


def tensors(replays: dict[tuple[int, int], Replay]) -> dict[str, Tensor]:
    """Parameters and buffers of tables whose shards were stepped again, by name.

    Names that several tables have begin with the table's.
    """
    found: dict[str, Tensor] = {}
    flats: dict[int, list[Replay]] = {}
    for (table, _), replay in sorted(replays.items()):
        flats.setdefault(table, []).append(replay)
    named = [one.name for shards in flats.values() for one in shards[0].state.spec.tensors]
    for shards in flats.values():
        state = shards[0].state
        flat = torch.cat([_values(one.state) for one in shards])
        for tensor, start in zip(state.spec.tensors, state.layout.starts, strict=False):
            values = flat[start : start + tensor.elements].reshape(tensor.shape).clone()
            is_shared = named.count(tensor.name) > 1
            name = f"{state.spec.name}.{tensor.name}" if is_shared else tensor.name
            found[name] = values
    return found


def _values(state: ShardState) -> Tensor:
    start, stop = state.parts[0][0], state.parts[-1][1]
    out = torch.empty(stop - start)
    state.copy_to(out)
    return out


def _tensor(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.float32) if raw else torch.empty(0)
