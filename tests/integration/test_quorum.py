"""Rounds that go on without the last slots, in real processes."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.jobs.whole_numbers import SLOTS
from tests.integration.test_cli import QUICK, Shell, shell
from tests.support.exactness import of_quorum
from tests.support.processes import Cluster
from treefold.checkpoint.store import Store
from treefold.launch.link import fetch, parse

__all__ = ["shell"]

MakeCluster = Callable[..., Cluster]
JOB = str(Path(__file__).parent / "jobs" / "whole_numbers.py")
ROUNDS, ELEMENTS = 40, 400_000


def test_with_all_slots_in_it_is_the_same_as_without_a_quorum(
    cluster: MakeCluster, data_dir: Path
) -> None:
    finals = []
    for settings in ({}, {"consistency": "quorum", "quorum": 8}):
        with cluster(2, 2, ledger="", **settings) as job:
            for _ in range(2):
                job.worker("clothes.py", f"--data={data_dir}", "--epochs=1", "--pause-ms=0")
            job.end()
            finals += [worker.line("^final (.*)$")[1] for worker in job.workers]
    assert len(set(finals)) == 1


def test_what_is_dropped_is_left_out_and_counted(cluster: MakeCluster, tmp_path: Path) -> None:
    folder, slow = str(tmp_path / "ledger"), tmp_path / "slow"
    slow.touch()
    settings = {"consistency": "quorum", "quorum": 5, "grace": 0.0, "late": "drop"}
    with cluster(2, 3, ledger=folder, **settings) as job:
        for _ in range(3):
            job.worker("whole_numbers.py", f"--rounds={ROUNDS}", f"--slow={slow}")
        job.workers[0].line("^body")
        (table,) = parse(fetch(job.address, 3_000)).tables
        job.end()
        bits = {worker.line("^bits (.*)$")[1] for worker in job.workers}
    assert table.consistency == "quorum(5)"
    rounds = of_quorum(folder, ROUNDS)
    assert len(rounds.batches) == ROUNDS
    assert rounds.missed() > 0
    lacking = ROUNDS * SLOTS - sum(map(len, rounds.batches))
    assert len(rounds.complaints) == lacking
    assert all(text.endswith("does not count") for text in rounds.complaints)
    assert bits == {rounds.bits(ELEMENTS, is_dropped=True)}


def test_a_job_with_a_quorum_goes_on_from_its_checkpoint_on_another_cluster(shell: Shell) -> None:
    folder, slow = shell.folder / "ckpt", shell.folder / "slow"
    slow.touch()
    ledgers = [shell.folder / "first", shell.folder / "second"]
    options = ["--consistency", "quorum", "--quorum", "4", "--grace", "0", *QUICK]
    script = [JOB, f"--rounds={ROUNDS}", f"--slow={slow}"]
    run = shell.start(
        "run", "--servers", "2", "--workers", "3", *options, "--checkpoint", str(folder),
        "--checkpoint-every", "15", "--ledger", str(ledgers[0]), *script,
    )  # fmt: skip
    run.line("checkpoint of version 30 is written")
    run.signal(signal.SIGINT)
    assert run.end() == 128 + signal.SIGINT
    begun = Store(str(folder)).versions()[0]
    made = shell.run("checkpoint", "export", str(folder), str(shell.folder / "exported"))
    assert made.returncode == 0, made.stderr
    run = shell.start(
        "run", "--servers", "3", "--workers", "2", *options, "--resume", str(folder),
        "--ledger", str(ledgers[1]), *script,
    )  # fmt: skip
    assert run.end() == 0, run.transcript()
    first, second = (of_quorum(str(ledger), ROUNDS) for ledger in ledgers)
    batches = [*first.batches[:begun], *second.batches]
    assert first.missed() > 0
    assert sorted(which for one in batches for which in one) == [
        (round_, slot) for round_ in range(ROUNDS) for slot in range(SLOTS)
    ]
    assert {text for (text,) in run.all(r"\| final (\S+)")} == {"exact"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--quorum", "0"], "quorum is 0; with consistency=quorum"),
        (["--quorum", "9"], "a quorum of 9 slots, of which a round has 8"),
        (["--quorum", "4", "--late", "blend"], "late is 'blend'; it is requeue or drop"),
        (["--quorum", "4", "--grace", "-1"], "grace"),
    ],
)
def test_a_quorum_that_is_none_is_refused_by_name(
    options: list[str], text: str, shell: Shell
) -> None:
    run = shell.run("run", *QUICK, "--consistency", "quorum", *options, JOB, "--slow=none")
    assert run.returncode != 0
    assert text in run.stdout + run.stderr
