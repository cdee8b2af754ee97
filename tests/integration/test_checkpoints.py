"""Checkpoints as a person uses them: a job that is stopped, or loses a server, keeps its bits."""

import re
import signal
from pathlib import Path

import pytest

from tests.integration.test_cli import QUICK, Shell, shell
from tests.integration.test_survival import found
from tests.support.processes import Process
from treefold.checkpoint.store import Store
from treefold.common.failpoints import POINTS

__all__ = ["shell"]

JOB = """
import hashlib, sys, time, torch
from torch import nn
import treefold.torch as ps
from torch.utils.data import TensorDataset

ps.init()
model = nn.Sequential(
    nn.Linear(4, 300), nn.BatchNorm1d(300), nn.ReLU(), nn.Dropout(0.2),
    nn.Linear(300, 700), nn.Linear(700, 1)
)
model[4].bias.requires_grad_(False)
trained = [p for p in model.parameters() if p.requires_grad]
inner = torch.optim.AdamW(trained, lr=0.01)
optimizer = ps.DistributedOptimizer(inner, model)
schedule = torch.optim.lr_scheduler.StepLR(inner, step_size=7, gamma=0.7)
dataset = TensorDataset(torch.arange(2560.0).view(640, 4) / 2560)
for epoch in range(2):
    for (x,) in ps.batches(dataset, batch_size=16, epoch=epoch):
        print("round", ps.round(), flush=True)
        time.sleep(PAUSE)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        schedule.step()
values = [value.numpy().tobytes() for value in ps.state_dict().values()]
print("bits", hashlib.sha256(b"".join(values)).hexdigest(), schedule.get_last_lr(), flush=True)
if len(sys.argv) > 1 and ps.is_chief():
    ps.save(sys.argv[1])
"""
ROUNDS = 80
EVERY = ("--checkpoint-every", "10")
BITS = r"worker-\d \| (bits .*)"


def slow(shell: Shell) -> str:
    """The script with pauses, so that there is time to disturb it."""
    return shell.script(JOB.replace("PAUSE", "0.03"))


def fast(shell: Shell) -> str:
    """The script as it would be."""
    return shell.script(JOB.replace("PAUSE", "0"))


@pytest.fixture(scope="module")
def known() -> list[str]:
    """The bits of a run that nobody disturbs, once it was made."""
    return []


def undisturbed(shell: Shell, known: list[str]) -> str:
    """The bits of a run that nobody disturbs."""
    if not known:
        run = shell.run("run", fast(shell))
        assert run.returncode == 0, run.stdout
        known += re.findall(BITS, run.stdout)
    return known[0]


def bits(run: Process) -> set[str]:
    """What all workers ended with."""
    return {text for (text,) in run.all(BITS)}


def stopped(shell: Shell, folder: Path, *flags: str) -> Process:
    """A job that is stopped in the middle, after a checkpoint of version 30 or more."""
    run = shell.start(
        "run", "--servers", "2", "--workers", "2", *QUICK, "--checkpoint", str(folder), *EVERY,
        *flags, slow(shell),
    )  # fmt: skip
    run.line("checkpoint of version 30 is written")
    run.signal(signal.SIGINT)
    assert run.end() == 128 + signal.SIGINT
    assert not bits(run), "the job was over before it was stopped"
    return run


@pytest.mark.parametrize(("servers", "workers"), [(1, 3), (3, 1)])
def test_a_job_goes_on_from_its_checkpoint_on_any_cluster(
    shell: Shell, known: list[str], servers: int, workers: int
) -> None:
    folder = shell.folder / "ckpt"
    stopped(shell, folder)
    begun = Store(str(folder)).versions()[0]
    run = shell.start(
        "run", "--servers", str(servers), "--workers", str(workers), *QUICK,
        "--resume", str(folder), "--checkpoint", str(folder), *EVERY, fast(shell),
    )  # fmt: skip
    assert run.end() == 0, run.transcript()
    assert run.found(rf"goes on from version {begun} in") is not None
    first = min(int(number) for (number,) in run.all(r"\| round (\d+)"))
    assert first == begun
    assert bits(run) == {undisturbed(shell, known)}
    assert Store(str(folder)).versions() == [ROUNDS, ROUNDS - 10, ROUNDS - 20]


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_a_lost_server_takes_the_job_back_and_the_bits_stay(
    shell: Shell, known: list[str], transport: str
) -> None:
    run = shell.start(
        "run", "--servers", "2", "--workers", "2", *QUICK, "--transport", transport,
        "--server-dead-after-ms", "4000", "--checkpoint", str(shell.folder / "ckpt"), *EVERY,
        slow(shell),
    )  # fmt: skip
    run.line("checkpoint of version 20 is written")
    run.line(r"\| round 24$")
    found(shell, "server-0").kill()
    run.line(r"the job goes back to version \d+: \d+ rounds are computed again")
    assert run.end() == 0, run.transcript()
    assert bits(run) == {undisturbed(shell, known)}
    assert len(run.all("the script begins anew")) >= 2
    assert shell.left() == []


