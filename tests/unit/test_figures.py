"""What scheduler and server say of themselves: readings of real cores."""

import time
from collections.abc import Iterator
from dataclasses import replace

import msgspec
import pytest

from tests.unit.scheduler_driver import LIMITS, SERVER, SPEC, WORKERS, Driver, plan
from tests.unit.server_driver import (
    WORKER,
    at_version,
    complete,
    control,
    data,
    holder,
    push,
    view,
)
from tests.unit.test_scheduler_checkpoints import trained
from tests.unit.test_server_asynchronous_core import begun, contribute
from treefold.common import layout
from treefold.common.metrics import BY_NAME, Counts
from treefold.common.process import Spent
from treefold.scheduler.effects import ManifestWritten
from treefold.scheduler.figures import SchedulerTally
from treefold.scheduler.status import status_of
from treefold.server.core import ServerCore
from treefold.server.effects import SaveShard, ShardStored
from treefold.server.figures import ServerTally
from treefold.transport.body import Body
from treefold.transport.carrier import Carrier
from treefold.transport.lanes import LaneSettings
from treefold.transport.outbox import Outbox
from treefold.transport.sockets import Hub
from treefold.transport.tally import Tally
from treefold.transport.traffic import Traffic
from treefold.wire.exchange import Received, Tick
from treefold.wire.messages import DeclarePlan, DeclareTable
from treefold.wire.words import Frame, Member, Role

MS = 1_000_000


def values(tally: Tally, name: str) -> dict[tuple[str, ...], float | Counts]:
    """The readings of one metric, by its labels."""
    found = [one for one in tally.readings() if one.name == name]
    assert all(len(one.labels) == len(BY_NAME[name].labels) for one in found)
    by_labels = {one.labels: one.value for one in found}
    assert len(by_labels) == len(found)  # Prometheus would drop one of two
    return by_labels


# ---- scheduler -----------------------------------------------------------------------------------


def test_a_checkpoint_counts_with_its_time_and_size_once_its_manifest_is_written() -> None:
    driver = trained()
    tally = SchedulerTally(driver.core, Traffic())
    last = "checkpoint_last_success_timestamp_seconds"
    assert values(tally, last) == {(): 0.0}
    tally.see(Tick(), driver.saved(10), 0, 1)
    assert values(tally, last) == {(): 0.0}
    written = ManifestWritten(10, "")
    tally.see(written, driver.done(written), 0, 1)
    [stamp] = values(tally, last).values()
    assert isinstance(stamp, float)
    assert 0 <= time.clock_gettime(time.CLOCK_REALTIME) - stamp < 60
    assert values(tally, "checkpoint_last_bytes") == {(): 100}
    assert values(tally, "checkpoint_version") == {(): 10}
    tally.see(ManifestWritten(20, "the disk is full"), [], 0, 1)
    assert values(tally, "checkpoints_total") == {("ok",): 1, ("failed",): 1}
    assert values(tally, last) == {(): stamp}


def test_a_job_without_checkpoints_has_no_time_of_the_last_one() -> None:
    tally = SchedulerTally(Driver().core, Traffic())
    assert values(tally, "checkpoint_last_success_timestamp_seconds") == {}


def test_a_worker_that_falls_silent_is_counted_and_its_slots_are_seen_elsewhere() -> None:
    driver = Driver()
    driver.train()
    tally = SchedulerTally(driver.core, Traffic())
    assert values(tally, "slots") == {("worker-0",): 2, ("worker-1",): 2}
    driver.pass_time(3, 1, 2)
    assert values(tally, "slots") == {("worker-0",): 4}
    assert values(tally, "members_lost_total") == {("server",): 0, ("worker",): 1}
    nodes = values(tally, "cluster_nodes")
    assert nodes["worker", "live"] == nodes["worker", "dead"] == nodes["server", "live"] == 1


def test_beats_that_did_not_come_are_counted_when_the_next_one_does() -> None:
    driver = Driver()
    driver.train()
    tally = SchedulerTally(driver.core, Traffic())
    driver.beat(2)
    beat = driver.core.roster.by_incarnation[2].beat
    assert beat is not None
    for at_ms in (0, 500, 1_400, 3_000):  # every 500 are due: at 2,000 and 2,500 there was none
        tally.see(Received(WORKERS[0], beat), [], at_ms * MS, at_ms * MS + 1)
    assert values(tally, "heartbeats_missed_total") == {("server",): 0, ("worker",): 2}


def test_a_backup_that_takes_over_is_counted() -> None:
    driver = Driver(replace(LIMITS, servers=2, workers=1, replicas=2))
    driver.register(SERVER, Role.SERVER, 100)
    driver.register(WORKERS[0], Role.SERVER, 101)
    driver.register(WORKERS[1], Role.WORKER, 102)
    driver.say(WORKERS[1], DeclareTable(3, 1, SPEC))
    driver.say(WORKERS[1], DeclarePlan(3, 2, plan()))
    tally = SchedulerTally(driver.core, Traffic())
    assert values(tally, "failovers_total") == {("server",): 0}
    [place] = driver.core.tables[0].place.shards  # type: ignore[union-attr]  # it is placed
    staying = 3 - place.server  # the other one of 1 and 2
    driver.pass_time(3, staying, 3)
    assert values(tally, "failovers_total") == {("server",): 1}
    assert values(tally, "members_lost_total")["server",] == 1


