"""Workers that send gradients which are not what they should be, in real processes."""

import signal
from collections.abc import Callable
from pathlib import Path

from tests.integration.test_trouble import begin_round
from tests.support.processes import Bits, Cluster, Process
from treefold.launch.link import fetch, parse

JOB = "attacked.py"
FAULTS, SIGNS = ("--attack=faults", "--epochs=2"), "--attack=signs"
MakeCluster = Callable[..., Cluster]
Alone = Callable[..., Bits]


def accuracies(worker: Process) -> dict[str, float]:
    """How well each table's model does, by name."""
    return {name: float(value) for name, value in worker.all(r"^accuracy (\S+) (\S+)$")}


def values(job: Cluster) -> dict[tuple[int, str], str]:
    """Hashes of what every worker began rounds with, by round and table."""
    found: dict[tuple[int, str], str] = {}
    for worker in job.workers:
        for round_, name, digest in worker.all(r"^values (\d+) (\S+) (\S+)$"):
            assert found.setdefault((int(round_), name), digest) == digest
    return found


def test_what_each_policy_does_is_the_same_after_everybody_was_killed_once(
    cluster: MakeCluster, alone: Alone, tmp_path: Path
) -> None:
    with cluster(3, 2, replicas=2, journal=str(tmp_path / "journal")) as job:
        workers = [job.worker(JOB, *FAULTS, "--sleep-ms=20") for _ in range(2)]
        begin_round(workers[0], 4)
        first = job.scheduler
        first.signal(signal.SIGKILL)
        first.end()
        job.restart_scheduler()
        begin_round(workers[0], 8)
        job.servers[0].signal(signal.SIGKILL)
        begin_round(workers[0], 15)
        status = parse(fetch(job.address, 3_000))
        assert job.bits(first, job.servers[0]) == alone(JOB, *FAULTS)
    text = r"WARNING table 'MODEL' round 12: slot 6 of worker-\d has a gradient of norm \S+, usual"
    for model, done in (("2", "left out"), ("3", "the round is skipped"), ("4", "clipped")):
        assert job.scheduler.found(f"{text.replace('MODEL', f'model-{model}')} .*; {done}$")
        assert first.found(f"'model-{model}' round 3: slot 1 of worker-\\d .* not finite; ")
    assert first.found("'model-1' round 3: slot 1 of worker-. .* not finite; counted as it is")
    found = accuracies(workers[0])
    assert found.pop("off") < 0.5
    assert found.pop("warn") < 0.5
    assert min(found.values()) > 0.75, found
    began = values(job)
    for round_ in (3, 12):
        for name in ("reject", "clip", "skip-round"):
            is_same = began[round_, name] == began[round_ + 1, name]
            assert is_same == (name == "skip-round"), (round_, name)
    assert all(began[n, "warn"] == began[n, "off"] for n in range(20))
    table = next(one for one in status.tables if one.name == "model-2")
    assert table.health == "reject"
    assert sum(one.get("high", 0) for one in table.unhealthy.values()) == 1


def test_each_rule_stands_what_takes_the_mean_anywhere(cluster: MakeCluster, alone: Alone) -> None:
    with cluster(2, 3) as job:
        for _ in range(3):
            job.worker(JOB, SIGNS)
        assert job.bits() == alone(JOB, SIGNS)
    found = accuracies(job.workers[0])
    assert found.pop("mean") < 0.5
    assert found.pop("spared") > 0.88
    assert set(found) == {"median", "trimmed", "krum", "clipping"}
    assert min(found.values()) > 0.75, found


def test_what_is_usual_goes_on_from_a_checkpoint_on_another_cluster(
    cluster: MakeCluster, alone: Alone, tmp_path: Path
) -> None:
    folder = str(tmp_path / "ckpt")
    with cluster(2, 2, checkpoint=folder, checkpoint_every=9, ledger="") as job:
        for _ in range(2):
            job.worker(JOB, *FAULTS, "--sleep-ms=20")
        job.scheduler.line("checkpoint of version 9 is written")
    with cluster(1, 3, resume=folder) as job:
        for _ in range(3):
            job.worker(JOB, *FAULTS)
        assert job.bits().final == alone(JOB, *FAULTS).final
    assert job.scheduler.found("'model-4' round 12: slot 6 of .*; clipped") is not None
