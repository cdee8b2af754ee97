"""How long training stands still when a server dies, and when servers come and go.

    python -m bench.failover [--kills 10] [--resizes 5] [--failbacks 3]
                             [--parameters 2200000] [--slot-ms 5] [--checkpoint-every 50]

                             [--parts failover,resize,failback]

Run from the root of the repository. Clusters of real processes on default settings train one tensor
with AdamW; a loop body sleeps a little beside its work. Workers say when they begin a round, which
is when its version is complete.

- *Failover*: 2 servers, 2 replicas, 2 workers, a journal. The primary of shard 0 is killed with
  SIGKILL, and when training goes on another server is started. The time is from the signal to the
  next version; the wait for silence, ``dead_after_ms``, is in it. Before the next kill all copies
  are in sync again.
- *Resize*: 1 server, then three more, then two of the four are drained, all while 2 workers train.
  The time is the longest one from a version to the next, while servers join and while they are
  drained, beside the median and the longest of the same job before anybody came. Every repetition
  is a job of its own.
- *Failback*: 2 servers, 1 replica, checkpoints. The primary of shard 0 is killed, and another
  server is started at once, at an address of its own or at that of the dead one, as a supervisor
  would; workers get a minute to come back instead of ``rejoin_grace_s``. *Resumed* is from the
  signal to the first version that is made after going back, *beyond* to the first one that there
  had not been.

The last line is JSON, with the settings that decide.
"""

import argparse
import operator
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bench._begun import Begun
from bench._harness import WINDOWS_MIN, Spread, machine, print_document, print_table, start
from bench._link import BenchError
from tests.support.processes import QUICK, Cluster, Process, Starter
from treefold.checkpoint.store import Store
from treefold.cli.drain import ask
from treefold.common.config import Settings
from treefold.launch.link import MemberStatus, Status, fetch, parse
from treefold.wire.messages import Accepted

if TYPE_CHECKING:
    from collections.abc import Iterator

WORKER = str(Path(__file__).with_name("_failover_worker.py"))
DEFAULTS = {key: getattr(Settings(), key) for key in QUICK}  # what tests make quicker
DECIDING = ("heartbeat_ms", "dead_after_ms", "server_dead_after_ms", "retry_ms", "slots")
KILLS_MIN = 10
WARM_UP_ROUNDS = 20  # leases settle and buffers are there
QUIET_ROUNDS = 100  # before anybody comes
AFTER_ROUNDS = 10  # after the last one has gone, and after a checkpoint before a kill
STATUS_MS = 4_000
REJOIN_GRACE_S = 60.0  # not the default, in which a worker has to import torch and come back
WORKERS = 2
Found = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    kills: int
    resizes: int
    failbacks: int
    parameters: int
    slot_ms: float
    checkpoint_every: int


@dataclass(frozen=True, slots=True)
class Place:
    """What all jobs of a run share."""

    starter: Starter
    effort: Effort
    folder: Path


@contextmanager
def training(
    place: Place, servers: int, settings: dict[str, object], *, is_forked: bool = True
) -> "Iterator[tuple[Cluster, Begun]]":
    """A context in which a job trains; all of its processes are gone after it."""
    effort = place.effort
    own = {"servers": servers, "workers": WORKERS} | DEFAULTS | settings
    words = [f"--parameters={effort.parameters}", f"--slot-ms={effort.slot_ms}"]
    words += [f"--slots={Settings().slots}"]
    with Cluster(place.starter, own, is_forked=is_forked) as job:
        for _ in range(WORKERS):
            job.worker(WORKER, *words)
        begun = Begun(job)
        begun.reach(WARM_UP_ROUNDS)
        yield job, begun


# ---- a backup takes over -------------------------------------------------------------------------


def failovers(place: Place) -> Found:
    """Seconds from each kill to the next version, and from each new server until it is in sync."""
    found: Found = {"next_round_s": [], "in_sync_s": [], "usual_round_s": []}
    settings = {"replicas": 2, "journal": str(place.folder / "journal")}
    with training(place, 2, settings) as (job, begun):
        await_status(job, begun, is_in_sync, "copies in sync")
        for _ in range(place.effort.kills):
            quiet_ns = time.monotonic_ns()
            begun.reach(begun.newest() + WARM_UP_ROUNDS)
            killed_ns = kill_primary(job)[1]
            found["usual_round_s"] += begun.gaps_s(quiet_ns, killed_ns)
            found["next_round_s"].append((resumed_ns(begun, killed_ns) - killed_ns) / 1e9)
            started_ns = time.monotonic_ns()
            job.servers.append(job.server())
            await_status(job, begun, is_in_sync, "copies in sync")
            found["in_sync_s"].append((time.monotonic_ns() - started_ns) / 1e9)
    return found


