"""A seed is all that a run depends on: not the process, not the hashes of its strings."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.cluster import simulate
from tests.sim.scenario import draw

ROOT = Path(__file__).parent.parent.parent
SEEDS = range(10)
TRACES = """
import sys
from treefold.scheduler import leases
from tests.sim.cluster import simulate
from tests.sim.scenario import draw
if sys.argv[1] == "careless":
    whole = leases.lay_out
    leases.lay_out = lambda given: sorted(whole(given), key=lambda who: hash(str(who)))
sys.stdout.write(" ".join(simulate(draw(seed)).trace for seed in range(10)))
"""


def traces(kind: str, hash_seed: str) -> list[str]:
    """Traces of the first seeds in a process of its own."""
    environment = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", TRACES, kind],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    return done.stdout.split()


def test_two_runs_of_one_seed_leave_one_trace() -> None:
    assert [simulate(draw(seed)).trace for seed in SEEDS] == [
        simulate(draw(seed)).trace for seed in SEEDS
    ]


def test_two_seeds_leave_two_traces() -> None:
    assert len({simulate(draw(seed)).trace for seed in SEEDS}) == len(SEEDS)


@pytest.mark.slow
def test_two_processes_with_other_hash_seeds_leave_one_trace() -> None:
    here = [simulate(draw(seed)).trace for seed in SEEDS]
    assert traces("careful", "1") == here
    assert traces("careful", "2") == here


@pytest.mark.slow
def test_a_core_that_reads_hash_order_leaves_another_trace_under_another_hash_seed() -> None:
    assert traces("careless", "1") != traces("careless", "2")
