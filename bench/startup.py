"""How long ``treefold run`` takes to train one round of a tiny model, beside the import of torch.

    python bench/startup.py [--servers 2] [--workers 4] [--repeats 5]

Every repetition imports torch in one process, in as many processes at once as the cluster has
members that need it (servers and workers), and in one more (the scheduler, which does without), and
then runs the cluster. *Ready* is when the last process has torch, or the last worker its first
round; *gone* is when every process has ended. Processor seconds are those of all processes
together: on a busy machine they vary less. The table has medians and ranges, and below them how
much longer the run took than the imports of the same repetition. The last line is the same as JSON.
"""

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

WORKER = str(Path(__file__).with_name("first_round.py"))
PROBE = "import torch, time; print(f'ready at {time.monotonic_ns()}', flush=True)"
READY = re.compile(r"ready at (\d+)$", re.MULTILINE)
RUN = "treefold run"


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds from the start of one measurement until all was ready, and gone; and of processor."""

    ready: float
    gone: float
    cpu: float


def measure(commands: list[list[str]], ready: int) -> Sample:
    """Run commands at once.

    Parameters
    ----------
    commands : list of list of str
        What to run.
    ready : int
        How many processes are to say that they are ready.
    """
    before, began_ns = cpu_s(), time.monotonic_ns()
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    printed = "".join(process.communicate()[0] for process in running)
    gone_s = (time.monotonic_ns() - began_ns) / 1e9
    found = [int(at_ns) for at_ns in READY.findall(printed)]
    if len(found) != ready or any(process.returncode for process in running):
        sys.exit(f"{len(found)} of {ready} processes were ready:\n{printed}")
    return Sample((max(found) - began_ns) / 1e9, gone_s, cpu_s() - before)


def cpu_s() -> float:
    """Processor seconds of all processes that were started from here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def imports(count: int) -> Sample:
    """Import torch in so many processes at once."""
    return measure([[sys.executable, "-c", PROBE]] * count, count)


def run(servers: int, workers: int) -> Sample:
    """Train one round on a cluster."""
    command = [sys.executable, "-m", "treefold.cli", "run", f"--servers={servers}"]
    return measure([[*command, f"--workers={workers}", WORKER]], workers)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for key, value in {"servers": 2, "workers": 4, "repeats": 5}.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    chosen = parser.parse_args()
    members = chosen.servers + chosen.workers
    cases = {
        f"import torch, {count} at once": partial(imports, count)
        for count in (1, members, members + 1)
    }
    cases[RUN] = partial(run, chosen.servers, chosen.workers)
    imports(1)  # the files are in memory from now on
    found = [{name: case() for name, case in cases.items()} for _ in range(chosen.repeats)]
    report(found, vars(chosen))


def report(found: list[dict[str, Sample]], chosen: dict[str, int]) -> None:
    """Print the table and the JSON line."""
    columns = ("ready", "gone", "cpu")
    rows = {
        name: {key: [getattr(repeat[name], key) for repeat in found] for key in columns}
        for name in found[0]
    }
    beyond = {
        f"beyond {name}": {
            key: [a - b for a, b in zip(rows[RUN][key], rows[name][key], strict=True)]
            for key in columns
        }
        for name in list(rows)[:-1]
    }
    medians = {
        name: {key: round(statistics.median(values), 2) for key, values in row.items()}
        for name, row in (rows | beyond).items()
    }
    table = Table(title="seconds, medians and ranges")
    table.add_column("")
    for key in columns:
        table.add_column(key, justify="right")
    for name, row in (rows | beyond).items():
        texts = [f"{medians[name][k]:.2f}  {min(v):.2f} .. {max(v):.2f}" for k, v in row.items()]
        table.add_row(name, *texts)
    Console().print(table)
    print(json.dumps(chosen | {"seconds": medians, "samples": rows}))


if __name__ == "__main__":
    main()