def resumed_ns(begun: Begun, killed_ns: int) -> int:
    """When the first version came that the dead server had no part in.

    The one after that of the kill may have been complete, and on its way: then it came quickly, and
    the wait was for the one after it.
    """
    last = begun.newest(killed_ns)
    times_ns = [wait_ns(begun, killed_ns, partial(operator.le, last + more)) for more in (1, 2)]
    first_ns, second_ns = times_ns
    return first_ns if first_ns - killed_ns >= second_ns - first_ns else second_ns


def is_in_sync(status: Status) -> bool:
    """Whether every shard has two servers, and they are all that live."""
    shards = [shard for table in status.tables for shard in table.shards]
    has_copies = all(len(shard.backups) == 1 and not shard.joining for shard in shards)
    live = {member.name for member in status.live("server")}
    holders = {name for shard in shards for name in (shard.server, *shard.backups)}
    return bool(shards) and has_copies and holders <= live and len(live) == 2


# ---- servers come and go -------------------------------------------------------------------------


def resizes(place: Place) -> Found:
    """The longest pauses of each job, beside what is usual in it."""
    found: Found = {}
    for _ in range(place.effort.resizes):
        with training(place, 1, {}) as (job, begun):
            for key, value in resize(job, begun).items():
                found.setdefault(key, []).append(value)
    return found


def resize(job: Cluster, begun: Begun) -> dict[str, float]:
    """From one server to four, and then to two."""
    quiet_ns = time.monotonic_ns()
    begun.reach(begun.newest() + QUIET_ROUNDS)
    joining_ns = time.monotonic_ns()
    job.servers += [job.server() for _ in range(3)]
    await_status(job, begun, lambda now: len(primaries(now)) == 4, "shards on four servers")
    begun.reach(begun.newest() + AFTER_ROUNDS)
    draining_ns = time.monotonic_ns()
    going = ("server-0", "server-2")
    for name in going:
        answer = ask(job.address, name)
        if not isinstance(answer, Accepted):
            raise BenchError(f"{name} is not drained: {answer}")
    await_status(job, begun, lambda now: not primaries(now) & set(going), "shards on two servers")
    begun.reach(begun.newest() + AFTER_ROUNDS)
    usual = begun.gaps_s(quiet_ns, joining_ns)
    joining = begun.gaps_s(joining_ns, draining_ns)
    draining = begun.gaps_s(draining_ns, time.monotonic_ns())
    longest_s, median_s = max(*joining, *draining), Spread.of(usual).median
    return {
        "longest_s": longest_s,
        "longest_joining_s": max(joining),
        "longest_draining_s": max(draining),
        "usual_round_s": median_s,
        "usual_longest_s": max(usual),
        "of_usual_round": longest_s / median_s,
    }


def primaries(status: Status) -> set[str]:
    """Servers that lead some shard."""
    return {shard.server for table in status.tables for shard in table.shards}


# ---- the job goes back to a checkpoint -----------------------------------------------------------


