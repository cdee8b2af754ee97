"""A cluster on five hosts whose paths are cut and healed while it trains, and what came of it.

The scheduler is on host 0, servers on 1 and 2, workers on 3 and 4. Waits are for what workers print
and what the scheduler's status says; nothing is waited for by time but the end of a cut.
"""

import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.integration.jobs import open_ended
from tests.integration.jobs.whole_numbers import SLOTS
from tests.support.netns import Network, network
from tests.support.processes import PATIENCE_S, Cluster
from treefold.common import ledger
from treefold.common.tree import Node, span
from treefold.launch.link import Status, fetch, parse

HOSTS = ("scheduler", "server 0", "server 1", "worker 0", "worker 1")
SCHEDULER, SERVERS, WORKERS = 0, (1, 2), (3, 4)
STATUS_MS = 4_000
POLL_S = 0.05  # between two looks at what nobody tells of
BEGUN_ROUND = 5  # nothing is cut before
PASSES_AHEAD = 6  # how far the last pass is ahead of the newest one when it is chosen
GRACE = 1  # versions that a server may still publish after a cut: it was told that all hold them
HANDOVERS_MAX = 4  # of a shard because of one cut: promoted, dropped, joined, moved back
MakeCluster = Callable[..., Cluster]
Path_ = tuple[int, int]
"""Source and target host of what a cut loses."""
Versions = dict[tuple[int, int], int]
"""The newest version of each table and shard."""


class Cut(NamedTuple):
    """What was cut, for how long, and what happened.

    ``before`` and ``after`` are the versions that each server had published as primary, at the
    begin of the cut and at its end. From healing on, a new round came after ``progress_s``, and all
    was as before after ``whole_s``: chains, members, and every worker with slots of new rounds.
    """

    name: str
    seconds: float
    before: dict[int, Versions]
    after: dict[int, Versions]
    progress_s: float
    whole_s: float

    def published(self, host: int) -> int:
        """How many versions of some shard a server published meanwhile, at the most."""
        first = self.before[host]
        return max((v - first.get(k, v - 1) for k, v in self.after[host].items()), default=0)

    @property
    def newest(self) -> int:
        """How many versions came meanwhile, of the shard that came furthest."""
        return _newest(self.after) - _newest(self.before)


class Slow(NamedTuple):
    """A host whose frames take a while, and some of which are lost."""

    host: int
    delay_ms: float
    loss: float


