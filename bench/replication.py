"""What a second copy of every shard costs: the same job with one replica and with two.

    python -m bench.replication [--shape standard|small] [--optimizer sgd|adamw]
                                [--workers 2] [--servers 2] [--windows 5] [--steps 20]
                                [--lanes shared,tcp]

Run from the root of the repository. The work is that of `bench.dense`: 25 million float32
parameters, gradients ready, synchronous steps. Clusters with one and with two replicas stay and
take their windows in turns. ``of one`` is the speed with two replicas as a share of that with one;
the other columns say what all servers together spend per step, in ms of their time: folding,
stepping (a backup steps as its primary does) and publishing. What is left of the difference is
relaying and waiting. Everybody's final parameters are compared with torch's own. The last line is
JSON.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

from bench._dense_work import TOLERANCES, Work, parser, reference, work_of
from bench._harness import (
    SETTLE_STEPS,
    Contender,
    Spread,
    Window,
    lane_flags,
    machine,
    opened,
    print_document,
    print_table,
    rates,
    ratio,
    staged,
    start,
    take_turns,
)
from bench.dense import check, treefold

REPLICAS = (1, 2)
KINDS = ("fold", "optimizer", "publish")
FLAGS: dict[str, dict[str, object]] = {
    "shared": {"transport": "ipc"} | lane_flags("auto"),
    "tcp": {"transport": "tcp"} | lane_flags("socket"),
}
Spent = dict[str, dict[str, float]]


def measure(work: Work, lane: str, windows: int, steps: int) -> dict[str, object]:
    """Measure one lane with one and with two replicas."""
    total = 2 + windows * (steps + SETTLE_STEPS)  # two come before the first window
    contenders = [
        treefold(work, f"{lane} {replicas}", FLAGS[lane] | {"replicas": replicas})
        for replicas in REPLICAS
    ]
    with staged() as stage:
        wanted = Path(stage.folder, "wanted")
        wanted.write_bytes(reference(work, total).numpy().data)
        with opened(contenders, stage):
            before = [spent_of(each) for each in contenders]
            found = take_turns(contenders, windows, steps)
            after = [spent_of(each) for each in contenders]
            errors = {each.name: each.question("error", str(wanted)) for each in contenders}
    check(errors, TOLERANCES[work.wire])
    per_step = [
        {kind: 1e3 * (late[kind] - early[kind]) / (total - 2) for kind in KINDS}
        for early, late in zip(before, after, strict=True)
    ]
    return document(lane, found, per_step, steps)


def spent_of(contender: Contender) -> dict[str, float]:
    """What all servers of a cluster together have spent so far, in seconds by kind."""
    servers = cast("Spent", contender.question("servers")[0])
    return {kind: sum(spent.get(kind, 0.0) for spent in servers.values()) for kind in KINDS}


def document(
    lane: str, found: dict[str, list[Window]], per_step: Sequence[dict[str, float]], steps: int
) -> dict[str, object]:
    """What is said of one lane."""
    one, two = (rates(found[f"{lane} {replicas}"], steps) for replicas in REPLICAS)
    return {
        "lane": lane,
        "one": Spread.of(one).document(),
        "two": Spread.of(two).document(),
        "of_one": round(ratio(two, one), 3),
        "step_ms": [round(1e3 / statistics.median(values), 1) for values in (one, two)],
        "server_ms_per_step": [
            {kind: round(value, 1) for kind, value in each.items()} for each in per_step
        ],
        "machine": machine(found),
    }


def show(found: Sequence[dict[str, object]]) -> None:
    """Print the table."""
    rows = []
    for each in found:
        times = cast("list[float]", each["step_ms"])
        spent = cast("list[dict[str, float]]", each["server_ms_per_step"])
        for number, replicas in enumerate(REPLICAS):
            of_one = str(each["of_one"]) if number else ""
            kinds = [f"{spent[number][kind]:.1f}" for kind in KINDS]
            rows.append([str(each["lane"]), str(replicas), f"{times[number]:.1f}", of_one, *kinds])
    titles = ["lane", "replicas", "ms/step", "of one", *(f"{kind} ms" for kind in KINDS)]
    print_table("one and two copies of every shard", titles, rows)


def main() -> None:
    """Measure, and print."""
    options = parser(__doc__ or "").parse_args()
    work = work_of(options)
    lanes = options.lanes.split(",")
    found = [measure(work, lane, options.windows, options.steps) for lane in lanes]
    show(found)
    print_document({"work": asdict(work), "lanes": found})


if __name__ == "__main__":
    start(main)
