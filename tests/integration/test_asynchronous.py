"""Asynchronous jobs of real processes: what they learn, count, and come back to."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import MEASURED
from tests.integration.jobs.whole_numbers import expected
from tests.integration.test_cli import QUICK, Shell, shell
from tests.integration.test_survival import found
from tests.support.exactness import complaints_one_by_one
from tests.support.processes import Cluster
from treefold.checkpoint.store import Store
from treefold.cli.main import USAGE

__all__ = ["shell"]

MakeCluster = Callable[..., Cluster]
BAND = 0.02  # of accuracy, beside that of one process
SLOWER = 8.0  # ms per loop body on the slow worker, where others take 2

COUNTING = """
import sys, time, torch
from torch import nn
import treefold.torch as ps
from torch.utils.data import TensorDataset

sys.path.insert(0, "ROOT")
from tests.integration.jobs.whole_numbers import KINDS, SLOTS, expected, gradient_of

ELEMENTS, ROUNDS, PASSES = 140_000, 12, 5
ps.init(slots=SLOTS)
gradients = torch.stack([gradient_of(kind, ELEMENTS) for kind in range(KINDS)]).float()
weights = nn.Linear(ELEMENTS, 1, bias=False)
nn.init.zeros_(weights.weight)
optimizer = ps.DistributedOptimizer(torch.optim.SGD(weights.parameters(), lr=1.0), weights)
kinds = TensorDataset(torch.arange(ROUNDS * SLOTS) % KINDS)
for epoch in range(PASSES):
    for (kind,) in ps.batches(kinds, batch_size=SLOTS, epoch=epoch):
        print("round", ps.round(), flush=True)
        time.sleep(PAUSE)
        optimizer.zero_grad()
        (weights.weight[0] * gradients[kind[0]]).sum().backward()
        optimizer.step()
found = weights.weight.detach()[0].to(torch.int64)
is_exact = torch.equal(found, PASSES * expected(ROUNDS * SLOTS, ELEMENTS))
print("sum", "exact" if is_exact else "wrong", flush=True)
"""
STALE = """
import sys, time
from pathlib import Path
import torch
from torch import nn
import treefold.torch as ps
from torch.utils.data import TensorDataset

FOLDER = Path(sys.argv[1])
ps.init(slots=2)
weights = nn.Linear(1, 1, bias=False)
nn.init.ones_(weights.weight)
inner = torch.optim.SGD(weights.parameters(), lr=0.125)
optimizer = ps.DistributedOptimizer(
    inner, weights, consistency="async", compensation=COMPENSATION
)


def wait_for(name):
    while not (FOLDER / name).exists():
        time.sleep(0.005)


for (number,) in ps.batches(TensorDataset(torch.arange(6)), batch_size=2, shuffle=False):
    slot, gradient = int(number[0]) % 2, 0.0
    if slot == 0 and ps.round() == 0:  # of version 0, applied to version 2
        (FOLDER / "begun").touch()
        wait_for("moved")
        gradient = 2.0
    elif slot == 1 and ps.round() < 2:
        wait_for("begun")
        gradient = -1.0
    elif slot == 1:
        (FOLDER / "moved").touch()
        wait_for("applied")
    else:
        (FOLDER / "applied").touch()
    print("computed", ps.round(), slot, flush=True)
    optimizer.zero_grad()
    (weights.weight * gradient).sum().backward()
    optimizer.step()
print("weight", weights.weight.item(), flush=True)
"""
ALIKE = """
import torch
from torch import nn
import treefold.torch as ps
from torch.utils.data import TensorDataset

HALF = 140_000  # both halves of the parameters get the same, in shards of their own
ps.init(slots=4)
model = nn.Linear(2 * HALF, 1, bias=False)
nn.init.zeros_(model.weight)
inner = torch.optim.SGD(model.parameters(), lr=1.0)
optimizer = ps.DistributedOptimizer(inner, model, consistency="async")
for epoch in range(3):
    data = TensorDataset(torch.arange(160))
    for (number,) in ps.batches(data, batch_size=4, epoch=epoch):
        half = (torch.arange(HALF) % 7 - 3) * int(number[0])
        optimizer.zero_grad()
        (model.weight[0] * torch.cat([half, half])).sum().backward()
        optimizer.step()
    own = model.weight.detach()[0].clone()
    for _ in range(8 if ps.rank() == 0 else 0):  # others are in the next pass by now
        read = ps.state_dict(consistent=True)["weight"][0]
        moved = "moved" if not read.equal(own) else "same"
        print("alike" if read[:HALF].equal(read[HALF:]) else "torn", moved, flush=True)
    assert model.weight.detach()[0].equal(own), "reading leaves the model as it is"
