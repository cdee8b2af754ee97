"""What the ledger of ``jobs/whole_numbers.py`` must say, whatever happened while the job ran.

Every version of every shard is made of each slot once, with the samples that the plan gives that
slot. A version that was told to workers stays as it was told: a server that was promoted writes
down what its primary had, so two records of one version name the same contributions.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.integration.jobs.whole_numbers import KINDS, SLOTS, gradient_of
from treefold.common import ledger
from treefold.common.ledger import AppliedRecord, Record, SamplesRecord, VersionRecord
from treefold.common.plan import LoopPlan, PlanKind
from treefold.common.tree import Node, span
from treefold.torch.randomness import permutation

Samples = dict[tuple[int, int, int], list[int]]


def complaints(folder: str, rounds: int, seed: int = 0) -> list[str]:
    """What is wrong with a ledger; empty if nothing is.

    Parameters
    ----------
    folder : str
        The ledger.
    rounds : int
        Rounds of the job.
    seed : int
        The job's.
    """
    records = ledger.read(folder)
    samples = {
        (one.incarnation, one.round, one.slot): one.samples
        for one in records
        if isinstance(one, SamplesRecord)
    }
    servers = [int(path.stem.split("-")[1]) for path in Path(folder).glob("server-*.ledger")]
    wanted = _planned(rounds, seed)
    found: list[str] = []
    made: dict[tuple[int, int], VersionRecord] = {}
    for record in _versions(records):
        what = f"shard {record.shard} version {record.version}"
        found += [f"{what}: {text}" for text in _wrong_in(record, samples, servers, wanted)]
        first = made.setdefault((record.shard, record.version), record)
        if sorted(first.contributors) != sorted(record.contributors):
            found.append(f"{what} was made twice: {first.contributors} and {record.contributors}")
    shards = sorted({shard for shard, _ in made})
    lacking = [(s, v) for s in shards for v in range(1, rounds + 1) if (s, v) not in made]
    found += [f"shard {shard} version {version} was not made" for shard, version in lacking]
    return found if shards else [*found, "no version was made"]


@dataclass(frozen=True, slots=True)
class Rounds:
    """What rounds were made of that may go on without the last slots.

    Attributes
    ----------
    complaints : list of str
        What is wrong; empty if nothing is.
    batches : list of list of (int, int)
        Round and slot of the plan, by version from 1 on.
    order : list of int
        The samples in the order of the plan.
    """

    complaints: list[str]
    batches: list[list[tuple[int, int]]]
    order: list[int]

    def missed(self) -> int:
        """How many versions have less than a round."""
        return sum(len(batches) < SLOTS for batches in self.batches)

    def bits(self, elements: int, *, is_dropped: bool = False) -> str:
        """The hash of the parameters that these versions come to."""
        gradients = [gradient_of(kind, elements).float() / SLOTS for kind in range(KINDS)]
        parameters = torch.zeros(elements)
        for batches in self.batches:
            total = torch.zeros(elements)
            for round_, slot in batches:
                total += gradients[self.sample(round_, slot) % KINDS]
            if is_dropped and len(batches) < SLOTS:
                total.mul_(SLOTS / len(batches))
            parameters.sub_(total)
        return hashlib.sha256(parameters.numpy().tobytes()).hexdigest()

    def sample(self, round_: int, slot: int) -> int:
        """The only sample of a batch."""
        return self.order[round_ * SLOTS + slot]


def of_quorum(folder: str, rounds: int, seed: int = 0) -> Rounds:
    """The same for a job with a quorum: versions are the same set on every shard, batches once."""
    records = ledger.read(folder)
    wanted, found = _planned(rounds, seed), []
    samples = {
        (one.incarnation, one.round, one.slot): one.samples
        for one in records
        if isinstance(one, SamplesRecord)
    }
    made: dict[tuple[int, int], dict[tuple[int, int], None]] = {}
    for record in (one for one in records if isinstance(one, AppliedRecord)):
        which = (record.round, record.slot)
        made.setdefault((record.shard, record.version), {})[which] = None
        if samples.get((record.incarnation, *which)) != wanted.get(which):
            found.append(f"{record} has other samples than planned")
    versions = sorted({version for _, version in made})
    batches = [sorted(made[0, version]) for version in versions if (0, version) in made]
    for (shard, version), own in made.items():
        if sorted(own) != sorted(made.get((0, version), {})):
            found.append(f"version {version} has {sorted(own)} in shard {shard}, not in shard 0")
    counts = Counter(which for one in batches for which in one)
    found += [f"{which} counts {count} times" for which, count in counts.items() if count > 1]
    found += [f"{which} does not count" for which in wanted if which not in counts]
    order = permutation(rounds * SLOTS, seed, 0).tolist()
    return Rounds(found if made else ["nothing was applied"], batches, order)


def complaints_one_by_one(folder: str, rounds: int, seed: int = 0) -> list[str]:
    """The same for a job whose contributions are applied one by one: each once, to every shard."""
    records = ledger.read(folder)
    samples = {
        (one.incarnation, one.round, one.slot): one.samples
        for one in records
        if isinstance(one, SamplesRecord)
    }
    wanted, found = _planned(rounds, seed), []
    made: dict[tuple[int, int], AppliedRecord] = {}
    for record in (one for one in records if isinstance(one, AppliedRecord)):
        what = f"shard {record.shard} version {record.version}"
        first = made.setdefault((record.shard, record.version), record)
        if first != record:
            found.append(f"{what} was made twice: {first} and {record}")
        which = (record.round, record.slot)
        if samples.get((record.incarnation, *which)) != wanted.get(which):
            found.append(f"{what} has other samples than planned: {record}")
    for shard in sorted({shard for shard, _ in made}):
        applied = Counter((r.round, r.slot) for (own, _), r in made.items() if own == shard)
        twice = [which for which, count in applied.items() if count > 1]
        found += [f"shard {shard} has {twice} more than once"] if twice else []
        lacking = [which for which in wanted if which not in applied]
        found += [f"shard {shard} lacks {lacking}"] if lacking else []
    return found if made else [*found, "nothing was applied"]


def _versions(records: list[Record]) -> list[VersionRecord]:
    """Those that were made by rounds. A copy that took part in none yet knows no contributions."""
    versions = [record for record in records if isinstance(record, VersionRecord)]
    return [record for record in versions if record.version > 0 and record.contributors]


def _planned(rounds: int, seed: int) -> dict[tuple[int, int], list[int]]:
    """The samples of every round and slot."""
    count = rounds * SLOTS
    plan = LoopPlan(PlanKind.SLOTS, 0, 0, rounds, SLOTS, count, SLOTS, 0, True, seed)
    order = permutation(count, seed, 0).tolist()
    found = {}
    for number in range(rounds):
        for slot in range(SLOTS):
            start, stop = plan.slot_range(number, slot)
            found[number, slot] = order[start:stop]
    return found


def _wrong_in(
    record: VersionRecord,
    samples: Samples,
    servers: list[int],
    wanted: dict[tuple[int, int], list[int]],
) -> list[str]:
    """What is wrong with one version's contributions."""
    round_ = record.version - 1
    slots: list[int] = []
    found: list[str] = []
    for level, index, sender in record.contributors:
        covered = range(*span(Node(level, index), SLOTS))
        slots += covered
        # What a primary that is gone had relayed bears its name: it had folded it all.
        if sender not in servers:
            other = [n for n in covered if samples.get((sender, round_, n)) != wanted[round_, n]]
            found += [f"slot {slot} of {sender} has other samples than planned" for slot in other]
    if sorted(slots) != list(range(SLOTS)):
        found.append(f"made of slots {sorted(slots)}")
    return found
