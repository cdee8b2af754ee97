"""The ledger: which samples entered which version, written as the job runs and read back later.

Servers write which worker's copy of each slot went into a version (by round and slot of the plan,
where versions are not rounds of it), and at the end of a job digests of what they held; workers
write which samples a slot had. All are MessagePack streams, one record after the other, in one
folder.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec

from treefold.common.tree import Node, span

READ_BYTES = 1 << 20


class VersionRecord(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Contributions ``(level, index, worker incarnation)`` that made one version of one shard."""

    table: int
    shard: int
    version: int
    contributors: list[tuple[int, int, int]]


class SamplesRecord(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Sample ids of one slot of one round, as one worker computed it."""

    incarnation: int
    round: int
    slot: int
    samples: list[int]


class StateRecord(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Digests of the blocks of one shard at the end of a job: values and optimizer state."""

    table: int
    shard: int
    version: int
    first_block: int
    digests: list[bytes]


class AppliedRecord(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """A contribution to one version of one shard, named by round and slot of the plan.

    Of an asynchronous table it is the only one, of a table with a quorum one of several.
    """

    table: int
    shard: int
    version: int
    round: int
    slot: int
    incarnation: int


Record = VersionRecord | SamplesRecord | StateRecord | AppliedRecord


class Writer:
    """Appends records to one file, each one written through to the operating system at once.

    Parameters
    ----------
    folder : str
        Made if it does not exist.
    name : str
        Of the file; one process, one file.
    """

    def __init__(self, folder: str, name: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder) / f"{name}.ledger"
        self._file: BinaryIO = path.open("ab", buffering=0)

    def add(self, record: Record) -> None:
        """Append one record."""
        body = msgspec.msgpack.encode(record)
        self._file.write(len(body).to_bytes(4, "little") + body)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Entry(NamedTuple):
    """One slot that entered one version, and the samples it brought."""

    version: int
    slot: int
    incarnation: int
    samples: list[int]


def read(folder: str, name: str = "*") -> list[Record]:
    """Every whole record of a ledger; a record cut off by a crash is left out.

    Parameters
    ----------
    folder : str
        Of the ledger.
    name : str
        Of the file; by default all of them are read.
    """
    found: list[Record] = []
    for path in sorted(Path(folder).glob(f"{name}.ledger")):
        found += _records(path.read_bytes())
    return found


def entries(folder: str, table: int = 0, shard: int = 0) -> list[Entry]:
    """What entered each version of one shard, slot by slot, in order of versions and slots.

    A contribution counts with the samples that its own sender recorded for that slot.

    Raises
    ------
    KeyError
        A version has a contribution whose samples its sender did not record.
    """
    samples: dict[tuple[int, int, int], list[int]] = {}
    active: dict[int, int] = {}
    versions: list[VersionRecord] = []
    applied: dict[tuple[int, int, int], AppliedRecord] = {}
    for record in read(folder):
        if isinstance(record, SamplesRecord):
            samples[record.incarnation, record.round, record.slot] = record.samples
            active[record.round] = max(active.get(record.round, 0), record.slot + 1)
        elif isinstance(record, StateRecord) or (record.table, record.shard) != (table, shard):
            continue
        elif isinstance(record, AppliedRecord):
            applied[record.version, record.round, record.slot] = record
        elif record.version > 0:
            versions.append(record)
    found = []
    for _, one in sorted(applied.items()):
        known = samples[one.incarnation, one.round, one.slot]
        found.append(Entry(one.version, one.slot, one.incarnation, known))
    for record in sorted(versions, key=lambda version: version.version):
        round_ = record.version - 1
        for level, index, sender in sorted(record.contributors, key=lambda c: c[1] << c[0]):
            first, stop = span(Node(level, index), max(1, active.get(round_, 0)))
            lacking = [s for s in range(first, stop) if (sender, round_, s) not in samples]
            if lacking or first == stop:
                who = f"worker {sender} recorded no samples of slots {lacking or first}"
                msg = f"version {record.version} has node ({level}, {index}), but {who}"
                raise KeyError(msg)
            found += [
                Entry(record.version, slot, sender, samples[sender, round_, slot])
                for slot in range(first, stop)
            ]
    return found


def state_digest(folder: str) -> str:
    """One digest of every table's last values and optimizer state, wherever they were held.

    A shard that several servers held must have ended the same on all of them.

    Raises
    ------
    ValueError
        There is no such record, a block of a table is missing, shards ended at different versions,
        or one shard ended differently on different servers.
    """
    held: dict[tuple[int, int], StateRecord] = {}
    for record in read(folder):
        if isinstance(record, StateRecord):
            other = held.setdefault((record.table, record.first_block), record)
            if other != record:
                msg = f"table {record.table}, block {record.first_block}: servers disagree"
                raise ValueError(msg)
    found = list(held.values())
    digest = hashlib.sha256()
    blocks: dict[int, int] = {}
    for record in sorted(found, key=lambda state: (state.table, state.first_block)):
        if record.first_block != blocks.get(record.table, 0):
            known = blocks.get(record.table, 0)
            msg = f"table {record.table}: block {record.first_block} follows {known}"
            raise ValueError(msg)
        blocks[record.table] = record.first_block + len(record.digests)
        for block in record.digests:
            digest.update(block)
    versions = {(record.table, record.version): None for record in found}
    if not found or len(versions) != len(blocks):
        msg = f"the ledger {folder} has digests of (table, version) {sorted(versions)}"
        raise ValueError(msg)
    return digest.hexdigest()


def _records(data: bytes) -> Iterator[Record]:
    at = 0
    while at + 4 <= len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        if at + 4 + size > len(data):
            return
        yield msgspec.msgpack.decode(data[at + 4 : at + 4 + size], type=Record)
        at += 4 + size
