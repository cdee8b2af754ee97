"""The scheduler knows the key with which each member registered, tells the others, and keeps it."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.unit.scheduler_driver import SERVER, WORKERS, Driver, sent
from treefold.cli.keys import main as keys
from treefold.common.config import Settings
from treefold.scheduler import memory, records
from treefold.scheduler.core import SchedulerCore
from treefold.scheduler.effects import Effect, Persist
from treefold.scheduler.journal import Journal
from treefold.scheduler.shell import SchedulerShell
from treefold.transport.keys import read_key
from treefold.transport.sockets import Arrival
from treefold.wire.exchange import Received
from treefold.wire.membership import Identity, Membership
from treefold.wire.messages import Fenced, Heartbeat, Refused, Register, Registered, View
from treefold.wire.words import PROTOCOL_VERSION, Code, Member, Role

BEAT = Heartbeat(5, 1, 1, 1, 1, 1, None, "", 1, 0.0)


def register(driver: Driver, peer: bytes, nonce: int, key: str, origin: int = 0) -> list[Effect]:
    """A process registers by a connection with this key."""
    role = Role.SERVER if peer == SERVER else Role.WORKER
    who = Register(PROTOCOL_VERSION, role, nonce, f"address-{nonce}", "host", 1, "0", -1, origin)
    return driver.core.handle(driver.now_ns, Received(peer, who, (), key))


def formed() -> tuple[Driver, list[Effect]]:
    """A server and two workers have registered, each with a key of its own."""
    driver = Driver()
    effects = register(driver, SERVER, 100, "server's")
    effects += register(driver, WORKERS[0], 101, "first's")
    effects += register(driver, WORKERS[1], 102, "second's")
    return driver, effects


def known(members: list[Member]) -> dict[int, str]:
    """Who has which key."""
    return {member.incarnation: member.key for member in members}


def test_a_view_says_which_key_each_member_registered_with() -> None:
    _, effects = formed()
    views = [message for message in sent(effects, View) if isinstance(message, View)]
    assert known(views[-1].members) == {1: "server's", 2: "first's", 3: "second's"}


def test_without_keys_a_view_has_none() -> None:
    driver = Driver()
    driver.form()
    assert known(driver.core.view.members) == {1: "", 2: "", 3: ""}


def test_a_registration_that_is_repeated_with_another_key_is_refused() -> None:
    driver, _ = formed()
    effects = register(driver, b"thief", 101, "second's")
    [refusal] = sent(effects, Refused)
    assert isinstance(refusal, Refused)
    assert refusal.code is Code.NOT_ALLOWED
    assert refusal.text == "worker-0 has registered with this nonce, and with another key"
    assert not sent(effects, Registered)
    assert sent(register(driver, WORKERS[0], 101, "first's"), Registered)
    assert known(driver.core.view.members)[2] == "first's"


def test_a_process_that_comes_back_with_another_key_gets_another_number() -> None:
    driver, _ = formed()
    [answer] = sent(register(driver, WORKERS[0], 103, "rotated"), Registered)
    assert isinstance(answer, Registered)
    keys_now = known(driver.core.view.members)
    assert (keys_now[2], keys_now[answer.incarnation]) == ("first's", "rotated")


@pytest.mark.parametrize(
    ("said", "key", "origin"),
    [(2, "first's", 2), (2, "second's", 0), (99, "first's", 0), (0, "first's", 0)],
)
def test_a_view_names_the_first_number_of_a_process_if_it_had_the_same_key(
    said: int, key: str, origin: int
) -> None:
    driver, _ = formed()
    register(driver, b"again", 104, key, said)
    assert driver.core.view.members[-1].origin == origin


def test_a_member_that_was_given_up_says_its_first_number() -> None:
    member = Membership(Identity(Role.WORKER, 9, "", "host", 1, "0"))
    member.tick(0)
    for nonce, incarnation in ((9, 5), (10, 8), (11, 12)):
        member.on_registered(0, Registered(nonce, 1, incarnation, 0, 500, 2_000, 1, 1))
        member.on_fenced(0, Fenced(incarnation))
        [send] = member.tick(0)
        assert isinstance(send.message, Register)
        assert send.message.origin == 5


def test_another_scheduler_that_takes_up_the_journal_knows_the_keys() -> None:
    driver, effects = formed()
    written: list[records.Record] = [records.JobBegan(77, 1)]
    for effect in effects:
        written += effect.records if isinstance(effect, Persist) else []
    other = SchedulerCore(driver.core.limits)
    memory.take_up(other, records.decode(records.encode(written)))
    assert known([state.member for state in other.roster.by_incarnation.values()]) == {
        1: "server's", 2: "first's", 3: "second's"
    }  # fmt: skip
    assert known(other.view.members) == known(driver.core.view.members)


def test_a_journal_without_keys_is_read() -> None:
    """As those are that were written before it had them."""
    enrolled = records.Enrolled(Member(Role.WORKER, 0, 5, "", "here", 1, "k"), 77)
    tag, member, nonce = msgspec.msgpack.decode(msgspec.msgpack.encode(enrolled))
    [older] = records.decode(msgspec.msgpack.encode([[tag, member[:6], nonce]]))
    assert older == records.Enrolled(Member(Role.WORKER, 0, 5, "", "here", 1), 77)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    keys(["init", str(tmp_path / "keys")])
    keys(["add", str(tmp_path / "keys"), "other", "--role", "worker"])
    return tmp_path / "keys"


@pytest.fixture
def restarted(folder: Path, tmp_path: Path) -> Iterator[SchedulerShell]:
    """A scheduler, with the journal of one at which ``worker`` is incarnation 5."""
    public = read_key(folder / "worker.key").public
    journal = Journal(tmp_path / "journal")
    enrolled = records.Enrolled(Member(Role.WORKER, 0, 5, "", "here", 1, public), 77)
    journal.append(records.encode([records.JobBegan(99, 1), enrolled]))
    journal.sync()
    journal.close()
    place = str(tmp_path / "journal")
    settings = Settings(bind="tcp://127.0.0.1:0", keys=str(folder), journal=place, page_port=-1)
    shell = SchedulerShell(settings)
    yield shell
    shell._loop.end_watch()
    shell._hub.close()
    if shell._journal is not None:
        shell._journal.close()


def test_a_number_from_before_a_restart_belongs_to_the_key_in_the_journal(
    restarted: SchedulerShell, folder: Path
) -> None:
    def says(name: str) -> str:
        public = read_key(folder / f"{name}.key").public
        return restarted._loop.gate.denial(Arrival("listener", b"it", b"", [], public), BEAT)

    assert says("other") == "incarnation 5 belongs to another key"
    assert not says("worker")


def test_a_member_is_known_by_its_key_from_its_registration_on(
    restarted: SchedulerShell, folder: Path
) -> None:
    who = Register(PROTOCOL_VERSION, Role.WORKER, 78, "", "here", 1, "0")
    public = read_key(folder / "other.key").public
    restarted._loop.feed(Received(b"it", who, (), public))
    assert restarted._loop.gate._owners[6] == public
