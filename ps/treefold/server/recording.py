"""What a server writes down, if it is asked to: its parts of the ledger and of the tape."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from treefold.common.config import Settings
from treefold.common.ledger import AppliedRecord, StateRecord, VersionRecord, Writer
from treefold.common.log import logger
from treefold.common.tape import (
    STEP_PARTS_MAX,
    TapeEnd,
    TapePart,
    TapeShard,
    TapeStep,
    TapeUnit,
    TapeVersion,
    TapeWriter,
)
from treefold.common.tape import Record as TapeRecord
from treefold.common.unit_state import encode_header
from treefold.server.core import ServerCore
from treefold.server.digest import block_digests, checksum
from treefold.server.effects import MakeParts, OpenShard, RecordVersion, ShardRestored
from treefold.server.shard import FoldedPart, ShardState


class Recording:
    """The ledger and the tape of one server.

    Parameters
    ----------
    settings : Settings
        Where they lie.
    core : ServerCore
        Knows what is held.
    """

    def __init__(self, settings: Settings, core: ServerCore) -> None:
        self._settings = settings
        self._core = core
        self._writer: Writer | None = None
        self._tape: TapeWriter | None = None
        self._has_tape = bool(settings.tape)

    # ---- the ledger ---------------------------------------------------------------------------

    def version(self, effect: RecordVersion) -> None:
        """Write down what went into a version."""
        table, shard, contributors = effect.table, effect.shard, effect.contributors
        if self._has_tape and contributors:
            view = self._core.shards[table, shard].chain.view
            self._add(TapeVersion(table, shard, view, effect.version, contributors))
        if not self._settings.ledger:
            return
        if self._writer is None:
            name = f"server-{self._core.membership.incarnation}"
            self._writer = Writer(self._settings.ledger, name)
        if not effect.is_primary or (effect.version > 0 and not effect.contributors):
            return  # what came as a copy was recorded by whoever made it
        of_version = effect.table, effect.shard, effect.version
        if self._core.specs[effect.table].is_by_batch and effect.version > 0:
            for round_, slot, who in effect.contributors:
                self._writer.add(AppliedRecord(*of_version, round_, slot, who))
            return
        self._writer.add(VersionRecord(*of_version, effect.contributors))

    def end(self, states: Mapping[tuple[int, int], ShardState]) -> None:
        """Write down what the server holds at the end of a job; nothing comes after that."""
        for (table, shard), state in states.items():
            if self._core.shards[table, shard].chain.is_joining:
                continue  # not all of it is here
            version = self._core.shards[table, shard].version
            if self._has_tape:
                self._add(TapeEnd(table, shard, version, checksum(state)))
            if self._writer is not None:
                first = self._core.places[table, shard].first_block
                digests = block_digests(state)
                self._writer.add(StateRecord(table, shard, version, first, digests))
        for file in (self._writer, self._tape):
            if file is not None:
                file.close()

    # ---- the tape -----------------------------------------------------------------------------

    def opened(self, effect: OpenShard) -> None:
        """A shard is held from now on."""
        if self._has_tape:
            self._add(TapeShard(effect.table, effect.shard, effect.spec, effect.span))

    def restored(self, event: ShardRestored, state: ShardState) -> None:
        """A shard begins with a checkpoint."""
        table, shard, version = event.table, event.shard, event.version
        view = self._core.shards[table, shard].chain.view
        for unit in range(len(state.units())) if self._has_tape else ():
            header, flat = state.export_unit(unit)
            encoded = encode_header(header)
            self._add(TapeUnit(table, shard, view, version, unit, encoded, _raw(flat)))

    def step(self, effect: MakeParts, folded: Sequence[FoldedPart], coefficient: float) -> None:
        """Parts of a version are about to be made."""
        if not self._has_tape:
            return
        table, shard, version, groups = effect.table, effect.shard, effect.version, effect.groups
        view = self._core.shards[table, shard].chain.view
        parts = [
            TapePart(one.part, one.absent, None if one.gradient is None else _raw(one.gradient))
            for one in folded
        ]
        for first in range(0, len(parts), STEP_PARTS_MAX):
            some = parts[first : first + STEP_PARTS_MAX]
            self._add(TapeStep(table, shard, view, version, groups, coefficient, some))

    def _add(self, record: TapeRecord) -> None:
        """Write to the tape; what goes wrong with it does not end the training."""
        try:
            if self._tape is None:
                membership, settings = self._core.membership, self._settings
                who = membership.job, membership.incarnation
                self._tape = TapeWriter(settings.tape, *who, settings.tape_bytes_max)
            self._tape.add(record)
        except OSError as error:
            self._end_tape(f"the tape cannot be written: {error}")
            return
        if self._tape.is_full:
            self._end_tape(f"the tape is full ({self._settings.tape_bytes_max} bytes)")

    def _end_tape(self, text: str) -> None:
        self._has_tape = False
        logger("server").warning(f"{text}: nothing more is recorded")


def _raw(values: Tensor) -> bytes:
    return values.detach().contiguous().view(torch.uint8).numpy().tobytes()
