"""Where members run: told with some heartbeats, and shown by the scheduler's status."""

import json

import msgspec

from tests.unit.scheduler_driver import SECOND, WORKERS, Driver, sent
from treefold.common.facts import HostFacts
from treefold.common.host import host_facts
from treefold.common.process import FACTS_SAMPLES, SAMPLE_NS, ProcessFigures
from treefold.transport.budgets import BUDGETS, Purse
from treefold.wire.membership import FACTS_BEATS, MS, Identity, Membership, Standing
from treefold.wire.messages import Heartbeat, StatusReply, StatusRequest
from treefold.wire.probes import ProbeSeen
from treefold.wire.words import Facts, Role

HOST = HostFacts("0.1.0", "3.11.7", "2.13.0", 1024, 1 << 30, 5 * SECOND)


def member() -> Membership:
    """A worker that is a member."""
    made = Membership(Identity(Role.WORKER, 7, "", "host", 1, "0.1.0"))
    made.standing, made.incarnation = Standing.MEMBER, 3
    return made


def beats(made: Membership, count: int) -> list[Heartbeat]:
    """So many heartbeats, one every half second."""
    found = [made.tick(n * 500 * MS)[0].message for n in range(count)]
    return [one for one in found if isinstance(one, Heartbeat)]


def test_the_host_is_told_of_in_the_first_heartbeat_and_every_eighth_after_it() -> None:
    made = member()
    made.vitals.host = HOST
    told = [n for n, beat in enumerate(beats(made, 20)) if beat.facts is not None]
    assert told == [0, FACTS_BEATS, 2 * FACTS_BEATS]


def test_the_clock_is_told_as_it_is_when_the_heartbeat_leaves() -> None:
    made = member()
    assert [beat.facts for beat in beats(made, 3)] == [None] * 3, "nothing is known yet"
    made.vitals.host = HOST
    [send] = made.tick(60 * SECOND)
    assert isinstance(send.message, Heartbeat)
    assert send.message.facts == Facts("0.1.0", "3.11.7", "2.13.0", 1024, 1 << 30, 65 * SECOND)


def test_a_process_looks_around_less_often_than_at_itself() -> None:
    figures = ProcessFigures()
    seen = []
    for number in range(FACTS_SAMPLES + 1):
        figures.sample(number * SAMPLE_NS)
        seen.append(figures.host)
    assert seen[0] is not None
    assert all(one is seen[0] for one in seen[:FACTS_SAMPLES])
    assert seen[FACTS_SAMPLES] is not seen[0]
    assert host_facts().memory_free_bytes > 0


def told(driver: Driver, clock_ns: int) -> dict[str, object]:
    """A worker tells of its host; what the status says of it."""
    facts = Facts("0.1.0", "3.11.7", "2.13.0", 1024, 1 << 30, clock_ns)
    driver.beat(2)
    beat = driver.core.roster.by_incarnation[2].beat
    assert beat is not None
    driver.say(WORKERS[0], msgspec.structs.replace(beat, facts=facts))
    driver.beat(2)  # what was told stays known
    [reply] = sent(driver.say(b"asks", StatusRequest(1)), StatusReply)
    assert isinstance(reply, StatusReply)
    members = {one["name"]: one for one in json.loads(reply.body)["members"]}
    assert members["worker-1"]["facts"] is None
    found: dict[str, object] = members["worker-0"]["facts"]
    return found


def test_the_status_says_where_members_run_and_how_far_their_clocks_are() -> None:
    driver = Driver()
    driver.train()
    driver.core.events.wall_s = 1_000.0
    driver.wait(SECOND // 2)
    assert told(driver, 1_003 * SECOND) == {
        "package": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "files_max": 1024,
        "memory_free_bytes": 1 << 30, "clock_ahead_s": 2.5,
    }  # fmt: skip


def test_a_message_that_was_long_on_its_way_makes_no_clock_late() -> None:
    driver = Driver()
    driver.train()
    assert told(driver, 0)["clock_ahead_s"] == 0.0
    driver.wait(SECOND)
    assert told(driver, SECOND // 5)["clock_ahead_s"] == 0.0, "it was 0.8 s on its way"


def test_answers_to_probes_are_withheld_when_a_peer_has_had_too_many() -> None:
    purse, most = Purse(), BUDGETS[ProbeSeen].burst
    allowed = [purse.allows(b"peer", ProbeSeen(1, b"")) for _ in range(most + 40)]
    assert allowed[:most] == [True] * most
    assert not allowed[-1]
    assert purse.allows(b"another", ProbeSeen(1, b""))
