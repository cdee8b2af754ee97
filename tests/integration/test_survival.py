"""``treefold run --replicas 2`` as a person uses it: any process is killed, the bits stay."""

import json
import re

import psutil
import pytest

from tests.integration.test_cli import QUICK, Shell, shell
from tests.support.processes import Process

__all__ = ["shell"]

JOB = """
import hashlib, time, torch
import treefold.torch as ps
from torch.utils.data import TensorDataset

ps.init()
model = torch.nn.Linear(4, 1)
optimizer = ps.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=0.1), model)
dataset = TensorDataset(torch.arange(1280.0).view(320, 4) / 1280)
for epoch in range(2):
    for (x,) in ps.batches(dataset, batch_size=8, epoch=epoch):
        print("round", ps.round(), flush=True)
        time.sleep(0.02)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters()))
print("bits", digest.hexdigest())
"""
LAST = 79
SIZES = ("--servers", "2", "--workers", "2", "--replicas", "2")
JOINED = r"INFO (?:server|worker)-\d+ joined"
BITS = r"worker-\d \| bits (\w+)"


def begin_round(run: Process, number: int) -> None:
    """Wait until a worker is in a round."""
    run.line(rf"worker-\d \| round {number}$")


def found(shell: Shell, name: str) -> psutil.Process:
    """The process of one member as it is now, or the scheduler."""
    if name == "scheduler":
        mine = [p for p in shell.processes() if p.cmdline()[-2:] == ["treefold.cli", name]]
        return mine[0]
    asked = shell.run("status", "--json")
    assert asked.returncode == 0, asked.stderr
    members = json.loads(asked.stdout)["members"]
    [pid] = [m["pid"] for m in members if m["name"] == name and m["state"] == "live"]
    return psutil.Process(pid)


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """The bits of a run that nobody disturbs, once it was made."""
    return []


def undisturbed(shell: Shell, expected: list[str]) -> str:
    """The bits of one process with its own cluster."""
    if not expected:
        run = shell.run("run", shell.script(JOB.replace("time.sleep(0.02)", "")))
        assert run.returncode == 0, run.stdout
        expected += re.findall(BITS, run.stdout)
    return expected[0]


@pytest.mark.parametrize(
    ("name", "transport"), [("scheduler", "tcp"), ("server-0", "ipc"), ("worker-0", "ipc")]
)
def test_a_killed_process_is_started_again_and_the_bits_are_the_same(
    shell: Shell, expected: list[str], name: str, transport: str
) -> None:
    bits = undisturbed(shell, expected)
    kept = ("--journal", str(shell.folder / "kept")) if transport == "tcp" else ()
    run = shell.start("run", *SIZES, *QUICK, *kept, "--transport", transport, shell.script(JOB))
    begin_round(run, 5)
    found(shell, name).kill()
    run.line(rf"{name} was killed by SIGKILL: started again")
    is_scheduler = name == "scheduler"
    assert run.end() == 0, run.transcript()
    assert len(run.all(JOINED)) == 4 + (not is_scheduler), "who was killed did not come back"
    assert bool(run.all("goes on with view")) is is_scheduler
    assert {digest for (digest,) in run.all(BITS)} == {bits}, run.transcript()
    assert shell.left() == []


def test_one_after_the_other_is_killed_and_the_bits_are_the_same(
    shell: Shell, expected: list[str]
) -> None:
    bits = undisturbed(shell, expected)
    run = shell.start("run", *SIZES, *QUICK, shell.script(JOB))
    begin_round(run, 5)
    for number, name in enumerate(("server-0", "scheduler", "worker-1")):
        found(shell, name).kill()
        run.line(rf"{name} was killed by SIGKILL: started again")
        begin_round(run, 20 * (number + 1))
    assert run.end() == 0, run.transcript()
    assert {digest for (digest,) in run.all(BITS)} == {bits}, run.transcript()
    assert shell.left() == []


def test_a_worker_is_drained_and_the_others_go_on(shell: Shell, expected: list[str]) -> None:
    bits = undisturbed(shell, expected)
    run = shell.start("run", *SIZES, *QUICK, shell.script(JOB))
    begin_round(run, 5)
    asked = shell.run("drain", "worker-1")
    assert asked.returncode == 0, asked.stderr
    run.line("worker-1 left: drained")
    assert run.found(rf"worker-\d \| round {LAST}$") is None, "training was over before"
    assert run.end() == 0, run.transcript()
    assert [digest for (digest,) in run.all(BITS)] == [bits], run.transcript()
