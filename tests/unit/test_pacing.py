"""The cap on a lane: rate, order, and connections apart, by a clock of the test."""

from collections.abc import Callable

from treefold.transport.pacing import Pacer

MS = 1_000_000


def run(pacer: Pacer, until_ns: int, late_ns: int = 0) -> None:
    """Pump at every deadline, each time so late."""
    pacer.pump(0)
    while (due_ns := pacer.next_deadline_ns()) is not None and due_ns <= until_ns:
        pacer.pump(due_ns + late_ns)


def noted(log: list[str], name: str) -> Callable[[], None]:
    """Sends that are written down."""
    return lambda: log.append(name)


def test_a_message_arrives_when_its_bytes_have_had_their_time() -> None:
    pacer, log = Pacer(1_000_000), list[str]()
    pacer.add("a", (0,), 1_000, noted(log, "one"))
    pacer.pump(5 * MS)
    assert (log, pacer.next_deadline_ns()) == ([], 6 * MS)
    pacer.pump(6 * MS - 1)
    assert log == []
    pacer.pump(6 * MS)
    assert (log, pacer.next_deadline_ns()) == (["one"], None)


def test_the_rate_is_kept_though_the_thread_is_late() -> None:
    pacer, times = Pacer(1_000_000), list[int]()
    now = [0]
    for _ in range(10):
        pacer.add("a", (0,), 1_000, lambda: times.append(now[0]))
    pacer.pump(0)
    while (due_ns := pacer.next_deadline_ns()) is not None:
        now[0] = due_ns + MS // 3
        pacer.pump(now[0])
    assert times == [(number + 1) * MS + MS // 3 for number in range(10)]


def test_idle_time_is_not_saved_up() -> None:
    pacer, log = Pacer(1_000_000), list[str]()
    pacer.add("a", (0,), 1_000, noted(log, "one"))
    run(pacer, 10 * MS)
    pacer.add("a", (0,), 1_000, noted(log, "two"))
    pacer.pump(100 * MS)
    assert pacer.next_deadline_ns() == 101 * MS


def test_the_least_priority_goes_first_but_does_not_break_off_what_is_leaving() -> None:
    pacer, log = Pacer(1_000_000), list[str]()
    pacer.add("a", (1, 7), 1_000, noted(log, "leaving"))
    pacer.pump(0)
    for place in [(1, 6), (1, 2), (0, 9), (1, 2)]:
        pacer.add("a", place, 1_000, noted(log, str(place)))
    run(pacer, 100 * MS)
    assert log == ["leaving", "(0, 9)", "(1, 2)", "(1, 2)", "(1, 6)"]


def test_connections_do_not_share_the_cap() -> None:
    pacer, log = Pacer(1_000_000), list[str]()
    for lane in ("a", "b"):
        pacer.add(lane, (0,), 1_000, noted(log, lane))
    pacer.pump(0)
    pacer.pump(MS)
    assert sorted(log) == ["a", "b"]


def test_what_a_send_adds_waits_its_turn() -> None:
    pacer, log = Pacer(1_000_000), list[str]()

    def first() -> None:
        log.append("first")
        pacer.add("a", (0,), 1_000, noted(log, "second"))

    pacer.add("a", (0,), 1_000, first)
    run(pacer, MS)
    assert (log, pacer.next_deadline_ns()) == (["first"], 2 * MS)


def test_no_cap_is_off() -> None:
    assert not Pacer(0).is_on
    assert Pacer(1).is_on
