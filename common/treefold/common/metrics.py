"""What every process can be asked for: the names, and how they are counted.

`METRICS` is the one list of names; ``docs/metrics.md`` says what they mean, and a test compares the
two. Values are `Reading`s that a process makes of its own state when somebody asks. Nothing here
does input or output, and no label is ever the name of a parameter.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

PREFIX = "treefold_"
DURATION_BOUNDS_S = (0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
STALENESS_CLASSES = 12  # 0, 1, 2 to 3 ... 512 to 1023, and everything beyond
NS = 1_000_000_000
SCHEDULER, SERVER, WORKER = "scheduler", "server", "worker"
EVERY = (SCHEDULER, SERVER, WORKER)


class Kind(Enum):
    """Types of metrics."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One name that can be asked for.

    Attributes
    ----------
    name : str
        Without the prefix; the unit comes last, but for ``_total``.
    kind : Kind
        How it may change.
    text : str
        What it is.
    labels : tuple of str
        Names of its labels.
    roles : tuple of str
        Whose it is.
    """

    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...] = ()
    roles: tuple[str, ...] = EVERY


@dataclass(frozen=True, slots=True)
class Counts:
    """The value of a histogram: how many were at most each bound, and the sum of all."""

    bounds: Sequence[float]
    counts: Sequence[int]
    sum: float


@dataclass(frozen=True, slots=True)
class Reading:
    """The value of a metric for some values of its labels."""

    name: str
    value: float | Counts
    labels: tuple[str, ...] = ()


class Durations:
    """How long something took, by class."""

    __slots__ = ("_counts", "_sum_ns")

    def __init__(self) -> None:
        self._counts = [0] * (len(DURATION_BOUNDS_S) + 1)
        self._sum_ns = 0

    def add(self, ns: int) -> None:
        """Count one."""
        self._counts[bisect_left(DURATION_BOUNDS_S, ns / NS)] += 1
        self._sum_ns += ns

    def counts(self) -> Counts:
        """What was counted."""
        return Counts(DURATION_BOUNDS_S, list(self._counts), self._sum_ns / NS)


def staleness(classes: Sequence[int], total: int) -> Counts:
    """A histogram of classes 0, 1, 2 to 3, 4 to 7 and so on, and the sum of all."""
    bounds = [float((1 << order) - 1) for order in range(STALENESS_CLASSES - 1)]
    counts = list(classes[: len(bounds)])
    counts += [0] * (len(bounds) - len(counts))
    return Counts(bounds, [*counts, sum(classes[len(bounds) :])], float(total))


_C, _G, _H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM
_MEMBERS, _OF_SCHEDULER, _OF_SERVER, _OF_WORKER = (
    (SERVER, WORKER),
    (SCHEDULER,),
    (SERVER,),
    (WORKER,),
)

METRICS = (
    Metric("build_info", _G, "Always 1; the labels say who this is", ("version", "role", "rank")),
    Metric("cluster_view", _G, "Number of the newest view that this process has"),
    Metric("requests_total", _C, "Messages that came, by how they were met", ("op", "status")),
    Metric("request_duration_seconds", _H, "Time from a message to all that it led to", ("op",)),
    Metric("network_receive_bytes_total", _C, "Bytes received, by the way they took", ("way",)),
    Metric("network_transmit_bytes_total", _C, "Bytes sent, by the way they took", ("way",)),
    Metric("network_receive_messages_total", _C, "Messages received, some bundled"),
    Metric("network_transmit_messages_total", _C, "Messages sent, some bundled"),
    Metric("connections_cut_total", _C, "Connections closed for what they brought"),
    Metric("queue_depth", _G, "What waits in this process", ("queue",), _MEMBERS),
    Metric("busy_seconds_total", _C, "Time spent by kind of work", ("activity",), _MEMBERS),
    Metric("shared_memory_bytes", _G, "Shared memory of this process's own", (), _MEMBERS),
    # ---- scheduler
    Metric(
        "cluster_nodes", _G, "Members that ever were, by state", ("role", "state"), _OF_SCHEDULER
    ),
    Metric("cluster_round", _G, "The newest round that a worker is in", (), _OF_SCHEDULER),
    Metric("cluster_slots", _G, "V, the slots of a round", (), _OF_SCHEDULER),
    Metric("slots", _G, "Slots that a live worker leases", ("worker",), _OF_SCHEDULER),
    Metric("slots_late_total", _C, "Slots left out of a round by a quorum", (), _OF_SCHEDULER),
    Metric(
        "gradients_unhealthy_total",
        _C,
        "Gradients of slots that were not what is usual",
        ("table", "worker", "reason"),
        _OF_SCHEDULER,
    ),
    Metric(
        "gradients_left_out_total",
        _C,
        "Those of them that did not count",
        ("table", "reason"),
        _OF_SCHEDULER,
    ),
    Metric("rounds_skipped_total", _C, "Rounds that changed nothing", ("table",), _OF_SCHEDULER),
    Metric("slot_duration_seconds", _G, "Time per slot as forecast", ("worker",), _OF_SCHEDULER),
    Metric("member_silence_seconds", _G, "Since a live member spoke", ("member",), _OF_SCHEDULER),
    Metric("heartbeats_missed_total", _C, "Beats that did not come", ("role",), _OF_SCHEDULER),
    Metric("members_lost_total", _C, "Members given up for silence", ("role",), _OF_SCHEDULER),
    Metric("failovers_total", _C, "Shards whose backup took over", ("role",), _OF_SCHEDULER),
    Metric("rollbacks_total", _C, "Times the job went back to a checkpoint", (), _OF_SCHEDULER),
    Metric("checkpoints_total", _C, "Checkpoints, by how they ended", ("status",), _OF_SCHEDULER),
    Metric("checkpoint_version", _G, "Version of the newest checkpoint", (), _OF_SCHEDULER),
    Metric("checkpoint_last_bytes", _G, "Size of the newest checkpoint", (), _OF_SCHEDULER),
    Metric(
        "checkpoint_last_success_timestamp_seconds",
        _G,
        "When the newest checkpoint was whole, 0 before; only of jobs that make any",
        (),
        _OF_SCHEDULER,
    ),
    # ---- server
    Metric("shards", _G, "Shards that are here, by the server's part", ("part",), _OF_SERVER),
    Metric("shard_version", _G, "Newest version of a shard", ("table", "shard"), _OF_SERVER),
    Metric("table_elements", _G, "Elements of a table that lie here", ("table",), _OF_SERVER),
    Metric("table_bytes", _G, "Bytes of a table that lie here", ("table", "kind"), _OF_SERVER),
    Metric("updates_applied_total", _C, "Steps of the optimizer", ("table", "shard"), _OF_SERVER),
    Metric(
        "contributions_applied_total",
        _C,
        "Contributions of slots in versions that were made here as primary",
        ("table", "shard"),
        _OF_SERVER,
    ),
    Metric("contributions_duplicate_total", _C, "Parts that were here already", (), _OF_SERVER),
    Metric("contributions_late_total", _C, "Parts left out of a round", (), _OF_SERVER),
    Metric("updates_rejected_total", _C, "Contributions refused", ("reason",), _OF_SERVER),
    Metric(
        "staleness_steps",
        _H,
        "Versions that a contribution to an asynchronous table was behind",
        ("table", "worker"),
        _OF_SERVER,
    ),
    Metric(
        "replication_lag_updates",
        _G,
        "Versions that the slowest copy of a shard is behind its primary",
        ("table", "shard"),
        _OF_SERVER,
    ),
    Metric("checkpoint_duration_seconds", _H, "Time to write a shard's file", (), _OF_SERVER),
    Metric("checkpoint_written_bytes_total", _C, "Bytes of shards' files", (), _OF_SERVER),
    # ---- worker
    Metric("worker_step", _G, "The round that this worker is in", (), _OF_WORKER),
    Metric("worker_steps_total", _C, "Slots that this worker has finished", (), _OF_WORKER),
    Metric("worker_samples_total", _C, "Samples that this worker has used", (), _OF_WORKER),
    Metric("worker_loss", _G, "The last finite loss", (), _OF_WORKER),
    Metric("worker_wait_seconds_total", _C, "Time the script waited", ("reason",), _OF_WORKER),
)
BY_NAME = {metric.name: metric for metric in METRICS}
