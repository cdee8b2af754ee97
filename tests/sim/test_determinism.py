"""A seed is all that a run depends on: not the process, not the hashes of its strings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.cluster import simulate
from tests.sim.drawing import draw

ROOT = Path(__file__).parent.parent.parent
PATHS = os.pathsep.join([str(ROOT), *sys.path])  # the same cores as here, wherever they are from
SEEDS = range(10)
HASH_SEEDS = ("1", "2")
TRACES = """
import sys
from treefold.scheduler import leases
from tests.sim.cluster import simulate
from tests.sim.drawing import draw
traces = lambda: " ".join(simulate(draw(seed), is_traced=True).trace for seed in range(10))
careful, lay_out = traces(), leases.lay_out
leases.lay_out = lambda given: sorted(lay_out(given), key=lambda who: hash(str(who)))
sys.stdout.write(careful + "\\n" + traces())
"""


@pytest.fixture(scope="module")
def traces() -> list[list[str]]:
    """Per hash seed: traces of the first seeds, and the same with cores that read hash order."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TRACES],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": PATHS, "PATH": ""},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for hash_seed in HASH_SEEDS
    ]
    return [process.communicate(timeout=240)[0].splitlines() for process in started]


def test_two_runs_of_one_seed_leave_one_trace() -> None:
    first = [simulate(draw(seed), is_traced=True).trace for seed in SEEDS]
    assert first == [simulate(draw(seed), is_traced=True).trace for seed in SEEDS]


def test_two_seeds_leave_two_traces() -> None:
    assert len({simulate(draw(seed), is_traced=True).trace for seed in SEEDS}) == len(SEEDS)


def test_processes_with_other_hash_seeds_leave_the_trace_of_this_one(
    traces: list[list[str]],
) -> None:
    here = " ".join(simulate(draw(seed), is_traced=True).trace for seed in SEEDS)
    assert [careful for careful, _ in traces] == [here] * len(HASH_SEEDS)


def test_cores_that_read_hash_order_leave_another_trace_under_another_hash_seed(
    traces: list[list[str]],
) -> None:
    assert len({careless for _, careless in traces}) == len(HASH_SEEDS)
