"""Rounds per second of a synchronous job, and where the time goes.

    python -m bench.rounds [--servers 2] [--workers 2] [--slots 8] [--parameters 1000000]
                           [--rounds 60] [--windows 5] [--lanes shared] [--picture FILE]

Starts a real cluster with ``treefold run`` and trains a multilayer perceptron of about so many
parameters on synthetic samples. After a warm-up, rounds are measured in windows; the table has the
median window and the spread, and the share of each member's time in compute, push, fold, pull and
waiting (workers) and fold, optimizer, publish and the rest (servers). A worker's fold runs beside
its computation, so that its shares may add up to more than the whole. The last line is the same as
JSON. ``--lanes shared,ipc,tcp`` measures one lane after the other, and ``--picture`` draws what
a round of each costs its members. Two runs on a busy machine can differ a lot: compare ratios
within one run.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

import torch
from rich.console import Console
from rich.table import Table

import treefold.torch as ps
from treefold.common.config import load
from treefold.torch import session
from treefold.transport.request import Requester
from treefold.wire.codec import decode, encode
from treefold.wire.messages import StatusReply, StatusRequest

MARK = "measured: "
WARM_UP_ROUNDS = 20  # leases settle and buffers are there
FEATURES = 256
BATCH = 256
LANES = {
    "shared": ["--transport", "ipc", "--lane", "auto"],
    "ipc": ["--transport", "ipc", "--lane", "socket"],
    "tcp": ["--transport", "tcp", "--lane", "socket"],
}
KINDS = ("compute", "push", "fold", "optimizer", "publish", "pull", "wait", "other")
BEAT_S = 1.0  # longer than a heartbeat, so that servers' figures are those of the end


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured."""

    servers: int
    workers: int
    slots: int
    parameters: int
    rounds: int
    windows: int


class Measured(TypedDict):
    """What one worker printed: seconds per window, and spent seconds by member and activity."""

    rank: int
    parameters: int
    windows_s: list[float]
    spent_s: dict[str, float]
    servers_s: dict[str, dict[str, float]]


def model_of(parameters: int) -> torch.nn.Sequential:
    """A perceptron with one hidden layer and about so many parameters."""
    hidden = max(1, parameters // (FEATURES + 10))
    return torch.nn.Sequential(
        torch.nn.Linear(FEATURES, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 10)
    )


def servers_spent() -> dict[str, dict[str, float]]:
    """What the servers' time went into so far, from the scheduler's status."""
    time.sleep(BEAT_S)
    requester = Requester(load({}).settings.scheduler)
    try:
        requester.send(encode(StatusRequest(1)))
        header = requester.receive(5_000)
    finally:
        requester.close()
    reply = None if header is None else decode(header)
    if not isinstance(reply, StatusReply):
        return {}
    members = json.loads(reply.body)["members"]
    return {m["name"]: m["spent_s"] for m in members if m["role"] == "server"}


def work(options: Options) -> None:
    """One worker: warm up, then measure window by window."""
    ps.init()
    model = model_of(options.parameters)
    optimizer = ps.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model)
    total = options.rounds * BATCH
    samples = torch.utils.data.TensorDataset(
        torch.randn(total, FEATURES), torch.randint(10, (total,))
    )
    client = session.current().client

    def train(epoch: int, rounds: int) -> float:
        began = time.perf_counter()
        for x, y in ps.batches(samples, batch_size=BATCH, epoch=epoch, max_rounds=rounds):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call] # torch's own has no types
            optimizer.step()
        return time.perf_counter() - began

    train(0, WARM_UP_ROUNDS)
    own, servers = dict(client.spent.ns), servers_spent() if ps.is_chief() else {}
    windows = [train(1 + number, options.rounds) for number in range(options.windows)]
    spent = {what: (ns - own.get(what, 0)) / 1e9 for what, ns in client.spent.ns.items()}
    if ps.is_chief():
        now = servers_spent()
        servers = {
            name: {what: s - servers.get(name, {}).get(what, 0.0) for what, s in spent_s.items()}
            for name, spent_s in now.items()
        }
    count = sum(parameter.numel() for parameter in model.parameters())
    measured = Measured(
        rank=ps.rank(), parameters=count, windows_s=windows, spent_s=spent, servers_s=servers
    )
    print(MARK + json.dumps(measured))


