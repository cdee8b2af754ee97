"""``treefold run --timeline``: one file with a lane for every thread of every process."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.integration.test_cli import Shell, shell

__all__ = ["shell"]

JOB = """
import torch
import treefold.torch as ps
from torch.utils.data import TensorDataset

ps.init()
model = torch.nn.Linear(4, 1)
optimizer = ps.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=0.1), model)
dataset = TensorDataset(torch.arange(640.0).view(160, 4) / 640)
for (x,) in ps.batches(dataset, batch_size=8, epoch=0):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
"""
ROUNDING_US = 0.01
EXPECTED = {
    ("scheduler", "exchange"): {"heartbeat", "register", "declare", "wait"},
    ("server-0", "exchange"): {"push", "fold", "optimizer", "publish", "pull", "hyper", "wait"},
    ("worker-0", "exchange"): {"push", "fold", "pull", "wait"},
    ("worker-1", "exchange"): {"push", "fold", "pull", "wait"},
    ("worker-0", "training"): {"compute", "push", "pull", "wait"},
    ("worker-1", "training"): {"compute", "push", "pull", "wait"},
}
Event = dict[str, Any]  # JSON


def lanes(events: list[Event]) -> dict[tuple[str, str], list[Event]]:
    """The spans of each thread, by the names of its process and its own, outer ones first."""
    names = {}
    for event in events:
        if event["ph"] == "M":
            key = (event["pid"], event["tid"] if event["name"] == "thread_name" else 0)
            names[key] = event["args"]["name"]
    found: dict[tuple[str, str], list[Event]] = {}
    for event in events:
        if event["ph"] == "X":
            lane = names[event["pid"], 0], names[event["pid"], event["tid"]]
            found.setdefault(lane, []).append(event)
    for spans in found.values():
        spans.sort(key=lambda span: (span["ts"], -span["dur"]))
    return found


def nested(spans: list[Event]) -> Iterator[tuple[Event, Event | None]]:
    """Every span of a lane with the one that it lies in; fails if two overlap otherwise."""
    open_: list[Event] = []
    for span in spans:
        while open_ and open_[-1]["ts"] + open_[-1]["dur"] <= span["ts"] + ROUNDING_US:
            open_.pop()
        if open_:
            end = open_[-1]["ts"] + open_[-1]["dur"]
            assert span["ts"] + span["dur"] <= end + ROUNDING_US, (span, open_[-1])
        yield span, open_[-1] if open_ else None
        open_.append(span)


def test_a_run_writes_a_timeline_with_every_kind_of_span_in_every_lane(
    shell: Shell, tmp_path: Path
) -> None:
    file = tmp_path / "run.json"
    words = ("--workers", "2", "--slots", "8", "--timeline", str(file), shell.script(JOB))
    run = shell.run("run", *words)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"timeline of 4 processes in {file}" in run.stdout + run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    found = lanes(json.loads(file.read_text())["traceEvents"])
    for lane, kinds in EXPECTED.items():
        assert kinds <= {span["name"] for span in found[lane]}, lane
    parents: dict[tuple[str, str], set[str]] = {}
    for lane, spans in found.items():
        for span, parent in nested(spans):
            if parent is not None:
                parents.setdefault((lane[0], span["name"]), set()).add(parent["name"])
    assert parents["server-0", "fold"] == {"push"}
    assert parents["server-0", "optimizer"] <= {"push", "hyper"}
    assert parents["worker-0", "fold"] == {"push"}
    computed = [
        (span["args"]["round"], span["args"]["slot"])
        for (_, lane), spans in found.items()
        for span in spans
        if lane == "training" and span["name"] == "compute"
    ]
    assert set(computed) == {(number, slot) for number in range(20) for slot in range(8)}
