"""Many seeds, each with a mix of its own, and none of them breaks a promise."""

import re
from collections import Counter

import pytest

from tests.sim.background import BATCHES, Background
from tests.sim.planted import folded_in_arrival_order
from tests.sim.runs import FAULTS, TALLY, Tally, each, tally

SAMPLE = range(400)
EXPECTED = (
    "Fenced", "Grant", "Flush", "RoundLate", "RoundStatus", "NormDecision", "Stop",
    "RoundHyper", "part before its version", "run", "torn", "lent", "shared", "busy", "loaded",
    "relayed", "retired", "streams", "died at work",
)  # fmt: skip


@pytest.mark.parametrize("batch", range(BATCHES))
def test_no_seed_breaks_a_promise(
    batch: int, background: Background, pytestconfig: pytest.Config
) -> None:
    found = Tally()
    for one in background.tallies(batch):
        found.add(one)
    pytestconfig.stash.setdefault(TALLY, Tally()).add(found)
    firsts = [story.splitlines()[0] for story in found.stories]
    assert not firsts, "\n".join([*firsts, "", "the first of them:", found.stories[0]])


def test_the_first_seeds_meet_every_fault_and_every_message_that_follows_from_one() -> None:
    met: Counter[str] = Counter()
    for report in each(SAMPLE):
        met.update(report.kinds)
    assert [kind for kind in (*FAULTS, *EXPECTED) if not met[kind]] == []


def test_a_failure_tells_seed_and_time_and_the_last_events(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folded_in_arrival_order(monkeypatch)
    (story,) = tally(range(20), 1).stories
    assert re.match(
        r"seed \d+ at \d+\.\d+ ms: table \d shard \d part \d round \d+ is folded to", story
    )
    assert "Received(peer=b'worker-" in story
