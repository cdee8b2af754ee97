"""What the scheduler tells of, in plain words, in its log and in its status alike."""

import json
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
    plan,
    sent,
)
from treefold.common.layout import BLOCK_ELEMENTS
from treefold.common.spec import Consistency, ConsistencyKind, Dtype, TensorSpec
from treefold.scheduler import eventlog, memory
from treefold.scheduler.core import SchedulerCore
from treefold.scheduler.effects import Effect, SchedulerStopAsked
from treefold.scheduler.eventlog import EVENTS_MAX, SLOTS, EventLog
from treefold.wire.decisions import QuorumReport
from treefold.wire.exchange import Halt, Level, Note, Tick
from treefold.wire.membership import MS
from treefold.wire.messages import (
    ChainDiffers,
    ChainSynced,
    DeclarePlan,
    DeclareTable,
    DrainRequest,
    Heartbeat,
    Leave,
    Register,
    StatusReply,
    StatusRequest,
)
from treefold.wire.words import PROTOCOL_VERSION, Outcome, Role

SERVERS = [SERVER, b"s1", b"s2"]
WIDE = msgspec.structs.replace(
    SPEC, tensors=[TensorSpec("w", [64 * BLOCK_ELEMENTS], Dtype.FLOAT32, 0)]
)


def listed(driver: Driver) -> list[dict[str, object]]:
    """The events of a status."""
    (reply,) = sent(driver.say(b"asks", StatusRequest(1)), StatusReply)
    assert isinstance(reply, StatusReply)
    found: list[dict[str, object]] = json.loads(reply.body)["events"]
    return found


def texts(driver: Driver) -> list[str]:
    """What happened, in words."""
    return [str(one["text"]) for one in listed(driver)]


