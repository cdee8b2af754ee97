"""Jobs of real processes in which one table is asynchronous and the other one is not."""

import signal
from pathlib import Path

from tests.integration.test_cli import QUICK, Shell, shell
from tests.integration.test_survival import found
from treefold.checkpoint.store import Store

__all__ = ["shell"]

JOB = str(Path(__file__).parent / "jobs" / "whole_numbers.py")
FINAL = r"\| final (\S+)$"
ROUNDS, PASSES = 12, 5


def job(shell: Shell, *flags: str, mode: str = "async") -> list[str]:
    """A command that runs the job, slowly as long as the folder has a file ``slow``."""
    script = ["--beside", mode, "--rounds", str(ROUNDS), "--passes", str(PASSES), "--pause-ms=10"]
    return ["run", *QUICK, *flags, JOB, *script, "--slow", str(shell.folder / "slow")]


def test_a_lost_server_takes_both_tables_back_to_the_end_of_a_pass(shell: Shell) -> None:
    (shell.folder / "slow").touch()
    run = shell.start(
        *job(
            shell, "--servers=2", "--workers=2", "--server-dead-after-ms=4000",
            f"--checkpoint={shell.folder / 'ckpt'}", "--checkpoint-every=5",
        )
    )  # fmt: skip
    run.line(f"checkpoint of version {2 * ROUNDS} is written")
    run.line(r"\| body 0 of pass 2$")
    found(shell, "server-0").kill()
    back = run.line(r"the job goes back to version (\d+): \d+ rounds are computed again")
    assert int(back[1]) % ROUNDS == 0
    assert run.end() == 0, run.transcript()
    assert {text for (text,) in run.all(FINAL)} == {"exact"}
    assert shell.left() == []


def test_both_tables_go_on_from_a_checkpoint_on_another_cluster(shell: Shell) -> None:
    slow, folder = shell.folder / "slow", shell.folder / "ckpt"
    slow.touch()
    run = shell.start(
        *job(shell, "--servers=2", "--workers=3", f"--checkpoint={folder}", mode="ssp")
    )
    run.line(f"checkpoint of version {2 * ROUNDS} is written")
    run.signal(signal.SIGINT)
    assert run.end() == 128 + signal.SIGINT
    assert not run.all(FINAL), "the job was over before it was stopped"
    verified = shell.run("checkpoint", "verify", str(folder))
    assert verified.returncode == 0, verified.stdout
    begun = Store(str(folder)).versions()[0]
    manifest = Store(str(folder)).manifest(begun)
    assert [table.version for table in manifest.tables] == [begun, 8 * begun]
    slow.unlink()
    run = shell.start(*job(shell, "--servers=3", "--workers=1", f"--resume={folder}", mode="ssp"))
    assert run.end() == 0, run.transcript()
    assert {text for (text,) in run.all(FINAL)} == {"exact"}
    assert len(run.all(r"body 0 of pass (\d)$")) == PASSES - begun // ROUNDS
