"""What it costs to look at every slot's gradient before it counts.

    python -m bench.health [--shape standard|small] [--optimizer sgd|adamw] [--workers 2]
                           [--servers 2] [--windows 5] [--steps 20] [--lanes shared,tcp]
                           [--policies off,warn,reject]

Run from the root of the repository. The work is that of `bench.dense`: 25 million float32
parameters, gradients ready, synchronous steps, one slot per worker. Clusters with each policy stay
and take their windows in turns. ``of off`` is the speed as a share of that without a policy. The
other columns say what all servers together spend per step, in ms of their time: on looking at
gradients, folding, stepping and publishing. ``more`` is how much more all of that is than without a
policy. The last table has what is done to parts of 1 MiB alone, and as multiples of a fold. The
last line is JSON.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch

from bench._dense_work import CHUNK, TOLERANCES, Work, parser, reference, work_of
from bench._harness import (
    SETTLE_STEPS,
    Contender,
    Spread,
    Window,
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
from bench.replication import FLAGS
from treefold.common.fold import Folder, Payload
from treefold.common.layout import Layout
from treefold.common.spec import Dtype, OptimizerSpec, Placement, Rule, TableSpec, TensorSpec
from treefold.server.products import Products, trimmed_mean

KINDS = ("health", "fold", "optimizer", "publish")
ALONE_REPEATS = 200
SLOTS = 8  # of the rules that are measured alone


def measure(
    work: Work, lane: str, policies: Sequence[str], windows: int, steps: int
) -> dict[str, object]:
    """Measure one lane with each policy."""
    total = 2 + windows * (steps + SETTLE_STEPS)  # two come before the first window
    contenders = [
        treefold(work, f"{lane} {policy}", FLAGS[lane] | {"health": policy}) for policy in policies
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
    return document(lane, policies, found, per_step, steps)


def spent_of(contender: Contender) -> dict[str, float]:
    """What all servers of a cluster together have spent so far, in seconds by kind."""
    servers = cast("dict[str, dict[str, float]]", contender.question("servers")[0])
    return {kind: sum(spent.get(kind, 0.0) for spent in servers.values()) for kind in KINDS}


def document(
    lane: str,
    policies: Sequence[str],
    found: dict[str, list[Window]],
    per_step: Sequence[dict[str, float]],
    steps: int,
) -> dict[str, object]:
    """What is said of one lane."""
    speeds = [rates(found[f"{lane} {policy}"], steps) for policy in policies]
    sums = [sum(each.values()) for each in per_step]
    return {
        "lane": lane,
        "policies": list(policies),
        "steps_per_s": [Spread.of(values).document() for values in speeds],
        "of_first": [round(ratio(values, speeds[0]), 3) for values in speeds],
        "step_ms": [round(1e3 / statistics.median(values), 1) for values in speeds],
        "ms_per_step": [{k: round(v, 2) for k, v in each.items()} for each in per_step],
        "more": [round(each / sums[0] - 1, 3) for each in sums],
        "machine": machine(found),
    }


def show(found: Sequence[dict[str, object]]) -> None:
    """Print the table of lanes."""
    rows = []
    for each in found:
        spent = cast("list[dict[str, float]]", each["ms_per_step"])
        shares = cast("list[float]", each["of_first"])
        speeds = cast("list[dict[str, float]]", each["steps_per_s"])
        more = cast("list[float]", each["more"])
        for number, policy in enumerate(cast("list[str]", each["policies"])):
            speed = speeds[number]
            rate = f"{speed['median']:.1f} ({speed['min']:.1f} to {speed['max']:.1f})"
            kinds = [f"{spent[number][kind]:.1f}" for kind in KINDS]
            of_off, servers = f"{shares[number]:.3f}", f"{more[number]:+.0%}"
            rows.append([str(each["lane"]), policy, rate, of_off, *kinds, servers])
    titles = ["lane", "policy", "steps/s", "of off", *(f"{one} ms" for one in KINDS), "more"]
    print_table("looking at every gradient", titles, rows)


# ---- alone ---------------------------------------------------------------------------------------


def alone() -> dict[str, dict[str, float]]:
    """Microseconds that each thing takes which is done with parts of 1 MiB."""
    torch.set_num_threads(1)
    tensor = TensorSpec("w", [CHUNK], Dtype.FLOAT32, 0)
    optimizer = OptimizerSpec("SGD", [{"lr": 0.1}])
    spec = TableSpec("t", Rule.OPTIMIZER, Placement.ELEMENTWISE, [tensor], optimizer)
    products, folder, part = Products(Layout(spec)), Folder(), (0, CHUNK)
    rows = [torch.randn(CHUNK) for _ in range(SLOTS)]
    left, right, out = Payload(rows[0]), Payload(rows[1]), torch.empty(CHUNK)
    timed: dict[str, Callable[[], object]] = {
        "fold": lambda: folder.fold(left, right, out),
        "measure": lambda: products.of(part, rows[:1]),
        f"median of {SLOTS}": lambda: trimmed_mean([row.clone() for row in rows], 3),
        f"pairs of {SLOTS}": lambda: products.of(part, rows),
    }
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(ALONE_REPEATS):
        for name, work in timed.items():
            began = time.perf_counter()
            work()
            samples[name].append(1e6 * (time.perf_counter() - began))
    return {name: Spread.of(values).document(1) for name, values in samples.items()}


def show_alone(found: dict[str, dict[str, float]]) -> None:
    """Print the table of what is measured alone."""
    rows = []
    for name, spread in found.items():
        slots = SLOTS if name.endswith(str(SLOTS)) else 1
        of_fold = spread["median"] / found["fold"]["median"] / slots
        rows.append([name, f"{spread['median']:.0f}", f"{spread['min']:.0f}", f"{of_fold:.2f}"])
    titles = ["of parts of 1 MiB", "median us", "least us", "of a fold, per slot"]
    print_table("alone, in one thread", titles, rows)


def main() -> None:
    """Measure, and print."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--policies", default="off,warn,reject")
    options = arguments.parse_args()
    work = work_of(options)
    policies = options.policies.split(",")
    lanes = options.lanes.split(",")
    found = [measure(work, lane, policies, options.windows, options.steps) for lane in lanes]
    show(found)
    kernels = alone()
    show_alone(kernels)
    print_document({"work": asdict(work), "lanes": found, "alone_us": kernels})


if __name__ == "__main__":
    start(main)
