"""A server's part in checkpoints: its shards are saved, and begin with what was saved."""

from collections.abc import Sequence
from typing import TypeVar

import msgspec
import pytest

from tests.unit.server_driver import (
    JOB,
    ME,
    SPEC,
    WORKER,
    at_version,
    complete,
    control,
    data,
    member,
    of,
    pull,
    push,
    sent,
    view,
)
from treefold.common import layout
from treefold.common.spec import Consistency, ConsistencyKind
from treefold.server.core import ServerCore
from treefold.server.effects import MakeParts, RestoreShard, SaveShard, ShardRestored, ShardStored
from treefold.wire.exchange import Halt, Received, Tick
from treefold.wire.membership import MS
from treefold.wire.messages import (
    AssignTable,
    Leave,
    Published,
    Pull,
    Refused,
    RoundStatus,
    SavedSeen,
    ShardSaved,
    Stop,
)
from treefold.wire.words import Code, Need, Outcome, Source


@pytest.fixture(autouse=True)
def _tiny_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight elements make two parts of one block each."""
    monkeypatch.setattr(layout, "BLOCK_ELEMENTS", 4)
    monkeypatch.setattr(layout, "PART_BLOCKS_MAX", 1)


T = TypeVar("T")


def only(found: Sequence[object], kind: type[T]) -> T:
    """The one element of a list, which is of a kind."""
    (one,) = found
    assert isinstance(one, kind)
    return one


def saving(version: int, every: int = 2) -> ServerCore:
    """A server whose shard has a version, and is saved at every second one from now on."""
    core = at_version(version)
    core.membership.checkpoint, core.membership.checkpoint_every = "ckpt", every
    return core


def stored(wanted: SaveShard, text: str = "") -> ShardStored:
    """The shell has written the file."""
    which = wanted.table, wanted.shard, wanted.version
    return ShardStored(*which, wanted.path, 10, bytes(32), text)


def restoring() -> ServerCore:
    """A server whose shard is to begin with a checkpoint."""
    core = member()
    control(core, AssignTable(0, SPEC))
    known = view(2)
    place = msgspec.structs.replace(known.tables[0], source=Source("ckpt", 40))
    wanted = only(
        of(control(core, msgspec.structs.replace(known, tables=[place])), RestoreShard),
        RestoreShard,
    )
    assert wanted == RestoreShard(0, 0, "ckpt", 40)
    return core


def test_a_version_that_is_due_is_saved_before_anything_of_the_next_is_made() -> None:
    core = saving(1)
    effects = complete(core, 1)
    wanted = only(of(effects, SaveShard), SaveShard)
    path = f"00000002/t0.t-0-{JOB:x}-{ME}.safetensors"
    assert wanted == SaveShard(0, 0, 2, "ckpt", path)
    assert not of(effects[effects.index(wanted) :], MakeParts)
    assert not of(complete(core, 2), SaveShard)


def test_the_scheduler_is_told_of_a_file_until_it_has_heard() -> None:
    core = saving(1)
    wanted = only(of(complete(core, 1), SaveShard), SaveShard)
    told = only(sent(core.handle(0, stored(wanted)), ShardSaved), ShardSaved)
    assert told == ShardSaved(ME, 0, 0, 2, wanted.path, 10, bytes(32), b"s", told.norm)
    assert sent(core.handle(600 * MS, Tick()), ShardSaved) == [told]
    control(core, SavedSeen(0, 0, 2), 700)
    assert not sent(core.handle(1_400 * MS, Tick()), ShardSaved)


def test_a_server_does_not_go_before_its_files_are_known() -> None:
    core = saving(1)
    wanted = only(of(complete(core, 1), SaveShard), SaveShard)
    end = Stop(Outcome.DONE, "the job is done")
    assert not of(control(core, end), Halt)
    core.handle(0, stored(wanted))
    assert not of(control(core, end), Halt)
    control(core, SavedSeen(0, 0, 2))
    effects = control(core, end)
    assert of(effects, Halt)
    assert sent(effects, Leave)


def test_a_shard_that_is_restored_takes_part_when_its_values_are_there() -> None:
    core = restoring()
    assert not of(data(core, push(-1, 0, part=0, active=1), 1), MakeParts)
    assert not sent(data(core, pull(0)), Published)
    status = only(sent(data(core, pull(0, 1)), RoundStatus), RoundStatus)  # else it would give up
    assert (status.missing, status.is_meta_missing) == ([], False)
    effects = core.handle(0, ShardRestored(0, 0, 40, b"state", 1.5))
    word = only(sent(effects, Published), Published)
    assert word == Published(0, 0, 40, b"state", 1.5)
    assert of(complete(core, 40), MakeParts)
    assert core.shards[0, 0].version == 41


def test_what_names_an_older_view_is_refused_as_stale_once_nothing_lies_here() -> None:
    core = at_version(1)
    control(core, msgspec.structs.replace(view(3), tables=[]))
    refused = only(sent(data(core, pull(1)), Refused), Refused)
    assert refused.code is Code.STALE_VIEW


def beside(kind: ConsistencyKind) -> ServerCore:
    """A server with a shard at version 2, in a job that has a table of another mode."""
    core = saving(2)
    control(core, AssignTable(1, msgspec.structs.replace(SPEC, consistency=Consistency(kind))))
    return core


def test_beside_an_asynchronous_table_the_end_of_a_pass_is_saved_and_nothing_else() -> None:
    core = beside(ConsistencyKind.ASYNC)
    assert not of(complete(core, 2) + complete(core, 3), SaveShard)
    end = Pull(JOB, 5, 2, 0, 0, 5, 0, [], Need(0, 0, 4, 2, 2))
    core.handle(0, Received(WORKER, end))
    wanted = only(of(complete(core, 4), SaveShard), SaveShard)
    assert (wanted.version, wanted.path.partition("/")[0]) == (5, "00000005")
    assert not of(core.handle(0, Received(WORKER, end)), SaveShard)


def test_beside_another_synchronous_table_versions_are_saved_as_always() -> None:
    core = beside(ConsistencyKind.SYNC)
    assert only(of(complete(core, 2) + complete(core, 3), SaveShard), SaveShard).version == 4