def disturbed(shell: Shell, script: str, *failpoints: str) -> Process:
    """A job in which something happens at named points, once each, at the third hit or so."""
    once = shell.folder / "once"
    once.mkdir()
    shell.environment |= {
        "TREEFOLD_FAILPOINT": ",".join(failpoints),
        "TREEFOLD_FAILPOINT_ONCE": str(once),
    }
    run = shell.start(
        "run", "--servers", "2", "--workers", "2", *QUICK, "--checkpoints-kept", "1",
        "--checkpoint", str(shell.folder / "ckpt"), *EVERY, script,
    )  # fmt: skip
    assert run.end() == 0, run.transcript()
    assert len(list(once.iterdir())) == len(failpoints), "nothing has happened"
    return run


@pytest.mark.parametrize("point", [one for one in POINTS if one.startswith("checkpoint.")])
def test_a_kill_at_any_step_of_a_checkpoint_leaves_no_trace(
    shell: Shell, known: list[str], point: str
) -> None:
    run = disturbed(shell, fast(shell), f"{point}:kill@3")
    assert bits(run) == {undisturbed(shell, known)}
    assert shell.run("checkpoint", "verify", str(shell.folder / "ckpt")).returncode == 0


def test_training_goes_on_where_a_checkpoint_cannot_be_written(
    shell: Shell, known: list[str]
) -> None:
    points = ("checkpoint.mid_file:enospc@20", "checkpoint.manifest.before_sync:raise@2")
    run = disturbed(shell, slow(shell), *points)
    assert bits(run) == {undisturbed(shell, known)}
    assert run.found(r"there will be no checkpoint of version \d+: .*No space left") is not None
    assert run.found(r"there is no checkpoint of version \d+: .*Input/output error") is not None
    assert shell.run("checkpoint", "verify", str(shell.folder / "ckpt")).returncode == 0


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    shell: Shell, known: list[str]
) -> None:
    folder = shell.folder / "ckpt"
    stopped(shell, folder)
    newest, before, *_ = Store(str(folder)).versions()
    [file, *_] = (folder / f"{newest:08d}").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)
    run = shell.run("run", *QUICK, "--resume", str(folder), fast(shell))
    assert run.returncode == 0, run.stdout
    assert f"{newest:08d}/{file.name}: its checksum is wrong" in run.stdout + run.stderr
    assert f"goes on from version {before}" in run.stdout + run.stderr
    assert set(re.findall(BITS, run.stdout)) == {undisturbed(shell, known)}


def test_the_last_version_is_saved_before_the_servers_go_and_can_be_exported(shell: Shell) -> None:
    folder, saved, exported = (shell.folder / name for name in ("ckpt", "saved", "exported"))
    run = shell.run(
        "run",
        "--servers",
        "2",
        *QUICK,
        "--checkpoint",
        str(folder),
        *EVERY,
        fast(shell),
        str(saved),
    )
    assert run.returncode == 0, run.stdout
    assert Store(str(folder)).versions()[0] == ROUNDS
    made = shell.run("checkpoint", "export", str(folder), str(exported), "--format", "safetensors")
    assert made.returncode == 0, made.stderr
    verified = shell.run("checkpoint", "verify", str(folder))
    assert verified.returncode == 0, verified.stdout
    from safetensors.torch import load_file  # noqa: PLC0415 # torch takes seconds

    ours, theirs = load_file(exported), load_file(saved)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_checkpoints_of_another_job_are_not_mixed_with_new_ones(shell: Shell) -> None:
    folder = shell.folder / "ckpt"
    stopped(shell, folder)
    refused = shell.run("run", *QUICK, "--checkpoint", str(folder), fast(shell))
    assert refused.returncode == 3
    assert f"go on from them with --resume {folder}" in refused.stdout + refused.stderr


def test_a_job_with_other_slots_or_another_model_cannot_go_on(shell: Shell) -> None:
    folder = shell.folder / "ckpt"
    stopped(shell, folder)
    refused = shell.run("run", *QUICK, "--resume", str(folder), "--slots", "4", fast(shell))
    assert refused.returncode == 3
    assert "slots=8, not 4: pass --slots 8" in refused.stdout + refused.stderr
    other = shell.script(JOB.replace("PAUSE", "0").replace("300", "301"))
    refused = shell.run("run", *QUICK, "--resume", str(folder), other)
    assert refused.returncode == 1
    assert "tensors[0].shape" in refused.stdout + refused.stderr


def test_a_folder_without_checkpoints_is_nothing_to_go_on_from(shell: Shell) -> None:
    refused = shell.run("run", *QUICK, "--resume", str(shell.folder / "none"), fast(shell))
    assert refused.returncode == 3
    assert "there is no checkpoint in" in refused.stdout + refused.stderr
