"""The scheduler's part in checkpoints: when one counts, and how the job goes back to it."""

from dataclasses import replace

import msgspec
import pytest

from tests.unit.scheduler_driver import (
    LIMITS,
    SECOND,
    SERVER,
    SPEC,
    WORKERS,
    Driver,
    loader,
    plan,
    sent,
)
from treefold.checkpoint.manifest import Manifest, decode, encode
from treefold.common.plan import LoopPlan
from treefold.common.round_state import Applied
from treefold.common.spec import SYNC, Consistency, ConsistencyKind, Rule
from treefold.launch.link import CheckpointStatus, parse
from treefold.scheduler import memory, records
from treefold.scheduler.core import SchedulerCore
from treefold.scheduler.effects import (
    CheckpointChosen,
    ChooseCheckpoint,
    Effect,
    ManifestWritten,
    Persist,
    WriteManifest,
)
from treefold.scheduler.status import status_of
from treefold.wire.exchange import Note, Tick
from treefold.wire.messages import (
    DeclarePlan,
    DeclareTable,
    Fenced,
    Register,
    SavedSeen,
    ShardSaved,
    View,
)
from treefold.wire.words import PROTOCOL_VERSION, Outcome, Phase, Role

SAVING = replace(LIMITS, checkpoint="ckpt", checkpoint_every=10)
FROZEN = msgspec.structs.replace(SPEC, name="frozen", rule=Rule.CONSTANT, optimizer=None)


class Written(Driver):
    """A driver that keeps what the core has written down."""

    def __init__(self) -> None:
        self.core = SchedulerCore(SAVING)
        self.now_ns = 0
        self.records: list[records.Record] = []
        self.keep(self.core.handle(0, Tick()))

    def keep(self, effects: list[Effect]) -> list[Effect]:
        """Note what was written down."""
        self.records += [r for one in effects if isinstance(one, Persist) for r in one.records]
        return effects

    def say(self, peer: bytes, message: object) -> list[Effect]:
        """A member sends a message."""
        return self.keep(super().say(peer, message))

    def wait(self, for_ns: int) -> list[Effect]:
        """Time passes."""
        return self.keep(super().wait(for_ns))

    def done(self, event: ManifestWritten | CheckpointChosen) -> list[Effect]:
        """The shell has done something."""
        return self.keep(self.core.handle(self.now_ns, event))

    def saved(self, version: int, table: int = 0, text: str = "") -> list[Effect]:
        """The server has saved its shard of a table."""
        path = f"{version:08d}/t{table}-1.safetensors"
        message = ShardSaved(1, table, 0, version, path, 100, bytes(32), b"state", 0.5, text)
        return self.say(SERVER, message)

    def manifest(self, version: int) -> Manifest:
        """Let a checkpoint be made."""
        (wanted,) = [one for one in self.saved(version) if isinstance(one, WriteManifest)]
        self.done(ManifestWritten(version, ""))
        return wanted.manifest


def trained() -> Written:
    """A job in training that is saved."""
    driver = Written()
    driver.train()
    return driver