def run_cluster(options: Options, lane: str) -> list[Measured]:
    """Start the cluster and collect what its workers print."""
    command = [sys.executable, "-m", "treefold.cli", "run"]
    command += ["--servers", str(options.servers), "--workers", str(options.workers)]
    command += ["--slots", str(options.slots), "--log-level", "warning", *LANES[lane]]
    command += [__file__, "--as-worker"]
    command += [f"--{key}={value}" for key, value in asdict(options).items()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the cluster failed with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    lines = [line.split(MARK, 1)[1] for line in done.stdout.splitlines() if MARK in line]
    return sorted((json.loads(line) for line in lines), key=lambda measured: int(measured["rank"]))


def shares(spent_s: dict[str, float], total_s: float) -> dict[str, float]:
    """Fractions of the time, with what is left over as ``other``."""
    found = {what: round(s / total_s, 4) for what, s in sorted(spent_s.items())}
    return found | {"other": round(1 - sum(found.values()), 4)}


def main() -> None:
    """Measure and print, or be one of the workers that are measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = Options(servers=2, workers=2, slots=8, parameters=1_000_000, rounds=60, windows=5)
    for key, value in asdict(defaults).items():
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--lanes", default="shared", help=f"some of {','.join(LANES)}")
    parser.add_argument("--picture", help="where to draw what a round costs (SVG)")
    parser.add_argument("--as-worker", action="store_true", help=argparse.SUPPRESS)
    given = vars(parser.parse_args())
    is_worker, lanes, picture = given.pop("as_worker"), given.pop("lanes"), given.pop("picture")
    options = Options(**given)
    if is_worker:
        work(options)
        return
    bars: dict[str, dict[str, float]] = {}
    for lane in lanes.split(","):
        measured = run_cluster(options, lane)
        report(options, lane, measured)
        bars |= costs(options, lane, measured)
    if picture:
        from bench._picture import stacked_bars  # noqa: PLC0415 # workers run this file alone

        title = f"One round of {options.parameters:,} parameters, {options.slots} slots"
        Path(picture).write_text(stacked_bars(title, "ms", bars), encoding="utf-8")


def costs(options: Options, lane: str, measured: list[Measured]) -> dict[str, dict[str, float]]:
    """Milliseconds of one round, by activity, of the chief and of a server, the mean of all."""
    total_s = sum(measured[0]["windows_s"])
    workers = [measured[0]["spent_s"]]  # the chief: others also wait while it asks for figures
    servers = [spent for m in measured for spent in m["servers_s"].values()]
    found = {}
    for who, members in (("worker", workers), ("server", servers)):
        spent = {
            kind: sum(each.get(kind, 0.0) for each in members) / max(1, len(members))
            for kind in KINDS
        }
        # A worker's folds run beside its computation.
        beside = spent["fold"] if who == "worker" else 0.0
        spent["other"] = max(0.0, total_s + beside - sum(spent.values()))
        rounds = options.rounds * options.windows
        found[f"{lane}: {who}"] = {kind: 1e3 * s / rounds for kind, s in spent.items() if s > 0}
    return found


def report(options: Options, lane: str, measured: list[Measured]) -> None:
    """Print the table and the JSON line."""
    rates = [options.rounds / s for s in measured[0]["windows_s"]]
    total_s = sum(measured[0]["windows_s"])
    members = {f"worker-{m['rank']}": shares(m["spent_s"], total_s) for m in measured}
    for m in measured:
        members |= {name: shares(s, total_s) for name, s in m["servers_s"].items()}
    table = Table(title=f"{lane}: {statistics.median(rates):.1f} rounds/s")
    names = sorted({what for spent in members.values() for what in spent} - {"other"})
    for title in ("member", *names, "other"):
        table.add_column(title, justify="left" if title == "member" else "right")
    for name, spent in members.items():
        given = [spent.get(what) for what in (*names, "other")]
        table.add_row(name, *("" if part is None else f"{100 * part:.1f} %" for part in given))
    console = Console()
    console.print(table)
    document = asdict(options) | {
        "lane": lane,
        "parameters": measured[0]["parameters"],
        "rounds_per_s": round(statistics.median(rates), 2),
        "spread": [round(min(rates), 2), round(max(rates), 2)],
        "shares": members,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