def failbacks(place: Place, *, is_same_address: bool) -> Found:
    """Seconds from each kill until rounds are made again, and until they are new ones."""
    found: Found = {"resumed_s": [], "beyond_s": [], "rounds_again": []}
    name = "same" if is_same_address else "other"
    every, folder = place.effort.checkpoint_every, str(place.folder / f"checkpoints-{name}")
    settings = {"checkpoint": folder, "checkpoint_every": every}
    settings |= {"journal": str(place.folder / f"journal-{name}"), "rejoin_grace_s": REJOIN_GRACE_S}
    store = Store(folder)
    # Workers begin anew by running their command again, which a forked one does not have.
    with training(place, 2, settings, is_forked=False) as (job, begun):
        for _ in range(place.effort.failbacks):
            due = (begun.newest() // every + 1) * every
            begun.until(partial(has_checkpoint, store, due), f"checkpoint {due}")
            begun.reach(due + AFTER_ROUNDS)
            victim, killed_ns = kill_primary(job)
            job.servers.append(job.server(bind=victim.address if is_same_address else ""))
            for key, value in gone_back(begun, killed_ns).items():
                found[key].append(value)
    return found


def has_checkpoint(store: Store, version: int) -> bool:
    """Whether there is a checkpoint of this version or a later one."""
    return any(found >= version for found in store.versions())


def gone_back(begun: Begun, killed_ns: int) -> dict[str, float]:
    """Wait until the job has gone back and is where it was, and say how long that took."""
    begun.until(
        lambda: begun.first_ns(killed_ns, lambda n: n < begun.newest(killed_ns)) is not None,
        "an earlier round",
    )
    last = begun.newest(killed_ns)
    back = min(n for when_ns, n in begun.said if when_ns > killed_ns and n < last)
    resumed_ns = wait_ns(begun, killed_ns, lambda n: back < n < last)
    beyond_ns = wait_ns(begun, resumed_ns, lambda n: n > last)
    return {
        "resumed_s": (resumed_ns - killed_ns) / 1e9,
        "beyond_s": (beyond_ns - killed_ns) / 1e9,
        "rounds_again": last - back,
    }


def wait_ns(begun: Begun, after_ns: int, wanted: Callable[[int], bool]) -> int:
    """Wait for such a round; when it was begun."""
    begun.until(lambda: begun.first_ns(after_ns, wanted) is not None, "a round")
    found = begun.first_ns(after_ns, wanted)
    assert found is not None
    return found


# ---- a job from outside --------------------------------------------------------------------------


def kill_primary(job: Cluster) -> tuple[MemberStatus, int]:
    """Kill the primary of shard 0; who that was, and when."""
    status = parse(fetch(job.address, STATUS_MS))
    name = status.tables[0].shards[0].server
    member = next(one for one in status.live("server") if one.name == name)
    process = server_of(job, member)
    killed_ns = time.monotonic_ns()
    process.signal(signal.SIGKILL)
    process.end()
    return member, killed_ns


def server_of(job: Cluster, member: MemberStatus) -> Process:
    """The process of a server."""
    return next(server for server in job.servers if server.pid == member.pid)


def await_status(job: Cluster, begun: Begun, wanted: Callable[[Status], bool], what: str) -> None:
    """Wait until the scheduler's status is as wanted."""
    begun.until(lambda: wanted(parse(fetch(job.address, STATUS_MS))), what)


# ---- reporting -----------------------------------------------------------------------------------


PARTS: dict[str, dict[str, Callable[[Place], Found]]] = {
    "failover": {"failover": failovers},
    "resize": {"resize": resizes},
    "failback": {
        "failback, other address": partial(failbacks, is_same_address=False),
        "failback, same address": partial(failbacks, is_same_address=True),
    },
}


def measure(effort: Effort, parts: Sequence[str]) -> dict[str, object]:
    """Measure all, print the table, and return the document."""
    load = os.getloadavg()
    starter = Starter()
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            place = Place(starter, effort, Path(folder))
            found = {what: run(place) for part in parts for what, run in PARTS[part].items()}
    finally:
        starter.close()
    loads = {"before": load, "after": os.getloadavg()}
    spreads = {
        (what, key): Spread.of(values).document(3)
        for what, figures in found.items()
        for key, values in figures.items()
    }
    rows = [
        [f"{what}: {key}", *(f"{spread[of]:.3f}" for of in ("min", "median", "max"))]
        for (what, key), spread in spreads.items()
    ]
    title = f"{effort.parameters:,} parameters; load {load[0]:.1f} before, {loads['after'][0]:.1f} "
    print_table(f"{title}after", ["", "min", "median", "max"], rows)
    results = {what: {key: spreads[what, key] for key in found[what]} for what in found}
    deciding = {key: getattr(Settings(), key) for key in DECIDING}
    return {
        "effort": asdict(effort),
        "settings": deciding,
        "load": loads,
        "results": results,
        "machine": machine(),
    }


def main() -> None:
    """Measure, and print."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    usual = Effort(KILLS_MIN, WINDOWS_MIN, 3, 2_200_000, 5.0, 50)
    for key, value in asdict(usual).items():
        made.add_argument(f"--{key.replace('_', '-')}", type=type(value), default=value)
    made.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    given = vars(made.parse_args())
    parts = given.pop("parts").split(",")
    effort = Effort(**given)
    if unknown := [part for part in parts if part not in PARTS]:
        sys.exit(f"there is no part {unknown}")
    if min(effort.kills, effort.resizes, effort.failbacks) < 1:
        sys.exit("--kills, --resizes and --failbacks >= 1")
    print_document(measure(effort, parts))


if __name__ == "__main__":
    start(main)
