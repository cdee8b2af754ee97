"""Many seeds, each with a mix of its own, and none of them breaks a promise."""

import re
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
    "RoundHyper", "part before its version", "run", "torn", "lent", "shared", "busy",
)  # fmt: skip


def failures(seeds: range, count: int) -> list[str]:
    """The stories of the first seeds that break a promise."""
    found: list[str] = []
    for seed in seeds:
        try:
            simulate(draw(seed))
        except Violation as violation:
            found.append(str(violation))
        if len(found) == count:
            break
    return found


def test_no_seed_breaks_a_promise(seeds: range) -> None:
    found = failures(seeds, FAILURES_MAX)
    firsts = [story.splitlines()[0] for story in found]
    assert not found, "\n".join([*firsts, "", "the first of them:", found[0]])


def test_the_first_seeds_meet_every_fault_and_every_message_that_follows_from_one() -> None:
    met: Counter[str] = Counter()
    for seed in SAMPLE:
        met.update(simulate(draw(seed)).kinds)
    assert [kind for kind in EXPECTED if not met[kind]] == []


def test_a_failure_tells_seed_and_time_and_the_last_events(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folded_in_arrival_order(monkeypatch)
    (story,) = failures(range(20), 1)
    assert re.match(
        r"seed \d+ at \d+\.\d+ ms: table \d shard \d part \d round \d+ is folded to", story
    )
    assert "Received(peer=b'worker-" in story