def lost(driver: Written) -> list[Effect]:
    """The only server falls silent."""
    effects: list[Effect] = []
    for _ in range(22):
        effects += driver.wait(SECOND // 2)
        for incarnation in (2, 3):
            if driver.core.roster.by_incarnation[incarnation].is_live:
                driver.keep(driver.beat(incarnation, 25))
    return effects


def test_a_checkpoint_counts_when_every_table_is_saved() -> None:
    driver = Written()
    driver.form()
    for spec in (SPEC, FROZEN):
        driver.say(WORKERS[0], DeclareTable(2, 1, spec, b"record"))
    effects = driver.saved(10)
    assert sent(effects, SavedSeen) == [SavedSeen(0, 0, 10)]
    driver.saved(0, table=1)
    assert driver.core.checkpoints.newest == -1, "more tables might have come"
    effects = driver.say(WORKERS[0], DeclarePlan(2, 2, plan()))
    (wanted,) = [one for one in effects if isinstance(one, WriteManifest)]
    assert [(t.spec.name, t.version, t.record) for t in wanted.manifest.tables] == [
        ("t", 10, b"record"),
        ("frozen", 0, b"record"),
    ]


def test_a_file_that_could_not_be_written_is_a_warning_and_no_checkpoint() -> None:
    driver = trained()
    effects = driver.saved(10, text="no space left")
    (note,) = [one for one in effects if isinstance(one, Note)]
    assert "there will be no checkpoint of version 10: shard 0 of t: no space left" in note.text
    assert not [one for one in driver.saved(10, text="again") if isinstance(one, Note)]
    assert driver.core.phase is Phase.RUNNING


def test_a_lost_shard_takes_everybody_back_to_the_newest_checkpoint() -> None:
    driver = trained()
    manifest = driver.manifest(20)
    effects = lost(driver)
    assert [one for one in effects if isinstance(one, ChooseCheckpoint)]
    assert {one.incarnation for one in sent(effects, Fenced)} >= {2, 3}  # type: ignore[attr-defined]  # of the kind
    assert driver.core.phase is Phase.FORMING
    effects = driver.done(CheckpointChosen("ckpt", manifest))
    (note,) = [one for one in effects if isinstance(one, Note)]
    assert "goes back to version 20: 5 rounds are computed again" in note.text
    driver.register(b"another", Role.SERVER, 500)
    (view, *_) = sent(driver.register(b"back", Role.WORKER, 501), View)
    assert isinstance(view, View)
    assert view.era > 0
    driver.say(b"back", DeclareTable(5, 1, SPEC))
    (table,) = driver.core.view.tables
    assert (table.source, table.initializer) == (driver.core.checkpoints.source, 0)
    assert table.shards[0].view >= view.era


def test_without_a_checkpoint_the_job_begins_again() -> None:
    driver = trained()
    lost(driver)
    driver.done(CheckpointChosen("", None))
    driver.register(b"another", Role.SERVER, 500)
    driver.register(b"back", Role.WORKER, 501)
    driver.say(b"back", DeclareTable(5, 1, SPEC))
    (table,) = driver.core.view.tables
    assert (table.source, table.initializer) == (None, 5)


def test_the_status_tells_of_checkpoints() -> None:
    driver = trained()
    driver.manifest(20)
    known = parse(status_of(driver.core, 0)).checkpoint
    assert known == CheckpointStatus("ckpt", 20, 0, None)
    assert parse(status_of(Driver().core, 0)).checkpoint is None


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (SYNC, "sync"),
        (Consistency(ConsistencyKind.ASYNC), "async"),
        (Consistency(ConsistencyKind.ASYNC, staleness_max=16), "async(16)"),
        (Consistency(ConsistencyKind.SSP, 0), "ssp(0)"),
        (Consistency(ConsistencyKind.QUORUM, quorum=6), "quorum(6)"),
    ],
)
def test_the_status_says_when_contributions_are_applied(rule: Consistency, text: str) -> None:
    driver = Driver()
    driver.form()
    driver.say(WORKERS[0], DeclareTable(2, 1, msgspec.structs.replace(SPEC, consistency=rule)))
    assert [table.consistency for table in parse(status_of(driver.core, 0)).tables] == [text]


def test_where_every_checkpoint_is_damaged_the_job_ends() -> None:
    driver = trained()
    driver.manifest(20)
    lost(driver)
    driver.done(CheckpointChosen("", None))
    assert driver.core.ending is not None
    assert driver.core.ending.outcome is Outcome.FAILED


