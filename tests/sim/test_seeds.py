"""Many seeds, each with a mix of its own, and none of them breaks a promise."""

from collections import Counter

import pytest

from tests.sim.cluster import simulate
from tests.sim.planted import folded_in_arrival_order
from tests.sim.scenario import draw
from tests.sim.world import Violation

FAILURES_MAX = 10  # enough to see a pattern
SAMPLE = range(120)
EXPECTED = (
    "CRASH", "FREEZE", "PARTITION", "RECONNECT", "DRAIN", "network",
    "Fenced", "Grant", "Flush", "RoundLate", "RoundStatus", "NormDecision", "Stop",
)  # fmt: skip


def test_no_seed_breaks_a_promise(seeds: range) -> None:
    failures: list[str] = []
    for seed in seeds:
        try:
            simulate(draw(seed))
        except Violation as violation:
            failures.append(str(violation))
        if len(failures) == FAILURES_MAX:
            break
    firsts = [failure.splitlines()[0] for failure in failures]
    assert not failures, "\n".join([*firsts, "", "the first of them:", failures[0]])


def test_the_first_seeds_meet_every_fault_and_every_message_that_follows_from_one() -> None:
    met: Counter[str] = Counter()
    for seed in SAMPLE:
        met.update(simulate(draw(seed)).kinds)
    assert [kind for kind in EXPECTED if not met[kind]] == []


def test_a_failure_tells_seed_and_time_and_the_last_events(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folded_in_arrival_order(monkeypatch)
    with pytest.raises(Violation) as failure:
        simulate(draw(0))
    story = str(failure.value)
    assert story.startswith("seed 0 at ")
    assert "is folded to" in story
    assert "Received(peer=b'worker-" in story