@dataclass
class Partitioned:
    """A cluster that trains, and a network whose paths can be cut.

    Attributes
    ----------
    job : Cluster
        The processes.
    network : Network
        Their hosts.
    visitor : ThreadPoolExecutor
        A thread on the scheduler's host.
    folder : Path
        Of the ledger and the files that workers look at.
    """

    job: Cluster
    network: Network
    visitor: ThreadPoolExecutor
    folder: Path
    cuts: list[Cut] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)

    def begin(self) -> None:
        """Start the workers, and wait until training goes on."""
        (self.folder / "slow").touch()
        files = (f"--last={self.folder / 'last'}", f"--slow={self.folder / 'slow'}")
        for _ in WORKERS:
            self.job.worker("open_ended.py", *files)
        assert self.job.starter.wait(lambda: self.round() >= BEGUN_ROUND), "no round came"
        self.become_whole()
        pids = {member.pid: member.incarnation for member in self.status().live("server")}
        servers = zip(SERVERS, self.job.servers, strict=True)
        self.names = {host: f"server-{pids[server.pid]}" for host, server in servers}

    def leader(self) -> int:
        """The host of a server that leads some shard."""
        status = self.status()
        name = status.tables[0].shards[0].server
        pid = next(member.pid for member in status.live("server") if member.name == name)
        return SERVERS[[server.pid for server in self.job.servers].index(pid)]

    def cut(self, paths: Sequence[Path_], seconds: float) -> Cut:
        """Cut paths for some time, heal them, and wait until all is as before."""
        for source, target in paths:
            self.network.cut(source, target)
        before = self.published()
        time.sleep(seconds)
        after = self.published()
        for source, target in paths:
            self.network.heal(source, target)
        healed_s = time.monotonic()
        now = self.round()
        self.go_on()
        progress_s = time.monotonic() - healed_s
        self.become_whole()
        came = self.job.starter.wait(lambda: min(self.rounds()) > now)
        assert came, f"a worker takes part in no round after {now}"
        whole_s = time.monotonic() - healed_s
        done = Cut(name_of(paths), seconds, before, after, progress_s, whole_s)
        self.cuts.append(done)
        return done

    def go_on(self) -> None:
        """Wait until some worker is in a newer round than anybody is now."""
        now = self.round()
        came = self.job.starter.wait(lambda: self.round() > now)
        assert came, f"no round after {now} within {PATIENCE_S} s"

    def round(self) -> int:
        """The newest round that a worker is in, -1 before the first."""
        return max(self.rounds())

    def rounds(self) -> list[int]:
        """The newest round that each worker has computed something of."""
        return [_last_round(worker.lines) for worker in self.job.workers]

    def become_whole(self) -> None:
        """Wait until everybody is a member and every shard has its backup."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not is_whole(status := self.status()):
            assert time.monotonic() < deadline_s, f"not as before after {PATIENCE_S} s\n{status}"
            time.sleep(POLL_S)

    def become_disconnected(self, source: int, target: int) -> None:
        """Wait until a host has no connection to another any more."""
        deadline_s = time.monotonic() + PATIENCE_S
        to = ("state", "established", "dst", self.network.address(target))
        command = self.network.command(source, ["ss", "-tnH", *to])
        while subprocess.check_output(command):
            assert time.monotonic() < deadline_s, f"connected for {PATIENCE_S} s"
            time.sleep(POLL_S)

    def status(self) -> Status:
        """What the scheduler says, asked on its own host."""
        return parse(self.visitor.submit(fetch, self.job.address, STATUS_MS).result())

    def published(self) -> dict[int, Versions]:
        """The newest version of each shard that each server has published as its primary."""
        found: dict[int, Versions] = {host: {} for host in SERVERS}
        for host, record in self._records():
            key = record.table, record.shard
            found[host][key] = max(record.version, found[host].get(key, 0))
        return found

    def finish(self) -> None:
        """Let the job end, and check that all went in once and that no two servers disagree."""
        last = self.round() // open_ended.ROUNDS + PASSES_AHEAD
        (self.folder / "draft").write_text(str(last), encoding="ascii")
        (self.folder / "draft").rename(self.folder / "last")
        assert self.round() // open_ended.ROUNDS < last, "the job outran its end"
        (self.folder / "slow").unlink()
        self.job.end()
        finals = {worker.line("^final (.*)$")[1] for worker in self.job.workers}
        assert finals == {f"exact after {last + 1} passes"}
        ledger.state_digest(str(self.folder / "ledger"))  # copies that differ raise
        self._check_samples(last + 1)
        self._check_publishers((last + 1) * open_ended.ROUNDS)

    def _check_samples(self, passes: int) -> None:
        """Every sample of every pass was used once."""
        samples: dict[int, dict[int, list[int]]] = {}
        for record in ledger.read(str(self.folder / "ledger")):
            if isinstance(record, ledger.SamplesRecord):
                slots = samples.setdefault(record.round, {})
                known = slots.setdefault(record.slot, record.samples)
                assert known == record.samples, f"workers disagree on {record}"
        for number in range(passes):
            first = number * open_ended.ROUNDS
            rounds = [samples[first + round_] for round_ in range(open_ended.ROUNDS)]
            used = [sample for slots in rounds for own in slots.values() for sample in own]
            assert sorted(used) == list(range(open_ended.SAMPLES)), f"pass {number}"

    def _check_publishers(self, versions: int) -> None:
        """Every version has each slot once, and was published by one server or by two alike.

        By two where the shard was handed over. Who contributed is not known to a server that this
        version was copied to; to the initial values nobody did.
        """
        made: dict[tuple[int, int, int], dict[int, list[tuple[int, int, int]]]] = {}
        for host, record in self._records():
            by_host = made.setdefault((record.table, record.shard, record.version), {})
            by_host[host] = by_host.get(host) or record.contributors
        for (table, shard, version), by_host in made.items():
            known = {tuple(contributors) for contributors in by_host.values() if contributors}
            where = f"table {table}, shard {shard}, version {version}: {by_host}"
            assert version == 0 or len(known) == 1, where
            for contributors in known if version else ():
                spans = [span(Node(*one[:2]), SLOTS) for one in contributors]
                slots = sorted(slot for span_ in spans for slot in range(*span_))
                assert slots == list(range(SLOTS)), where
        shards = {(table, shard) for table, shard, _ in made}
        assert sorted(made) == sorted((*key, v) for key in shards for v in range(versions + 1))
        twice = Counter(key[:2] for key, by_host in made.items() if len(by_host) > 1)
        assert max(twice.values(), default=0) <= HANDOVERS_MAX * (1 + len(self.cuts)), twice

    def _records(self) -> Iterator[tuple[int, ledger.VersionRecord]]:
        for host, name in self.names.items():
            for record in ledger.read(str(self.folder / "ledger"), name):
                if isinstance(record, ledger.VersionRecord):
                    yield host, record


@contextmanager
def partitioned(
    cluster: MakeCluster, folder: Path, slow: Slow | None = None, **settings: object
) -> Iterator[Partitioned]:
    """Five processes on five hosts, which train.

    Parameters
    ----------
    cluster : callable
        The fixture.
    folder : Path
        For what it writes.
    slow : Slow, optional
        A host that is reached slowly from the start.
    settings :
        Of the cluster, beside those that a network needs. The times are those by default.
    """
    folder.mkdir()
    times = {"heartbeat_ms": 500, "dead_after_ms": 2_000, "retry_ms": 1_000}
    fixed = {"replicas": 2, "lane": "socket", "insecure": True}
    files = {"journal": str(folder / "journal"), "ledger": str(folder / "ledger")}
    with ExitStack() as stack:
        net = stack.enter_context(network(len(HOSTS)))
        if slow is not None:
            stack.enter_context(net.slow(*slow))
        visitor = stack.enter_context(net.visit(SCHEDULER))
        job = cluster(2, 2, network=net, **times, **fixed, **files, **settings)
        made = Partitioned(stack.enter_context(job), net, visitor, folder)
        made.begin()
        yield made


def is_whole(status: Status) -> bool:
    """Whether everybody is a member, and every shard has a backup and nobody is copied to."""
    shards = [shard for table in status.tables for shard in table.shards]
    is_complete = len(status.live("server")) == len(SERVERS)
    is_complete &= len(status.live("worker")) == len(WORKERS)
    return is_complete and all(len(s.backups) == 1 and not s.joining for s in shards)


def name_of(paths: Sequence[Path_]) -> str:
    """Paths in words: ``worker 0 - server 1`` for both ways, ``worker 0 > server 1`` for one."""
    words = []
    for source, target in paths:
        is_both = (target, source) in paths
        if not is_both or source < target:
            words.append(f"{HOSTS[source]} {'-' if is_both else '>'} {HOSTS[target]}")
    return ", ".join(words)


def report(cuts: Sequence[Cut]) -> str:
    """The distribution of the times from healing to a new round, in one line."""
    times = sorted(cut.progress_s for cut in cuts)
    slowest = max(cuts, key=lambda cut: cut.progress_s)
    whole = max(cut.whole_s for cut in cuts)
    return (
        f"partitions: {len(cuts)} cuts of {slowest.seconds:g} s, from healing to a new round min "
        f"{times[0]:.2f} s, median {statistics.median(times):.2f} s, max {times[-1]:.2f} s "
        f"({slowest.name}); until all was as before max {whole:.2f} s"
    )


def _last_round(lines: list[str]) -> int:
    for line in reversed(lines):
        if line.startswith("round "):
            return int(line[6:])
    return -1


def _newest(published: dict[int, Versions]) -> int:
    return max(version for versions in published.values() for version in versions.values())