@pytest.mark.parametrize("is_chosen", [False, True])
def test_another_scheduler_knows_of_the_way_back(is_chosen: bool) -> None:
    driver = trained()
    manifest = driver.manifest(20)
    lost(driver)
    if is_chosen:
        driver.done(CheckpointChosen("ckpt", manifest))
    found = records.decode(records.encode(driver.records))
    other = SchedulerCore(SAVING)
    memory.take_up(other, found)
    mine = driver.core
    assert other.rollback.is_choosing is not is_chosen
    assert other.view.era == mine.view.era > 0
    assert other.checkpoints.source == mine.checkpoints.source
    assert [(t.place, t.source) for t in other.tables] == [(t.place, t.source) for t in mine.tables]
    again = SchedulerCore(SAVING)
    memory.take_up(again, other.memory.snapshot(other))
    assert again.rollback.is_choosing is not is_chosen
    assert again.view == other.view
    assert again.checkpoints.source == other.checkpoints.source


def test_a_server_at_the_address_of_another_takes_its_place_at_once() -> None:
    driver = trained()
    driver.manifest(20)
    driver.say(b"new", driver_register(100, 600))
    assert not driver.core.roster.by_incarnation[1].is_live
    assert driver.core.rollback.count == 1


def driver_register(port: int, nonce: int) -> object:
    """A registration from the address of the server with another nonce."""
    return Register(PROTOCOL_VERSION, Role.SERVER, nonce, f"server-{port}", "host", 1, "0")


@pytest.mark.parametrize(
    ("rule", "begun", "is_told"),
    [
        (Consistency(ConsistencyKind.ASYNC), loader(2), True),
        (Consistency(ConsistencyKind.ASYNC), plan(slots=4), False),
        (SYNC, loader(2), False),
    ],
)
def test_own_loaders_of_an_asynchronous_job_hear_that_nothing_is_saved(
    rule: Consistency, begun: LoopPlan, is_told: bool
) -> None:
    driver = Written()
    driver.form()
    spec = msgspec.structs.replace(SPEC, consistency=rule)
    for number in range(2):
        driver.say(WORKERS[number], DeclareTable(2 + number, 1, spec))
    effects = driver.say(WORKERS[0], DeclarePlan(2, 2, begun))
    notes = [effect.text for effect in effects if isinstance(effect, Note)]
    assert any("with own loaders there are none" in text for text in notes) is is_told


def test_an_asynchronous_table_beside_another_one_has_a_version_of_its_own() -> None:
    driver = Written()
    driver.form()
    rule = Consistency(ConsistencyKind.ASYNC)
    apart = msgspec.structs.replace(SPEC, name="apart", consistency=rule)
    for spec in (SPEC, apart):
        driver.say(WORKERS[0], DeclareTable(2, 1, spec))
    driver.say(WORKERS[0], DeclarePlan(2, 2, plan()))
    state = msgspec.msgpack.encode(Applied([10, 10], (9, 1, 2), 9, b""))
    path = "00000010/t1-1.safetensors"
    driver.saved(10)
    effects = driver.say(SERVER, ShardSaved(1, 1, 0, 20, path, 100, bytes(32), state, 0.5, ""))
    (wanted,) = [one for one in effects if isinstance(one, WriteManifest)]
    assert wanted.manifest.version == 10
    assert [table.version for table in wanted.manifest.tables] == [10, 20]
    assert decode(encode(wanted.manifest), "manifest.json").tables[1].version == 20


def test_another_scheduler_makes_the_checkpoint_of_tables_of_both_modes_whole() -> None:
    driver = Written()
    driver.form()
    rule = Consistency(ConsistencyKind.ASYNC)
    for spec in (SPEC, msgspec.structs.replace(SPEC, name="apart", consistency=rule)):
        driver.say(WORKERS[0], DeclareTable(2, 1, spec))
    driver.say(WORKERS[0], DeclarePlan(2, 2, plan()))
    state = msgspec.msgpack.encode(Applied([10, 10], (9, 1, 2), 9, b""))
    path = "00000010/t1-1.safetensors"
    driver.say(SERVER, ShardSaved(1, 1, 0, 20, path, 100, bytes(32), state, 0.5, ""))
    other = SchedulerCore(SAVING)
    memory.take_up(other, records.decode(records.encode(driver.records)))
    driver.core = other
    (wanted,) = [one for one in driver.saved(10) if isinstance(one, WriteManifest)]
    assert [table.version for table in wanted.manifest.tables] == [10, 20]
