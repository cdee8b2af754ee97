"""A real Prometheus asks the members of a real job, and sees what they do."""

import json
import re
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.integration.jobs.whole_numbers import SLOTS
from tests.support.processes import Cluster, Starter
from tests.support.promtool import SHIPPED, names_in, promtool, queries, tool
from treefold.common.metrics import METRICS, PREFIX

SERVERS, WORKERS = 2, 2
EMPTY = ("worker_loss", "updates_rejected_total", "checkpoint_last_success_timestamp_seconds")
"""Metrics of the dashboard that a job without losses, refusals and checkpoints has no values of."""


def fetch(url: str) -> str:
    """What an address answers."""
    with urllib.request.urlopen(url, timeout=20) as answer:  # noqa: S310 # addresses of this test
        return str(answer.read().decode())


@dataclass
class Prometheus:
    """A Prometheus on a free port."""

    process: subprocess.Popen[bytes]

    @property
    def port(self) -> int:
        """Where it listens, 0 while it does not."""
        found = psutil.Process(self.process.pid).net_connections("tcp")
        return next((one.laddr.port for one in found if one.status == psutil.CONN_LISTEN), 0)

    def ask(self, query: str) -> list[dict[str, object]]:
        """The series that a query comes to; none while Prometheus does not listen yet."""
        if not self.port:
            return []
        words = urllib.parse.urlencode({"query": query})
        answer = json.loads(fetch(f"http://127.0.0.1:{self.port}/api/v1/query?{words}"))
        assert answer["status"] == "success", answer
        found: list[dict[str, object]] = answer["data"]["result"]
        return found

    def has(self, query: str) -> bool:
        """Whether a query comes to anything."""
        return bool(self.ask(query))

    def values(self, query: str) -> list[float]:
        """The values of those series."""
        return [float(one["value"][1]) for one in self.ask(query)]  # type: ignore[index] # [time, value]


@pytest.fixture
def cluster(starter: Starter, tmp_path: Path) -> Iterator[Cluster]:
    """An asynchronous job with copies, all of whose members can be asked."""
    settings: dict[str, object] = {
        "servers": SERVERS, "workers": WORKERS, "replicas": 2, "slots": SLOTS,
        "consistency": "async", "metrics_port": 0,
    }  # fmt: skip
    (tmp_path / "slow").touch()
    with Cluster(starter, settings) as made:
        for _ in range(WORKERS):
            last, slow = str(tmp_path / "last"), str(tmp_path / "slow")
            made.worker("open_ended.py", "--last", last, "--slow", slow)
        yield made


@pytest.fixture
def prometheus(cluster: Cluster, tmp_path: Path) -> Iterator[Prometheus]:
    """A Prometheus with the configuration that is shipped, but for the address and the pace."""
    text = (SHIPPED / "prometheus.yml").read_text(encoding="utf-8")
    text = text.replace("127.0.0.1:9100", cluster.scheduler.line(r"http://(\S+)/metrics")[1])
    text = re.sub(r"interval: 5s", "interval: 1s", text)
    (tmp_path / "prometheus.yml").write_text(text)
    (tmp_path / "alerts.yml").write_text((SHIPPED / "alerts.yml").read_text())
    command = [
        tool("prometheus"),
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        "--web.listen-address=127.0.0.1:0",
    ]
    with (tmp_path / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    yield Prometheus(process)
    process.kill()
    process.wait()


def check_names(text: str, role: str) -> None:
    """A process names what its role has and nothing else, as promtool wants it."""
    named = re.findall(rf"^# TYPE {PREFIX}(\w+) ", text, re.MULTILINE)
    assert sorted(named) == sorted(m.name for m in METRICS if role in m.roles)
    samples = re.findall(rf"^{PREFIX}(\w+?)(?:_bucket|_sum|_count)?(?:{{| )", text, re.MULTILINE)
    assert set(samples) <= set(named)
    checked = promtool("check", "metrics", text=text)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_prometheus_finds_all_members_of_a_job_and_sees_what_they_do(
    cluster: Cluster, prometheus: Prometheus, tmp_path: Path
) -> None:
    everybody = 1 + SERVERS + WORKERS
    moving = f"count(rate({PREFIX}worker_samples_total[1m]) > 0) == {WORKERS}"
    stale = f"sum({PREFIX}staleness_steps_count) > 0"
    for query in (f"count(up == 1) == {everybody}", moving, stale):
        cluster.until(partial(prometheus.has, query), query)

    members = json.loads(fetch(cluster.scheduler.line(r"(http://\S+)/metrics")[1] + "/targets"))
    assert len(members) == everybody
    for member in members:
        text = fetch(f"http://{member['targets'][0]}/metrics")
        check_names(text, member["labels"]["instance"].partition("-")[0])

    assert prometheus.values(f'{PREFIX}cluster_nodes{{role="server",state="live"}}') == [SERVERS]
    assert sum(prometheus.values(f"{PREFIX}slots")) == SLOTS
    assert len(prometheus.ask(f"{PREFIX}worker_step")) == WORKERS
    assert len(prometheus.ask(f"{PREFIX}worker_steps_total > 0")) == WORKERS
    assert len(prometheus.ask(f'{PREFIX}busy_seconds_total{{activity="compute"}} > 0')) == WORKERS
    assert sum(prometheus.values(f"{PREFIX}worker_wait_seconds_total")) > 0
    led = f'{PREFIX}contributions_applied_total{{table="model"}}'
    # Nothing is refused, every slot counts once per shard, and a version is one contribution.
    assert prometheus.values(f"max({led}) > 0 and max({led}) <= max({PREFIX}shard_version)")
    assert len(prometheus.ask(f'{PREFIX}staleness_steps_sum{{worker=~"worker-[01]"}}')) == WORKERS
    assert set(prometheus.values(f"{PREFIX}replication_lag_updates")) <= {0.0, 1.0}
    assert min(prometheus.values("process_resident_memory_bytes")) > 1 << 20
    for query in queries((SHIPPED / "dashboard.json").read_text(encoding="utf-8")):
        is_empty = any(name.removeprefix(PREFIX) in EMPTY for name in names_in(query))
        assert prometheus.has(query) is not is_empty, query
    assert json.loads(fetch(f"http://127.0.0.1:{prometheus.port}/api/v1/alerts"))["data"] == {
        "alerts": []
    }

    (tmp_path / "slow").unlink()
    (tmp_path / "last").write_text("0")
    cluster.end()
    finals = [worker.line(r"^final (\S+)")[1] for worker in cluster.workers]
    assert finals == ["exact"] * WORKERS