class Chained(Driver):
    """Servers with incarnations 1, 2, ..., then one worker; two copies of each shard."""

    def __init__(self, servers: int = 2) -> None:
        super().__init__(replace(LIMITS, servers=2, workers=1, replicas=2))
        self.keepers = {n + 1: SERVERS[n] for n in range(servers)}
        for who, peer in self.keepers.items():
            self.register(peer, Role.SERVER, 100 + who)
        self.who = servers + 1
        self.register(WORKERS[0], Role.WORKER, 200)
        self.say(WORKERS[0], DeclareTable(self.who, 1, WIDE))
        self.say(WORKERS[0], DeclarePlan(self.who, 2, plan()))
        self.confirm()

    def confirm(self, *without: int) -> None:
        """Everybody but these has the newest view."""
        for who, peer in [*self.keepers.items(), (self.who, WORKERS[0])]:
            if who not in without:
                view = self.core.view.number
                self.say(peer, Heartbeat(who, view, 1, 7, 0, 0, None, "", 0, 0.0))

    def silence(self, who: int) -> None:
        """A server says nothing any more until it is given up."""
        for _ in range(5):
            self.wait(SECOND // 2)
            self.confirm(who)

    def synced(self) -> None:
        """Everything that is being copied is there."""
        for place in self.core.view.tables[0].shards:
            for who in place.joining:
                message = ChainSynced(place.server, 0, place.shard, place.chain_view, who)
                self.say(self.keepers[place.server], message)


def test_a_job_from_its_beginning_to_its_end() -> None:
    driver = Driver()
    driver.train()
    driver.say(WORKERS[0], Leave(2, Outcome.DRAINED, "the worker was asked to stop"))
    driver.core.handle(driver.now_ns, SchedulerStopAsked(Outcome.FAILED, "enough"))
    assert texts(driver) == [
        "the scheduler began, and waits for 1 servers and 2 workers",
        "server-0 joined from host (process 1)",
        "worker-0 joined from host (process 1)",
        "worker-1 joined from host (process 1)",
        "the job begins: 1 servers and 2 workers are there",
        "table t is placed: shard 0 on server-0",
        "slots 0-1 given to worker-0, slots 2-3 given to worker-1",
        "worker-0 left: drained the worker was asked to stop, slots 0-1 given to worker-1",
        "the job has ended: failed, enough",
    ]


def test_events_are_numbered_by_one_and_have_the_time_of_the_wall() -> None:
    driver = Driver()
    driver.core.events.wall_s = 1_000.5
    driver.wait(2 * SECOND)
    driver.form()
    found = listed(driver)
    assert [one["number"] for one in found] == list(range(1, len(found) + 1))
    assert [found[0]["at"], found[1]["at"]] == [1_000.5, 1_002.5]


def test_a_worker_that_dies_is_told_of_with_its_round_and_who_has_its_slots() -> None:
    driver = Driver()
    driver.train()
    driver.beats(1, 2, 3, round_=812)
    effects = driver.pass_time(2, 1, 2)
    text = "worker-1 died in round 812: it has been silent for 2.0 s, slots 2-3 given to worker-0"
    assert texts(driver)[-1] == text
    assert [one.text for one in effects if isinstance(one, Note)] == [text], "the log says the same"


@pytest.mark.parametrize("rounds", [[], [-1]])
def test_a_member_that_dies_before_its_first_round_has_none(rounds: list[int]) -> None:
    driver = Driver()
    driver.train()
    for round_ in rounds:
        driver.beat(3, round_)
    driver.pass_time(2.5, 1, 2)
    assert texts(driver)[-1].startswith("worker-1 died: it has been silent for 2.0 s, slots 2-3 ")


def test_slots_that_go_to_a_faster_worker_are_told_of_with_the_round() -> None:
    driver = Driver()
    driver.train()
    driver.beat(1)
    driver.beat(2, round_=5, slot_ns=10 * MS)
    driver.beat(3, round_=5, slot_ns=30 * MS)
    driver.wait(500 * MS)
    assert texts(driver)[-1] == f"slot 2 given to worker-0 from round {driver.leases.from_round} on"


def test_a_process_with_the_address_of_another_one_replaces_it() -> None:
    driver = Driver(replace(LIMITS, servers=1, workers=1))
    driver.form(1)
    again = Register(PROTOCOL_VERSION, Role.SERVER, 7, "server-100", "host", 2, "0")
    driver.say(b"again", again)
    assert "server-0 was replaced: another process has its address now" in "\n".join(texts(driver))


def test_a_fail_over_names_who_died_who_was_promoted_and_who_is_copied_to() -> None:
    driver = Chained(3)
    driver.silence(1)
    found = texts(driver)
    begin = next(n for n, text in enumerate(found) if text.startswith("server-0 died"))
    held = sum(1 in (p.server, *p.backups) for p in driver.core.view.tables[0].shards)
    died = "server-0 died in round 7: it has been silent for 2.0 s"
    assert not held
    assert found[begin].startswith(f"{died}; ")
    assert found[begin].endswith(" shards lack one of their servers")
    assert any(" is promoted to primary of shard" in text for text in found[begin:])
    assert any(text.endswith(", server-0 being gone") for text in found[begin:])
    assert any(" on the way to server-" in text for text in found[begin:])
    driver.confirm(1)
    driver.synced()
    assert "copied to server-" in texts(driver)[-1]
    assert texts(driver)[-1].endswith("which is in sync")


def test_a_drained_server_is_told_of_until_it_holds_nothing() -> None:
    driver = Chained(3)
    driver.say(b"admin", DrainRequest(1, "server-0"))
    driver.say(b"admin", DrainRequest(1, "server-0"))
    assert texts(driver).count("server-0 is to be drained, and leaves then") == 1
    for _ in range(6):
        driver.confirm()
        driver.synced()
    assert driver.core.chains.holds(1) == 0
    found = texts(driver)
    assert any(
        "is made the primary of shard" in t and "in the place of server-0" in t for t in found
    )
    assert any(t.startswith("server-0 holds shard") and t.endswith(" no more") for t in found)


def test_a_move_is_told_of_when_it_begins_and_when_it_ends() -> None:
    driver = Chained(3)
    place = next(p for p in driver.core.view.tables[0].shards if 3 not in (p.server, *p.backups))
    driver.core.chains.move((0, place.shard), place.server, 3, driver.core.view.number + 1)
    driver.register(b"late", Role.WORKER, 999)  # makes the next view
    source = f"server-{place.server - 1}"
    assert f"shard {place.shard} of t on the way from {source} to server-2" in texts(driver)
    for _ in range(4):
        driver.synced()
        driver.confirm()
    assert f"{source} holds shard {place.shard} of t no more" in texts(driver)


def test_a_round_without_some_slots_is_told_of_and_many_of_them_in_one_sentence() -> None:
    driver = Driver()
    driver.form()
    rule = Consistency(ConsistencyKind.QUORUM, quorum=2, grace=0.0)
    spec = msgspec.structs.replace(SPEC, consistency=rule)
    driver.say(WORKERS[0], DeclareTable(2, 1, spec))
    driver.say(WORKERS[0], DeclarePlan(2, 2, plan(slots=3)))
    for round_ in range(40):
        driver.say(SERVER, QuorumReport(1, 0, 0, round_, [0, 2], 3))
        driver.wait(SECOND // 2)
        driver.beats(1, 2, 3)
    assert texts(driver)[-3:] == [f"round {n} went on without 1 of its 3 slots" for n in range(3)]
    for _ in range(30):
        driver.wait(SECOND // 2)
        driver.beats(1, 2, 3)
    text = texts(driver)[-1]
    assert text.startswith("37 times in ")
    assert text.endswith(" something like this: round 39 went on without 1 of its 3 slots")


def test_a_copy_that_differs_is_made_again() -> None:
    driver = Chained()
    place = driver.core.view.tables[0].shards[0]
    message = ChainDiffers(place.server, 0, 0, place.chain_view, place.backups[0])
    driver.say(driver.keepers[place.server], message)
    name = f"server-{place.backups[0] - 1}"
    assert texts(driver)[-1] == f"the copy of shard 0 of t on {name} is made again"


def test_another_scheduler_says_that_it_began_anew() -> None:
    first = Driver()
    first.form()
    kept = first.core.memory.snapshot(first.core)
    second = SchedulerCore(LIMITS)
    memory.take_up(second, kept)
    view = second.view.number
    effects = second.handle(5 * SECOND, Tick())
    (note,) = [one for one in effects if isinstance(one, Note)]
    began = f"the scheduler began anew and goes on with view {view}"
    assert note.text == f"{began}; events before that are not listed"
    assert second.events.document()[0] == {"number": 1, "at": 5.0, "text": note.text}


# ---- bounds --------------------------------------------------------------------------------------


def note(text: str, about: str = SLOTS, level: Level = Level.INFO) -> Note:
    """One note."""
    return Note(level, text, about)


def shown(effects: list[Effect]) -> list[str]:
    """The texts of notes."""
    return [one.text for one in effects if isinstance(one, Note)]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> EventLog:
    """A log in which slots may be told of twice at once, and once more every ten seconds."""
    monkeypatch.setitem(eventlog.BOUNDS, SLOTS, (2, 10 * SECOND))
    return EventLog()


def test_a_storm_is_told_of_in_one_sentence_when_there_is_room_again(log: EventLog) -> None:
    assert shown(log.take(0, [note("a"), note("b"), note("c"), note("d")])) == ["a", "b"]
    assert shown(log.take(SECOND, [note("e")])) == []
    assert shown(log.take(9 * SECOND, [])) == []
    (text,) = shown(log.take(10 * SECOND, []))
    assert text == "3 times in 10 s something like this: e"
    assert [one["text"] for one in log.document()] == ["a", "b", text]


def test_a_storm_of_one_kind_hides_no_other_and_no_warning(log: EventLog) -> None:
    log.take(0, [note(str(n)) for n in range(20)])
    loud = [note("a member", ""), note("trouble", SLOTS, Level.WARNING)]
    assert shown(log.take(0, loud)) == ["a member", "trouble"]


def test_what_was_held_back_is_told_before_the_end(log: EventLog) -> None:
    log.take(0, [note(str(n)) for n in range(3)])
    effects = log.take(SECOND, [note("ended", ""), Halt(0, "")])
    assert shown(effects) == ["2", "ended"]


def test_the_list_is_bounded_and_its_numbers_go_on() -> None:
    log = EventLog()
    for number in range(EVENTS_MAX + 5):
        log.take(number * 60 * SECOND, [note(str(number))])
    found = log.document()
    assert len(found) == EVENTS_MAX
    assert [found[0]["number"], found[-1]["number"]] == [6, EVENTS_MAX + 5]


def test_notes_for_developers_are_no_events(log: EventLog) -> None:
    quiet = note("detail", "", Level.DEBUG)
    assert log.take(0, [quiet]) == [quiet]
    assert log.document() == []
