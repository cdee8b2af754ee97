"""A server and whoever speaks to it in the name of another: by key, with a loop around its core."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.unit.server_driver import (
    GROUPS,
    JOB,
    ME,
    at_version,
    hyper,
    member,
    meta,
    pull,
    push,
    registered,
    view,
)
from treefold.cli.keys import main as keys
from treefold.common import layout
from treefold.common.audit import Audit
from treefold.common.spec import Dtype
from treefold.server.core import ServerCore
from treefold.server.effects import Effect, Event
from treefold.transport import gate as gates
from treefold.transport.access import Access
from treefold.transport.budgets import PATIENCE
from treefold.transport.gate import Gate
from treefold.transport.keys import read_key
from treefold.transport.loop import Loop
from treefold.transport.sockets import Arrival
from treefold.wire.chain import ChainApplied, ChainAsk, ChainRound, UnitCopy, UnitTaken
from treefold.wire.codec import encode
from treefold.wire.exchange import SCHEDULER
from treefold.wire.messages import AnyMessage, Pulled, Refused, Register, RoundStatus, View
from treefold.wire.permissions import CLAIMS, KeyRole
from treefold.wire.words import PROTOCOL_VERSION, Code, Frame, Leases, Member, Phase, Role

MINE, THEIRS, SERVER, UNKNOWN = 5, 6, 8, 99  # incarnations
OWNED = {MINE: "worker", THEIRS: "other", SERVER: "server", ME: "second"}
LEASES = Leases(0, [])
IN_MY_NAME: list[AnyMessage] = [push(0, 0), push(0, 1), hyper(0), meta(0), pull(1)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts are enough."""
    monkeypatch.setattr(layout, "BLOCK_ELEMENTS", 4)
    monkeypatch.setattr(layout, "PART_BLOCKS_MAX", 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A key for each of two workers and two servers."""
    keys(["init", str(tmp_path / "keys")])
    keys(["add", str(tmp_path / "keys"), "other", "--role", "worker"])
    keys(["add", str(tmp_path / "keys"), "second", "--role", "server"])
    return tmp_path / "keys"


def public(folder: Path, name: str) -> str:
    return read_key(folder / f"{name}.key").public


def members(folder: Path, owned: dict[int, str]) -> list[Member]:
    """What a view says of members with these keys; of one without a name it has none."""
    servers = (SERVER, ME)
    return [
        Member(
            Role.SERVER if who in servers else Role.WORKER,
            who,
            who,
            "tcp://10.0.0.2:1",
            "here",
            1,
            public(folder, name) if name else "",
        )
        for who, name in owned.items()
    ]


def names(folder: Path, owned: dict[int, str], number: int = 3) -> View:
    """A view that says who has which key."""
    there = members(folder, owned)
    return View(number, Phase.RUNNING, MINE, there, view(2).tables, LEASES, LEASES)


class Said:
    """An outbox that keeps what is sent."""

    def __init__(self) -> None:
        self.lost: list[object] = []
        self.sent: list[tuple[object, AnyMessage]] = []

    def send(self, socket: object, peer: object, message: AnyMessage) -> None:
        del socket
        self.sent.append((peer, message))

    def flush(self) -> None:
        """Nothing waits."""


class Payloads:
    """Takes in payloads; counts them."""

    def __init__(self) -> None:
        self.taken = 0

    def receive(self, arrival: Arrival, message: object) -> tuple[int, ...]:
        del arrival, message
        self.taken += 1
        return (self.taken,)


class Listening:
    """A server's core in its loop, and those who speak to it."""

    def __init__(self, core: ServerCore, folder: Path | None, audit: Audit | None = None) -> None:
        access = None if folder is None else Access(str(folder), [KeyRole.SERVER])
        self.folder, self.core, self.hub = folder, core, SimpleNamespace(access=access, audit=audit)
        self.outbox, self.payloads = Said(), Payloads()
        made: Any = Loop  # of stand-ins
        self.loop: Loop[Event, Effect] = made(
            self.hub, self.outbox, core, self.perform, self.payloads
        )

    def perform(self, effect: Effect) -> list[Event]:
        """Nothing is computed."""
        del effect
        return []

    def hear(self, key: str, message: AnyMessage, by: object = b"peer") -> list[Refused]:
        """A message comes by a connection with this key; the refusals that it is sent."""
        proven = "" if self.folder is None else public(self.folder, key)
        nbytes = 16 if getattr(message, "frame", None) else 0
        payloads = [memoryview(bytes(nbytes))] if nbytes else []
        self.outbox.sent.clear()
        arrival = Arrival("there", by, encode(message), payloads, proven, "10.0.0.7")
        for received in self.loop._decode(arrival):
            self.loop.feed(received)
        return [one for _, one in self.outbox.sent if isinstance(one, Refused)]

    def learn(self, owned: dict[int, str], number: int = 3) -> None:
        """The scheduler sends a view."""
        assert self.folder is not None
        assert not self.hear("scheduler", names(self.folder, owned, number), SCHEDULER)

    @property
    def held(self) -> list[object]:
        """All that this server has of the round that it collects."""
        shard = self.core.shards[0, 0]
        return [shard.version, repr(shard.round), self.payloads.taken]


@pytest.fixture
def listen(folder: Path) -> Callable[..., Listening]:
    """Makes servers at version 0, which know who has which key."""

    def begin(audit: Audit | None = None) -> Listening:
        made = Listening(at_version(0), folder, audit)
        made.learn(OWNED)
        return made

    return begin


# ---- workers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", IN_MY_NAME, ids=lambda message: type(message).__name__)
def test_what_a_worker_says_in_anothers_name_is_refused_and_changes_nothing(
    listen: Callable[..., Listening], message: AnyMessage
) -> None:
    server = listen()
    before = server.held
    [refusal] = server.hear("other", message)
    assert refusal == Refused(0, Code.NOT_ALLOWED, "incarnation 5 belongs to another key")
    assert server.held == before
    assert server.loop.refused == 1


def test_a_round_that_a_worker_brings_in_its_own_name_is_made(
    listen: Callable[..., Listening],
) -> None:
    server = listen()
    for message in [push(0, slot, part=part) for part in (0, 1) for slot in (0, 1)]:
        assert not server.hear("worker", message)
    before = server.held
    assert server.hear("other", meta(0))
    assert server.held == before
    assert not server.hear("worker", meta(0))
    assert server.core.shards[0, 0].version == 1


def test_without_the_check_the_forged_round_is_made(
    listen: Callable[..., Listening], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: nothing else stands in the way."""
    monkeypatch.setattr(Gate, "_impostor", lambda *_: "")
    server = listen()
    for message in [push(0, slot, part=part) for part in (0, 1) for slot in (0, 1)]:
        assert not server.hear("other", message)
    assert not server.hear("other", meta(0))
    assert server.core.shards[0, 0].version == 1


def test_without_keys_a_server_asks_nobody_who_he_is() -> None:
    server = Listening(at_version(0), None)
    server.hear("", View(3, Phase.RUNNING, 5, [], view(2).tables, LEASES, LEASES), SCHEDULER)
    for message in IN_MY_NAME:
        assert not server.hear("", message)
    assert server.loop.gate._owners == {}


def test_a_number_that_no_view_has_named_yet_is_taken_as_ever(
    listen: Callable[..., Listening],
) -> None:
    server = listen()
    assert not server.hear("other", push(0, 0, sender=UNKNOWN))
    server.learn({**OWNED, UNKNOWN: "worker"}, 4)
    assert server.hear("other", push(0, 1, sender=UNKNOWN))
    assert not server.hear("worker", push(0, 1, sender=UNKNOWN))


def test_who_is_gone_is_known_for_what_is_on_its_way(listen: Callable[..., Listening]) -> None:
    server = listen()
    server.learn({THEIRS: "other"}, 4)
    assert server.hear("other", push(0, 0))
    assert not server.hear("worker", push(0, 0))


def test_who_had_to_register_again_goes_on_in_its_first_name(
    folder: Path,
) -> None:
    """A server that came meanwhile has never heard of that."""
    server = Listening(at_version(0), folder)
    again = [msgspec.structs.replace(one, origin=MINE) for one in members(folder, {9: "worker"})]
    server.loop.gate.learn(again)
    assert server.hear("other", push(0, 0))
    assert not server.hear("worker", push(0, 0))


def test_nobody_takes_over_a_number_by_saying_that_it_was_its_first(
    listen: Callable[..., Listening], folder: Path
) -> None:
    server = listen()
    liar = [msgspec.structs.replace(one, origin=MINE) for one in members(folder, {9: "other"})]
    server.loop.gate.learn(liar)
    assert server.hear("other", push(0, 0))
    assert not server.hear("worker", push(0, 0))
    who = Register(PROTOCOL_VERSION, Role.WORKER, 78, "", "here", 1, "0", -1, MINE)
    assert "belongs to another key" in server.hear("other", who)[0].text


def test_of_those_that_are_gone_only_so_many_are_remembered(
    listen: Callable[..., Listening], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = listen()
    monkeypatch.setattr(gates, "OWNERS_MAX", len(OWNED))
    again = members(folder, {UNKNOWN: "worker"})[0]
    later = names(folder, {THEIRS: "other"}, 4)
    later.members.append(msgspec.structs.replace(again, origin=MINE))
    server.hear("scheduler", later, SCHEDULER)
    owners = server.loop.gate._owners
    assert len(owners) == len(OWNED)
    assert {MINE, THEIRS, UNKNOWN} <= owners.keys()


def test_a_worker_with_a_new_key_has_a_new_number_and_the_old_one_keeps_the_old_key(
    listen: Callable[..., Listening], folder: Path
) -> None:
    server = listen()
    shutil.copy(folder / "worker.key", folder / "before.key")
    keys(["rotate", str(folder), "worker"])
    assert server.hub.access is not None
    server.hub.access.refresh(is_urgent=True)
    server.loop.gate.learn(members(folder, {UNKNOWN: "worker"}))
    assert not server.hear("worker", push(0, 0, sender=UNKNOWN))
    assert server.hear("worker", push(0, 1))
    assert not server.hear("before", push(0, 1))


def test_workers_that_share_a_key_are_not_told_apart(listen: Callable[..., Listening]) -> None:
    server = listen()
    server.learn({MINE: "worker", UNKNOWN: "worker"}, 4)
    assert not server.hear("worker", push(0, 0))
    assert not server.hear("worker", push(0, 1, sender=UNKNOWN))


def test_a_member_whose_key_nobody_knows_is_taken_at_its_word(
    folder: Path,
) -> None:
    server = Listening(at_version(0), folder)
    server.learn({MINE: ""})
    assert not server.hear("other", push(0, 0))


def test_only_the_scheduler_says_whose_a_number_is(listen: Callable[..., Listening]) -> None:
    server = listen()
    forged = names(server.folder or Path(), {MINE: "other"}, 9)
    server.hear("other", forged)
    server.hear("second", forged, SERVER)
    server.hear("scheduler", forged)  # who listens takes no views
    assert server.hear("other", push(0, 0))


def test_refusals_are_audited_and_a_flood_of_them_is_not_read(
    listen: Callable[..., Listening], tmp_path: Path
) -> None:
    audit = Audit(str(tmp_path / "audit"), "server")
    server = listen(audit)
    for _ in range(PATIENCE.burst + 500):
        server.hear("other", hyper(0))
    audit.close()
    assert server.loop.refused <= PATIENCE.burst + 400  # some are forgiven while this takes
    assert server.loop.ignored >= 100
    first = json.loads((tmp_path / "audit").read_text().splitlines()[0])
    said = {key: first[key] for key in ("what", "is_allowed", "who", "role", "where", "text")}
    assert said == {
        "what": "RoundHyper",
        "is_allowed": False,
        "who": "other",
        "role": "worker",
        "where": "10.0.0.7",
        "text": "incarnation 5 belongs to another key",
    }


# ---- servers -------------------------------------------------------------------------------------

RELAYED: list[AnyMessage] = [
    push(0, 0, sender=SERVER),
    ChainRound(JOB, SERVER, 3, 0, 0, 0, 2, GROUPS, 0.0, 0.0, b"", None, []),
    ChainAsk(JOB, SERVER, 3, 0, 0),
    UnitCopy(JOB, SERVER, 3, 0, 0, 0, 3, 0, 0, [], False, b"", 1, 0, 1, Frame(Dtype.FLOAT32, 4)),
]
ANSWERS: list[AnyMessage] = [
    ChainApplied(JOB, SERVER, 3, 0, 0, 0, 0),
    UnitTaken(JOB, SERVER, 3, 0, 0, 0, 3, 0),
]


@pytest.mark.parametrize("key", ["worker", "second"])
@pytest.mark.parametrize("message", RELAYED, ids=lambda message: type(message).__name__)
def test_what_is_relayed_in_a_servers_name_comes_by_its_key_alone(
    listen: Callable[..., Listening], message: AnyMessage, key: str
) -> None:
    server = listen()
    before = server.held
    [refusal] = server.hear(key, message)
    assert refusal.code is Code.NOT_ALLOWED
    assert server.held == before
    assert not [one for one in server.hear("server", message) if one.code is Code.NOT_ALLOWED]


@pytest.mark.parametrize("message", ANSWERS, ids=lambda message: type(message).__name__)
def test_what_a_server_answers_comes_by_its_key_alone(
    listen: Callable[..., Listening], message: AnyMessage
) -> None:
    server = listen()
    server.hear("second", message, ME)
    server.hear("second", message, SERVER)
    assert server.loop.refused == 2
    server.hear("server", message, SERVER)
    assert server.loop.refused == 2


def test_a_link_has_to_be_to_the_server_that_it_is_called_after(
    listen: Callable[..., Listening],
) -> None:
    """Also for what does not say who sends it: another server may have got the address."""
    server = listen()
    for message in (RoundStatus(0, 0, 0, [], True), Pulled(0, 0, 0, 1, 0, Frame(Dtype.FLOAT32, 4))):
        refused = server.loop.refused
        server.hear("second", message, SERVER)
        assert server.loop.refused == refused + 1
        server.hear("server", message, SERVER)
        assert server.loop.refused == refused + 1


def test_a_view_is_learned_from_even_if_it_comes_before_the_answer_that_names_us(
    folder: Path,
) -> None:
    server = Listening(member(), folder)
    server.learn(OWNED, 1)
    server.hear("scheduler", registered(), SCHEDULER)
    server.learn(OWNED, 1)  # the same again
    assert server.hear("other", push(0, 0))


# ---- the table -----------------------------------------------------------------------------------


def test_every_kind_that_members_send_and_that_has_a_sender_is_asked_for_it() -> None:
    assert {kind.__name__: name for kind, name in CLAIMS.items()} == {
        **dict.fromkeys(
            (
                "Heartbeat", "DeclareTable", "DeclarePlan", "Leave", "RoundLate", "NormReport",
                "QuorumReport", "HealthReport", "ChainSynced", "ChainDiffers", "ShardSaved",
                "DrainRequest",
            ),
            "incarnation",
        ),
        **dict.fromkeys(
            (
                "Push", "RoundHyper", "RoundMeta", "Pull", "ChainRound", "ChainAsk", "ChainApplied",
                "UnitCopy", "UnitTaken",
            ),
            "sender",
        ),
        "Register": "origin",
    }  # fmt: skip