"""
PASS = 12 * 8  # contributions of a pass
SUM = r"worker-\d \| (sum .*)"


def counting(shell: Shell, pause_s: float, elements: int = 140_000) -> str:
    """A job whose parameters say which samples were counted, in five passes."""
    root = str(Path(__file__).parents[2])
    text = COUNTING.replace("ROOT", root).replace("PAUSE", str(pause_s))
    return shell.script(text.replace("140_000", str(elements)))


@pytest.fixture(scope="module")
def baseline() -> list[str]:
    """The accuracy that one process comes to, once it was measured."""
    return []


@pytest.mark.data
@pytest.mark.parametrize("consistency", ["sync", "quorum", "ssp", "async"])
def test_every_mode_learns_what_one_process_does_with_a_slow_worker_among_four(
    consistency: str,
    cluster: MakeCluster,
    data_dir: Path,
    baseline: list[str],
    pytestconfig: pytest.Config,
) -> None:
    command = ["clothes.py", f"--data={data_dir}"]
    if not baseline:
        with cluster(1, 1) as job:
            baseline.append(job.worker(*command, "--pause-ms=0").line(r"^accuracy (\S+) at")[1])
            job.end()
    (alone,) = baseline
    settings = {"staleness": 2, "quorum": 6, "grace": 0.1}
    with cluster(2, 4, consistency=consistency, **settings) as job:
        for pause_ms in (2.0, 2.0, 2.0, SLOWER):
            job.worker(*command, f"--pause-ms={pause_ms}")
        job.end()
        finals = {worker.line("^final (.*)$")[1] for worker in job.workers}
        told = [worker.line(r"^accuracy (\S+) at (\S+)") for worker in job.workers]
    assert len(finals) == 1, "workers left with different parameters"
    accuracy, rate = float(told[0][1]), min(float(line[2]) for line in told)
    assert abs(accuracy - float(alone)) <= BAND
    line = f"{consistency}, four workers, one slow: accuracy {accuracy}, one process {alone}"
    pytestconfig.stash.setdefault(MEASURED, []).append(f"{line}; {rate:.0f} samples/s")


@pytest.mark.parametrize("consistency", ["async", "ssp"])
def test_everything_counts_once_without_trouble_too(
    consistency: str, cluster: MakeCluster, tmp_path: Path
) -> None:
    folder, slow = str(tmp_path / "ledger"), tmp_path / "slow"
    settings = {"consistency": consistency, "staleness": 1}
    with cluster(3, 3, ledger=folder, **settings) as job:
        for _ in range(3):
            job.worker("whole_numbers.py", "--rounds=25", f"--slow={slow}")
        job.end()
        assert {worker.line("^final (.*)$")[1] for worker in job.workers} == {"exact"}
    assert complaints_one_by_one(folder, 25) == []
    assert complaints_one_by_one(folder, 26) != []


@pytest.mark.parametrize(
    ("compensation", "weight"),
    [
        ("'none'", 1 + 0.125 - 0.125),
        ("'lr-staleness'", 1 + 0.125 - 0.125 / 2),
        ("ps.DCASGD(strength=1)", 1 + 0.125 - 0.125 * (1 + 2 * 0.125)),
        ("ps.DCASGD(strength=1, adaptive=True)", 0.94223),
    ],
)
def test_a_stale_contribution_is_compensated_as_the_script_says(
    compensation: str, weight: float, shell: Shell
) -> None:
    script = shell.script(STALE.replace("COMPENSATION", compensation))
    run = shell.start("run", "--servers", "1", "--workers", "2", script, str(shell.folder))
    assert run.end() == 0, run.transcript()
    found = [float(text) for (text,) in run.all(r"weight (\S+)$")]
    assert found == pytest.approx([weight] * 2, abs=1e-5)


@pytest.mark.parametrize(("bound", "times"), [(1, 2), (2, 1)])
def test_what_is_too_stale_is_computed_again_and_counts_once(
    bound: int, times: int, shell: Shell
) -> None:
    text = STALE.replace('"async"', f"ps.Async(staleness_max={bound})")
    script = shell.script(text.replace("COMPENSATION", "'none'"))
    run = shell.start("run", "--servers", "1", "--workers", "2", script, str(shell.folder))
    assert run.end() == 0, run.transcript()
    assert len(run.all(r"computed (0) 0$")) == times
    found = [float(text) for (text,) in run.all(r"weight (\S+)$")]
    assert found == pytest.approx([1 + 0.125 - 0.125] * 2, abs=1e-6)


def test_all_shards_are_read_with_the_same_in_them_while_others_go_on(shell: Shell) -> None:
    run = shell.start("run", "--servers", "2", "--workers", "3", *QUICK, shell.script(ALIKE))
    assert run.end() == 0, run.transcript()
    found = run.all(r"\| (alike|torn) (moved|same)$")
    assert {how for how, _ in found} == {"alike"}
    assert "moved" in {moved for _, moved in found}, "nobody was in the next pass"
    assert len(found) == 3 * 8


def test_the_low_level_client_reads_all_shards_with_the_same_in_them(cluster: MakeCluster) -> None:
    with cluster(2, 4) as job:
        for _ in range(4):
            job.worker("alike.py")
        job.end()
        finals = {worker.line("^final (.*)$")[1] for worker in job.workers}
    assert finals == {"{'alike': 15}"}


def test_a_lost_server_takes_an_asynchronous_job_back_to_the_end_of_a_pass(shell: Shell) -> None:
    run = shell.start(
        "run", "--servers", "2", "--workers", "2", *QUICK, "--consistency", "async",
        "--server-dead-after-ms", "4000", "--checkpoint", str(shell.folder / "ckpt"),
        counting(shell, 0.01),
    )  # fmt: skip
    run.line(f"checkpoint of version {2 * PASS} is written")
    run.line(r"\| round 27$")
    found(shell, "server-0").kill()
    back = run.line(r"the job goes back to version (\d+): \d+ rounds are computed again")
    assert int(back[1]) % PASS == 0
    assert run.end() == 0, run.transcript()
    assert {text for (text,) in run.all(SUM)} == {"sum exact"}
    assert shell.left() == []


def test_an_asynchronous_job_goes_on_from_its_checkpoint_on_another_cluster(shell: Shell) -> None:
    folder = shell.folder / "ckpt"
    run = shell.start(
        "run", "--servers", "2", "--workers", "2", *QUICK, "--consistency", "ssp",
        "--checkpoint", str(folder), counting(shell, 0.01),
    )  # fmt: skip
    run.line(f"checkpoint of version {2 * PASS} is written")
    run.signal(signal.SIGINT)
    assert run.end() == 128 + signal.SIGINT
    assert not run.all(SUM), "the job was over before it was stopped"
    begun = Store(str(folder)).versions()[0]
    assert begun % PASS == 0
    verified = shell.run("checkpoint", "verify", str(folder))
    assert verified.returncode == 0, verified.stdout
    exported = shell.folder / "exported"
    made = shell.run("checkpoint", "export", str(folder), str(exported), "--format", "safetensors")
    assert made.returncode == 0, made.stderr
    (weights,) = load_file(exported).values()
    wanted = begun // PASS * expected(PASS, weights.numel())
    assert weights[0].to(torch.int64).equal(wanted)
    run = shell.start(
        "run", "--servers", "3", "--workers", "1", *QUICK, "--consistency", "ssp",
        "--resume", str(folder), counting(shell, 0.0),
    )  # fmt: skip
    assert run.end() == 0, run.transcript()
    assert {text for (text,) in run.all(SUM)} == {"sum exact"}
    first = min(int(number) for (number,) in run.all(r"\| round (\d+)"))
    assert first == begun // 8


def test_a_recorded_job_comes_to_the_same_bits_again(shell: Shell) -> None:
    tape, target = shell.folder / "run.tape", shell.folder / "exported"
    run = shell.start(
        "run", "--servers", "2", "--workers", "3", "--replicas", "2", *QUICK,
        "--consistency", "async", "--tape", str(tape),
        counting(shell, 0.03, elements=3_000),  # the server has to be back before the end
    )  # fmt: skip
    run.line(r"\| round 10$")
    found(shell, "server-0").kill()
    assert run.end() == 0, run.transcript()
    assert len(list(shell.folder.glob("run.tape.server-*"))) == 3, "one died, and came again"
    again = shell.run("replay", str(tape), "--export", str(target))
    assert again.returncode == 0, again.stdout + again.stderr
    assert f" {5 * PASS} " in again.stdout
    assert "the same bits as 2 servers had" in again.stdout
    (weights,) = load_file(target).values()
    assert weights[0].to(torch.int64).equal(5 * expected(PASS, weights.numel()))
    once_more = shell.run("run", "--tape", str(tape), str(shell.folder / "script.py"))
    assert once_more.returncode == USAGE
    assert "is of another run: move it, or choose another name" in once_more.stderr


def test_the_status_says_what_an_asynchronous_worker_waits_for(shell: Shell) -> None:
    root = str(Path(__file__).parents[2])
    body = COUNTING.replace("ROOT", root).replace("PAUSE", "0.01 if ps.rank() else 5.0")
    run = shell.start(
        "run", "--workers", "2", *QUICK, "--consistency", "ssp", "--staleness", "0",
        shell.script(body),
    )  # fmt: skip
    run.line(r"worker-0 \| round 0$")
    text = ""
    while "all slots up to round 0 of table model" not in text and run.status is None:
        text = shell.run("status").stdout
    assert run.status is None, run.transcript()
    (table,) = json.loads(shell.run("status", "--json").stdout)["tables"]
    assert table["consistency"] == "ssp(0)"
    assert table["staleness"]["worker-1"]["contributions"] > 0
    run.signal(signal.SIGINT)
    run.end()
