"""What a peer that floods a listener gets in return."""

import pytest

from treefold.transport import budgets
from treefold.transport.budgets import PATIENCE, Budget, Purse
from treefold.transport.loop import Loop
from treefold.transport.outbox import Outbox
from treefold.transport.sockets import Arrival, Hub
from treefold.wire.codec import encode
from treefold.wire.exchange import Received, Tick
from treefold.wire.messages import Refused, StatusRequest, Stop
from treefold.wire.words import Code, Outcome

REFUSAL = Refused(0, Code.BAD_MESSAGE, "")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A clock to set, in nanoseconds."""
    now = [0]
    monkeypatch.setattr(budgets, "monotonic_ns", lambda: now[0])
    return now


def given(purse: Purse, peer: bytes, times: int) -> int:
    return sum(purse.allows(peer, REFUSAL) for _ in range(times))


def test_a_peer_gets_so_many_refusals_at_once_and_then_so_many_in_a_second(
    clock: list[int],
) -> None:
    purse = Purse({Refused: Budget(5, 2)})
    assert given(purse, b"one", 100) == 5
    clock[0] += 2_000_000_000
    assert given(purse, b"one", 100) == 4
    assert purse.withheld == 191


def test_what_one_peer_has_used_up_another_one_has_still(clock: list[int]) -> None:
    del clock
    purse = Purse({Refused: Budget(5, 2)})
    given(purse, b"one", 100)
    assert given(purse, b"two", 100) == 5


def test_what_has_no_budget_is_never_withheld() -> None:
    purse = Purse({Refused: Budget(0, 0)})
    assert purse.allows(b"one", Stop(Outcome.DONE, ""))
    assert not purse.allows(b"one", REFUSAL)


def test_a_loop_does_not_even_decode_what_comes_from_who_was_refused_too_often(
    clock: list[int],
) -> None:
    hub, core = Hub(), Collector()
    loop: Loop[Received, Tick] = Loop(hub, Outbox(hub), core, lambda _: [])
    wrong, right = arrival(b"bad", b"\xc1"), arrival(b"bad", encode(StatusRequest(1)))
    tries = PATIENCE.burst + 500
    for _ in range(tries):
        list(loop._decode(wrong))
    assert (loop.refused, loop.ignored) == (PATIENCE.burst, 500)
    assert list(loop._decode(right)) == []
    assert list(loop._decode(arrival(b"good", encode(StatusRequest(1)))))
    clock[0] += 1_000_000_000
    assert list(loop._decode(right))
    hub.close()


def arrival(sender: bytes, header: bytes) -> Arrival:
    return Arrival("listener", sender, header, [])


class Collector:
    """A core that does nothing."""

    def handle(self, now_ns: int, event: object) -> list[Tick]:
        del now_ns, event
        return []

    def next_deadline_ns(self) -> int | None:
        return None


def test_only_so_many_peers_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "PEERS_MAX", 10)
    purse = Purse({Refused: Budget(1, 0)})
    for number in range(1_000):
        purse.allows(b"%d" % number, REFUSAL)
    assert len(purse._left) == 10
