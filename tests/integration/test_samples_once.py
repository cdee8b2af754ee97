"""Every sample of an epoch enters one version, once, in the plan's order: what the ledger says.

The expected order is derived here from the plan's numbers; the ledger tells which worker's copy of
each slot went into each version, and which samples that worker had read for it.
"""

import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.processes import Cluster
from treefold.common import ledger
from treefold.common.ledger import Entry, SamplesRecord, VersionRecord, Writer
from treefold.common.plan import LoopPlan, PlanKind
from treefold.torch.randomness import permutation

JOB = "three_tables.py"
EPOCHS, SAMPLES, BATCH_SIZE, SLOTS, SEED = 4, 131, 32, 8, 3
ROUNDS = -(-SAMPLES // BATCH_SIZE)


def plan_of(epoch: int) -> LoopPlan:
    """The pass that the job makes in an epoch."""
    return LoopPlan(
        PlanKind.SLOTS, epoch, epoch * ROUNDS, ROUNDS, SLOTS, SAMPLES, BATCH_SIZE, epoch, True, SEED
    )


def expected() -> dict[tuple[int, int], list[int]]:
    """The samples of every slot of every version."""
    found = {}
    for epoch in range(EPOCHS):
        plan, order = plan_of(epoch), permutation(SAMPLES, SEED, epoch).tolist()
        for number in range(plan.first_round, plan.end_round):
            for slot in range(plan.active_slots(number)):
                start, stop = plan.slot_range(number, slot)
                found[number + 1, slot] = order[start:stop]
    return found


def complaints(entries: list[Entry]) -> list[str]:
    """What is wrong with what entered the versions; empty if nothing is."""
    found = []
    for epoch in range(EPOCHS):
        first = plan_of(epoch).first_round
        inside = [entry for entry in entries if first < entry.version <= first + ROUNDS]
        uses = Counter(sample for entry in inside for sample in entry.samples)
        wrong = [sample for sample in range(SAMPLES) if uses[sample] != 1]
        found += [f"epoch {epoch}: sample {n} entered {uses[n]} times" for n in wrong]
    wanted = expected()
    found += [
        f"version {entry.version}, slot {entry.slot}: another order than the plan's"
        for entry in entries
        if wanted.get((entry.version, entry.slot)) != entry.samples
    ]
    return found


def shards_of(folder: str) -> list[tuple[int, int]]:
    """Table and shard of every record of a trained version."""
    records = [record for record in ledger.read(folder) if isinstance(record, VersionRecord)]
    return sorted({(r.table, r.shard) for r in records if r.version > 0})


def train(job: Cluster) -> str:
    """Run the job with a worker that is killed, one that joins and one more; returns the ledger."""
    killed, _ = (
        job.worker(JOB, f"--epochs={EPOCHS}", "--sleep-ms=10", hold)
        for hold in ("--hold=7:step", "--hold=99:step")
    )
    killed.line("^holding")
    killed.signal(signal.SIGKILL)
    job.worker(JOB, f"--epochs={EPOCHS}", "--sleep-ms=10")
    job.end(killed)
    return str(job.settings["ledger"])


def test_every_sample_of_an_epoch_enters_every_shard_once_though_a_worker_is_killed(
    cluster: Callable[..., Cluster],
) -> None:
    with cluster(2, 2, slots=SLOTS, seed=SEED) as job:
        folder = train(job)
    shards = shards_of(folder)
    assert {table for table, _ in shards} == {0, 1, 2}
    assert len(shards) > 3
    for table, shard in shards:
        assert complaints(ledger.entries(folder, table, shard)) == []
    senders = {entry.incarnation for entry in ledger.entries(folder)}
    assert len(senders) >= 2


def write(folder: str, versions: dict[int, list[tuple[int, int, int]]]) -> None:
    """A ledger of one worker that computed all slots as planned, and of what entered versions."""
    writer = Writer(folder, "made-up")
    for (version, slot), samples in expected().items():
        writer.add(SamplesRecord(7, version - 1, slot, samples))
    for version, contributors in versions.items():
        writer.add(VersionRecord(0, 0, version, contributors))
    writer.close()


def sound() -> dict[int, list[tuple[int, int, int]]]:
    """Every active slot of every version, sent on its own by worker 7."""
    found: dict[int, list[tuple[int, int, int]]] = {}
    for version, slot in expected():
        found.setdefault(version, []).append((0, slot, 7))
    return found


def test_a_ledger_in_which_everything_is_right_has_no_complaints(tmp_path: Path) -> None:
    write(str(tmp_path), sound())
    assert complaints(ledger.entries(str(tmp_path))) == []


def test_a_slot_that_did_not_enter_its_version_is_noticed(tmp_path: Path) -> None:
    write(str(tmp_path), sound() | {9: [(0, slot, 7) for slot in range(SLOTS) if slot != 5]})
    found = complaints(ledger.entries(str(tmp_path)))
    assert len(found) == len(expected()[9, 5])
    assert all(line.endswith("entered 0 times") for line in found)


def test_a_slot_that_entered_its_version_twice_is_noticed(tmp_path: Path) -> None:
    write(str(tmp_path), sound() | {9: [(1, 2, 7), *((0, slot, 7) for slot in range(SLOTS))]})
    found = complaints(ledger.entries(str(tmp_path)))
    assert len(found) == len(expected()[9, 4] + expected()[9, 5])
    assert all(line.endswith("entered 2 times") for line in found)


def test_samples_in_another_order_are_noticed() -> None:
    entries = []
    for (version, slot), samples in expected().items():
        order = samples[::-1] if (version, slot) == (9, 5) else samples
        entries.append(Entry(version, slot, 7, order))
    assert complaints(entries) == ["version 9, slot 5: another order than the plan's"]


def test_a_contribution_without_samples_is_an_error(tmp_path: Path) -> None:
    write(str(tmp_path), sound() | {9: [(3, 0, 8)]})
    with pytest.raises(KeyError, match="worker 8 recorded no samples of slots"):
        ledger.entries(str(tmp_path))
