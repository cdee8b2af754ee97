"""How much one slow worker costs: rounds with one of four workers slowed four times, and with none.

Run from the root of the repository as ``python -m bench.stragglers``. Real processes whose compute
is a sleep, 16 slots; the time that leases take to adapt is left out. Three clusters: none slowed;
one slowed; one slowed with equal leases that never move, nor anybody helps. Prints a table and one
line of JSON. Ratios are what counts: the ideal is 1.25, and 4 with fixed leases.

With ``--virtual`` nothing is measured: the real cores run in simulated time, eight workers and 32
slots of 200 ms, in every mode, with leases that move and with fixed shares. A perceptron is trained
on scikit-learn's digits by what was applied: when it reached a loss, and how good it is in the end.
"""

import argparse
import json
import statistics
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path

from tests.support.processes import Cluster, Starter

SLEEPER = str(Path(__file__).with_name("sleeper.py"))
SLOTS, WORKERS, SLOWDOWN = 16, 4, 4
WINDOWS = 7
PATIENT: dict[str, object] = {"heartbeat_ms": 500, "dead_after_ms": 2_000}  # the defaults


@dataclass(frozen=True)
class Case:
    """One cluster to measure."""

    name: str
    slowdown: int
    faults: list[str]
    adapting_s: float = 4.0


CASES = (
    Case("none slowed", 1, []),
    Case("one slowed", SLOWDOWN, []),
    Case("one slowed, fixed equal leases", SLOWDOWN, ["equal_leases"], 0.5),
)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slot-ms", type=float, default=20.0, help="compute of one slot")
    parser.add_argument("--window", type=int, default=15, help="rounds that are averaged")
    parser.add_argument("--virtual", action="store_true", help="every mode, in simulated time")
    parser.add_argument("--rounds", type=int, default=100, help="that are simulated")
    parser.add_argument("--seeds", type=int, default=3, help="of what is simulated")
    parser.add_argument(
        "--picture", type=Path, default=None, help="where to draw what is simulated"
    )
    chosen = parser.parse_args()
    if chosen.virtual:
        simulate = import_module("bench._stragglers_virtual").simulate
        simulate(chosen.rounds, chosen.seeds, chosen.picture)
        return
    starter = Starter()
    try:
        found = {case.name: windows(starter, case, chosen) for case in CASES}
    finally:
        starter.close()
    usual = statistics.median(found[CASES[0].name])
    report: dict[str, object] = {"slot_ms": chosen.slot_ms, "simulated ratios": simulated()}
    print(f"{'':34}{'round':>10}{'windows from .. to':>24}{'ratio':>8}")
    for name, times in found.items():
        middle = statistics.median(times)
        spread = f"{min(times):8.1f} .. {max(times):.1f} ms"
        print(f"{name:34}{middle:7.1f} ms{spread:>24}{middle / usual:8.2f}")
        report[name] = {"round_ms": round(middle, 2), "windows_ms": [round(t, 2) for t in times]}
        report[f"{name}: ratio"] = round(middle / usual, 3)
    print(json.dumps(report))


def windows(starter: Starter, case: Case, chosen: argparse.Namespace) -> list[float]:
    """Milliseconds per round, averaged over each of some windows after the leases have settled."""
    slot_ms, window = chosen.slot_ms, chosen.window
    usual_ms = slot_ms * SLOTS / WORKERS
    rounds = int(case.adapting_s * 1e3 / usual_ms) + window * WINDOWS + 1
    settings = PATIENT | {"servers": 1, "workers": WORKERS, "slots": SLOTS}
    with Cluster(starter, settings, faults={"scheduler": case.faults}) as job:
        for rank in range(WORKERS):
            factor = case.slowdown if rank == WORKERS - 1 else 1
            job.worker(SLEEPER, f"--slot-ms={slot_ms * factor}", f"--rounds={rounds}")
        job.end()
    begun: dict[int, int] = {}
    for worker in job.workers:
        for words in worker.all(r"^round (\d+) at (\d+)$"):
            number, at_ns = map(int, words)
            begun[number] = min(begun.get(number, at_ns), at_ns)
    last = rounds - 1
    edges = [last - window * number for number in range(WINDOWS, -1, -1)]
    return [(begun[stop] - begun[start]) / 1e6 / window for start, stop in pairwise(edges)]


def simulated() -> dict[str, float] | None:
    """The same ratios in simulated time, if the simulator is here."""
    try:
        figure = import_module("tests.sim.stragglers").figure
    except ModuleNotFoundError:
        return None
    moves = {"as is": True, "fixed": False}
    return {name: round(figure(is_elastic).ratio, 3) for name, is_elastic in moves.items()}


if __name__ == "__main__":
    main()