def test_a_scheduler_says_where_the_metrics_of_live_members_are() -> None:
    driver = Driver()
    driver.train()
    driver.pass_time(1, 1, 2, 3)
    tally = SchedulerTally(driver.core, Traffic())
    assert tally.targets() == []
    beat = driver.core.roster.by_incarnation[2].beat
    assert beat is not None
    driver.say(WORKERS[0], msgspec.structs.replace(beat, metrics="h:1"))
    assert tally.targets() == [("h:1", "worker-0")]
    driver.pass_time(3, 1, 3)
    assert tally.targets() == []


def test_the_status_counts_staleness_by_name_also_of_those_that_took_a_place_over() -> None:
    driver = Driver()
    driver.train()
    driver.pass_time(3, 1, 2)  # worker-1, which is 3, falls silent
    driver.register(WORKERS[2], Role.WORKER, 103)  # 4 gets its rank
    driver.beat(1)
    beat = driver.core.roster.by_incarnation[1].beat
    assert beat is not None
    counts = [(0, 3, [4, 0]), (0, 4, [1, 1]), (0, 2, [0, 1])]
    driver.say(SERVER, msgspec.structs.replace(beat, staleness=counts))
    [table] = msgspec.json.decode(status_of(driver.core, driver.now_ns))["tables"]
    found = {who: one["contributions"] for who, one in table["staleness"].items()}
    assert found == {"worker-0": 1, "worker-1": 6}


# ---- server --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _tiny_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight elements make two parts of one block each."""
    monkeypatch.setattr(layout, "BLOCK_ELEMENTS", 4)
    monkeypatch.setattr(layout, "PART_BLOCKS_MAX", 1)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """Sockets, of which none is open."""
    made = Hub()
    yield made
    made.close()


def tally_of(core: ServerCore, hub: Hub) -> ServerTally:
    """The tally of a server."""
    carrier = Carrier(Outbox(hub), LaneSettings(is_enabled=False, bytes_max=0))
    return ServerTally(core, Body(core.membership, carrier, Spent()), {}, hub.traffic)


def test_a_server_counts_versions_contributions_and_duplicates(hub: Hub) -> None:
    core = at_version(0)
    tally = tally_of(core, hub)
    assert values(tally, "updates_applied_total") == {}
    assert values(tally, "shard_version") == {("t", "0"): 0}
    complete(core, 0)
    complete(core, 1)
    assert values(tally, "updates_applied_total") == {("t", "0"): 2}
    assert values(tally, "contributions_applied_total") == {("t", "0"): 4}
    assert values(tally, "contributions_duplicate_total") == {(): 0}
    data(core, push(1, 0), 99)
    assert values(tally, "contributions_duplicate_total") == {(): 1}
    assert values(tally, "contributions_applied_total") == {("t", "0"): 4}


def test_a_server_counts_what_it_refuses_by_the_reason(hub: Hub) -> None:
    core = at_version(0)
    tally = tally_of(core, hub)
    wrong = push(0, 0, frame=Frame(SPEC.tensors[0].dtype, 5))
    tally.see(Received(WORKER, wrong), data(core, wrong, 99), 0, 1)
    assert values(tally, "updates_rejected_total") == {("bad_payload",): 1}


def test_a_server_counts_files_of_checkpoints_and_how_long_they_took(hub: Hub) -> None:
    tally = tally_of(holder(), hub)
    save = SaveShard(0, 0, 10, "ckpt", "a")
    tally.see(Tick(), [save], 0, 5 * MS)
    tally.see(ShardStored(0, 0, 10, "a", 4_096, b""), [], 25 * MS, 26 * MS)
    tally.see(Tick(), [save], 0, 5 * MS)
    tally.see(ShardStored(0, 0, 10, "a", 0, b"", "the disk is full"), [], 25 * MS, 26 * MS)
    [took] = values(tally, "checkpoint_duration_seconds").values()
    assert isinstance(took, Counts)
    assert (sum(took.counts), took.sum) == (1, 0.02)
    assert values(tally, "checkpoint_written_bytes_total") == {(): 4_096}


def test_staleness_of_a_worker_that_took_a_place_over_is_counted_there(hub: Hub) -> None:
    core = begun()
    tally = tally_of(core, hub)
    old, new = (Member(Role.WORKER, 1, who, "", "host", 1) for who in (5, 6))
    control(core, msgspec.structs.replace(view(3), members=[old]))
    contribute(core, 0, 0, sender=5)
    control(core, msgspec.structs.replace(view(4), members=[new]))
    contribute(core, 0, 1, sender=6)
    [(labels, counts)] = values(tally, "staleness_steps").items()
    assert labels == ("t", "worker-1")
    assert isinstance(counts, Counts)
    assert (sum(counts.counts), counts.sum) == (2, 1)  # the second one was of the same version
