"""Data shards in jobs of real processes: each sample once, whoever dies; who reads how much."""

import pytest

from tests.integration.test_cli import QUICK, Shell, shell
from tests.integration.test_survival import found

__all__ = ["shell"]

READING = """
import time, torch
from torch import nn
import treefold.torch as ps

SLOTS = 16
SIZES, PASSES, BATCH = [3 + number % 7 for number in range(40)], 2, 2
FIRST = [sum(SIZES[:number]) for number in range(len(SIZES))]
ps.init(slots=SLOTS)
counts = nn.Linear(sum(SIZES), 1, bias=False)
nn.init.zeros_(counts.weight)
optimizer = ps.DistributedOptimizer(torch.optim.SGD(counts.parameters(), lr=1.0), counts)


def load(number, start):
    for sample in range(start, SIZES[number]):
        yield FIRST[number] + sample


slow, batches = SLOW, 0
for epoch in range(PASSES):
    shards = ps.data_shards(
        range(len(SIZES)), BATCH * SLOTS, epoch, load=load, sizes=SIZES, policy="POLICY"
    )
    for shard in shards:
        print("visit", epoch, shard.number, flush=True)
        for samples in shard:
            batches += 1
            time.sleep(0.04 if slow else 0.01)
            optimizer.zero_grad()
            share = len(samples) / shards.plan.round_samples(ps.round())
            (counts.weight[0, samples].sum() / share).backward()
            optimizer.step()
once = torch.round(counts.weight.detach()[0] * 1000) == -1000 * PASSES
print("batches", batches, "once" if bool(once.all()) else counts.weight.tolist(), flush=True)
"""


def reading(shell: Shell, policy: str = "predictive", slow: str = "False") -> str:
    """A job whose parameters say how often each sample of 40 files was counted."""
    return shell.script(READING.replace("POLICY", policy).replace("SLOW", slow))


@pytest.mark.parametrize("consistency", ["sync", "async"])
def test_every_sample_of_every_file_counts_once_when_a_worker_dies(
    consistency: str, shell: Shell
) -> None:
    run = shell.start(
        "run", "--servers", "2", "--workers", "3", *QUICK, "--max-restarts", "1",
        "--consistency", consistency, reading(shell),
    )  # fmt: skip
    run.line(r"worker-1 \| visit 0 \d+$")
    found(shell, "worker-1").kill()
    assert run.end() == 0, run.transcript()
    assert {text for (text,) in run.all(r"batches \d+ (.*)$")} == {"once"}
    assert shell.left() == []


@pytest.mark.parametrize(
    ("policy", "least", "most"),
    [("static", 0.4, 0.6), ("queue", 0.0, 0.38)],
)
def test_a_policy_decides_how_much_a_slow_worker_reads(
    policy: str, least: float, most: float, shell: Shell
) -> None:
    """It takes four times as long as the other one for each batch."""
    script = reading(shell, policy, "ps.rank() == 1")
    run = shell.start(
        "run", "--workers", "2", *QUICK, "--slots", "16", "--consistency", "async", script
    )
    assert run.end() == 0, run.transcript()
    told = {rank: int(text) for rank, text in run.all(r"worker-(\d) \| batches (\d+) once$")}
    assert least <= told["1"] / sum(told.values()) <= most
