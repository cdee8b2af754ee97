"""What keys cost: the same job without them and with them.

    python -m bench.curve [--shape standard|small] [--optimizer sgd|adamw] [--workers 2]
                          [--servers 2] [--windows 5] [--steps 20] [--lanes shared,tcp]

Run from the root of the repository. The work is that of `bench.dense`: 25 million float32
parameters, gradients ready, synchronous steps. A cluster without keys and one with CURVE on every
connection stay and take their windows in turns. ``of plain`` is the speed with keys as a share of
that without: over TCP every tensor is encrypted, in shared memory none is, and only the messages
about them are. Everybody's final parameters are compared with torch's own. The last line is JSON.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

from bench._dense_work import TOLERANCES, Work, parser, reference, work_of
from bench._harness import (
    SETTLE_STEPS,
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
from treefold.transport.keys import generate, write_allowed, write_key
from treefold.wire.permissions import KeyRole

PLAIN, KEYED = "plain", "keys"
FLAGS: dict[str, dict[str, object]] = {
    "shared": {"transport": "ipc"} | lane_flags("auto"),
    "tcp": {"transport": "tcp"} | lane_flags("socket"),
}


def measure(work: Work, lane: str, windows: int, steps: int) -> dict[str, object]:
    """Measure one lane without keys and with them."""
    total = 2 + windows * (steps + SETTLE_STEPS)  # two come before the first window
    with staged() as stage:
        folder = keys_in(Path(stage.folder, "folder-of-keys"))
        contenders = [
            treefold(work, PLAIN, FLAGS[lane]),
            treefold(work, KEYED, FLAGS[lane] | {"keys": str(folder)}),
        ]
        wanted = Path(stage.folder, "wanted")
        wanted.write_bytes(reference(work, total).numpy().data)
        with opened(contenders, stage):
            found = take_turns(contenders, windows, steps)
            errors = {each.name: each.question("error", str(wanted)) for each in contenders}
    check(errors, TOLERANCES[work.wire])
    return document(lane, found, steps)


def keys_in(folder: Path) -> Path:
    """A folder with a key for each role."""
    folder.mkdir(mode=0o700)
    made = [generate(role, role.value) for role in KeyRole]
    for key in made:
        write_key(folder, key)
    write_allowed(folder, [key.entry for key in made])
    return folder


def document(lane: str, found: dict[str, list[Window]], steps: int) -> dict[str, object]:
    """What is said of one lane."""
    plain, keyed = (rates(found[name], steps) for name in (PLAIN, KEYED))
    return {
        "lane": lane,
        "plain": Spread.of(plain).document(),
        "keys": Spread.of(keyed).document(),
        "of_plain": round(ratio(keyed, plain), 3),
        "step_ms": [round(1e3 / statistics.median(values), 1) for values in (plain, keyed)],
        "machine": machine(found),
    }


def show(found: Sequence[dict[str, object]]) -> None:
    """Print the table."""
    rows = []
    for each in found:
        times = cast("list[float]", each["step_ms"])
        for number, name in enumerate((PLAIN, KEYED)):
            of_plain = str(each["of_plain"]) if number else ""
            rows.append([str(each["lane"]), name, f"{times[number]:.1f}", of_plain])
    print_table("without keys and with them", ["lane", "", "ms/step", "of plain"], rows)


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
