"""The live page of a real job in a real browser: what happens is shown, who is to leave drained."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.jobs.whole_numbers import SLOTS
from tests.integration.test_cli import JOB, QUICK, Shell, shell
from tests.integration.test_survival import found
from tests.support.browser import Browser, needs_browser
from tests.support.processes import Cluster, Gate, Starter

__all__ = ["shell"]

GATED = JOB.replace('print("fin', 'open(sys.argv[1]).close()\nprint("fin').replace("0.02", "0.05")

SERVERS, WORKERS = 3, 2
SHOWN_S_MAX = 2.0
MEMBER = "Treefold.model.status.members.find((one) => one.name === 'worker-1')"
EVENT = "Treefold.model.status.events.find((one) => /^worker-1 died/.test(one.text))"
CHAINS = """
Treefold.model.status.tables[0].shards.length > 1 &&
Treefold.model.status.tables[0].shards.every((shard) => shard.backups.length === 1 &&
  document.querySelector("#chains").textContent.includes(`${shard.server} → ${shard.backups[0]}`))
"""
COLOURS = """
const canvas = document.querySelector("#lanes canvas");
const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
const found = new Set();
for (let i = 0; i < data.length; i += 4) found.add(`${data[i]},${data[i + 1]},${data[i + 2]}`);
return [...found];
"""
COMPUTE, WAIT, IDLE = "59,111,182", "185,191,202", "255,255,255"


@pytest.fixture
def cluster(starter: Starter, tmp_path: Path) -> Iterator[Cluster]:
    """A job that goes on until it is told, with a page, an audit log and a report."""
    settings: dict[str, object] = {
        "servers": SERVERS, "workers": WORKERS, "replicas": 2, "slots": SLOTS, "page_port": 0,
        "audit": str(tmp_path / "audit"), "report": str(tmp_path / "report.html"),
    }  # fmt: skip
    (tmp_path / "slow").touch()
    with Cluster(starter, settings) as made:
        for _ in range(WORKERS):
            last, slow = str(tmp_path / "last"), str(tmp_path / "slow")
            made.worker("open_ended.py", "--last", last, "--slow", slow)
        yield made


def shows(selector: str, text: str) -> str:
    """An expression that is true when an element has a text in it."""
    return (
        f"document.querySelector({json.dumps(selector)}).textContent.includes({json.dumps(text)})"
    )


@needs_browser
def test_the_page_shows_a_job_a_kill_and_a_drain_and_is_saved_as_a_report(
    cluster: Cluster, tmp_path: Path, measured: list[str]
) -> None:
    link = cluster.scheduler.line(r"^page (http://127\.0\.0\.1:\d+/#\S+)$")[1]
    with Browser() as browser:
        browser.open(link)
        assert "#" not in browser.run("return location.href")
        browser.until("Treefold.model.status.round > 2")
        browser.until("document.body.dataset.draws > 4")
        for curve in ("samples/s", "rounds/s", "passes"):
            browser.until(shows("#curves", curve))
        for name in ("worker-0", "worker-1", "server-0", "server-1", "server-2"):
            browser.until(f"document.querySelector('.tile.live[data-member={name}]')")
        browser.until(CHAINS)
        # Weights are sums of whole gradients; of 280,000 elements in shards on three servers.
        browser.until("Treefold.model.tensors.some((one) => one.weights.count === 280000)")
        browser.until("Treefold.model.tensors.some((one) => one.gradient && one.gradient.norm > 0)")
        browser.until(shows("#tensors", "model: weight"))
        assert {COMPUTE, WAIT, IDLE} <= set(browser.run(COLOURS))
        assert len(set(browser.screenshot())) == 256

        pid = browser.run(f"return {MEMBER}.pid")
        [victim] = [worker for worker in cluster.workers if worker.pid == pid]
        victim.signal(signal.SIGKILL)
        shown = browser.until(
            f"document.getElementById('events').textContent.includes({EVENT}.text)"
        )
        browser.until("document.querySelector('.tile.dead[data-member=worker-1]')")
        took = shown - browser.run(f"return {EVENT}.at")
        measured.append(f"live page: a kill is shown {took:.1f} s after the scheduler knew of it")
        assert took < SHOWN_S_MAX

        browser.click(".tile[data-member=server-2]")
        browser.click("#drain")
        assert "Yes" in browser.run("return document.getElementById('drain').textContent")
        browser.click("#drain")
        browser.until("document.querySelector('.tile.left[data-member=server-2]')")
        browser.until(f"!{shows('#chains', 'server-2')[:-1]})")
        deeds = [json.loads(line) for line in (tmp_path / "audit").read_text().splitlines()]
        [drained] = [
            deed for deed in deeds if deed["what"] == "DrainRequest" and deed["role"] == "page"
        ]
        assert (drained["text"], drained["is_allowed"]) == ("server-2", True)

        (tmp_path / "slow").unlink()
        (tmp_path / "last").write_text("0")
        browser.until(shows("#connection", "over"))
        browser.until(shows("#notice", "The job is over (done)"))
        assert browser.console() == []

        cluster.end(victim)
        browser.open(f"file://{tmp_path / 'report.html'}")
        browser.until("document.body.dataset.draws > 0")
        for part, text in (
            ("#connection", "report of"),
            ("#curves", "passes"),
            ("#events", "worker-1"),
        ):
            assert text in browser.run(f"return document.querySelector({part!r}).textContent"), part
        assert COMPUTE in browser.run(COLOURS)
        assert browser.run("return performance.getEntriesByType('resource').length") == 0
        assert browser.console() == []


@needs_browser
def test_a_page_of_a_launch_goes_on_when_the_scheduler_is_started_again_and_is_saved(
    shell: Shell,
) -> None:
    with Gate(shell.folder / "gate") as gate, Browser() as browser:
        now, end = shell.folder / "now.html", shell.folder / "end.html"
        sizes = ("--servers", "2", "--workers", "1", "--replicas", "2", "--report", str(end))
        run = shell.start("run", *sizes, *QUICK, shell.script(GATED), str(gate.path))
        link = run.line(r"^treefold \| live page (http://127\.0\.0\.1:\d+/#\S+)$")[1]
        browser.open(link)
        browser.until("Treefold.model.status.round > 2 && Treefold.model.columns.length > 2")
        first = browser.run("return Treefold.model.columns[0]")
        found(shell, "scheduler").send_signal(signal.SIGKILL)
        browser.until("Treefold.model.status.events.some((one) => /began anew/.test(one.text))")
        browser.until(shows("#connection", "live"))
        assert browser.run("return Treefold.model.columns[0]") == first
        assert "the scheduler began, and" in browser.run("return document.body.textContent")

        saved = shell.run("report", str(now))
        assert (saved.returncode, saved.stderr) == (0, "")
        assert '"is_live":false' in now.read_text(encoding="utf-8")
        wrong = shell.run("report", str(now), link.partition("#")[0] + "#wrong-wrong-wrong-wrong")
        assert wrong.returncode == 3
        gate.open()
        assert run.end() == 0
        assert '"outcome":"done"' in end.read_text(encoding="utf-8")
