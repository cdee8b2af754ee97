"""What a large cluster exchanges per round, and how fast it is, with every link of one speed.

Real cores and messages, simulated time: what a member computes takes none but a slot's backward.
"""

from collections import defaultdict
from dataclasses import dataclass
from unittest import mock

from tests.sim import world
from tests.sim.cluster import Cluster, tiny_layout
from tests.sim.network import Network, Weather
from tests.sim.scenario import Patience, Scenario, passes, table
from tests.sim.world import MS, SECOND

DATA = ("Push", "RoundHyper", "RoundMeta", "Pull", "Pulled", "Published", "RoundStatus")
BEATS = ("Heartbeat", "HeartbeatSeen", "StatusRequest", "StatusReply")  # the last two: the probe
WARM_ROUNDS = 2
EVENTS_MAX = 100_000_000  # in one virtual second, of so many processes
DAY_NS = 86_400 * SECOND
SILENCE_NS = 30 * SECOND  # here a heartbeat waits behind tensors, seconds with a thousand workers
BLOCK = 4


@dataclass(frozen=True, slots=True)
class Job:
    """What is simulated; every worker has one slot."""

    workers: int
    servers: int
    model_bytes: int = 100_000_000
    bits_per_s: float = 10e9
    compute_ms: int = 500
    seed: int = 1
    rounds: int = 3


@dataclass(frozen=True, slots=True)
class Figures:
    """Means per round, and per member of a role.

    ``control`` has the messages that belong neither to tensors nor to heartbeats, by kind.
    """

    rounds_per_s: float
    worker_messages: float
    worker_bytes: float
    server_messages: float
    server_bytes: float
    control: dict[str, float]


def quiet_rounds(job: Job) -> Figures:
    """Simulate some rounds in which nothing happens but training."""
    total, blocks = WARM_ROUNDS + job.rounds + 2, job.servers
    scenario = Scenario(
        seed=job.seed,
        slots=job.workers,
        servers=job.servers,
        workers=job.workers,
        starts_ns=(0,) * job.workers,
        factors=(1.0,) * job.workers,
        tables=(table("model", [(blocks * BLOCK, 0)]),),
        plans=passes(job.workers, [total], job.workers, job.workers),
        block_elements=BLOCK,
        compute_ns=job.compute_ms * MS,
        weather=Weather(
            MS // 20,
            MS // 100,
            bytes_per_s=job.bits_per_s / 8,
            element_bytes=job.model_bytes // (blocks * BLOCK),
        ),
        patience=Patience(retry_ns=DAY_NS, dead_after_ns=SILENCE_NS),
        shared=0.0,
    )
    with (
        tiny_layout(scenario.block_elements, scenario.part_blocks_max),
        mock.patch.object(world, "EVENTS_PER_SECOND_MAX", EVENTS_MAX),
    ):
        cluster = Cluster(scenario)
        cluster.begin()
        reached_ns, counts = [], []
        for version in (WARM_ROUNDS, WARM_ROUNDS + job.rounds):
            for shard in range(job.servers):
                while cluster.checks.versions.get((0, shard), -1) < version:
                    assert cluster.world.step(), "the job must not end before its last version"
            reached_ns.append(cluster.world.now_ns)
            counts.append(_counts(cluster.network))
    seconds = (reached_ns[1] - reached_ns[0]) / 1e9
    more = {key: (counts[1][key] - counts[0].get(key, 0)) / job.rounds for key in counts[1]}
    per_round = defaultdict(float, more)
    control = {key: n for key, n in more.items() if key[0].isupper() and n}
    return Figures(
        job.rounds / seconds,
        per_round["worker messages"] / job.workers,
        per_round["worker bytes"] / job.workers,
        per_round["server messages"] / job.servers,
        per_round["server bytes"] / job.servers,
        control,
    )


def _counts(network: Network) -> dict[str, int]:
    found = dict.fromkeys(("worker messages", "worker bytes", "server messages", "server bytes"), 0)
    for ways in (network.sent, network.received):
        for name, (messages, nbytes) in ways.items():
            role = name.split("-")[0]
            if role in ("worker", "server"):
                found[f"{role} messages"] += messages
                found[f"{role} bytes"] += nbytes
    quiet = (*DATA, *BEATS)
    kinds = {kind: n for kind, n in network.kinds.items() if kind[0].isupper()}  # others: events
    return found | {kind: n for kind, n in kinds.items() if kind not in quiet}
