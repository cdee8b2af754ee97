"""The live page of a made-up job of 200 workers, in a real browser: usable, and runs no name."""

import json
import re
from pathlib import Path

from tests.support.browser import Browser, needs_browser
from tests.support.synthetic import LOOKING, Synthetic, served
from treefold.scheduler.report import report_of

WORKERS, SERVERS = 200, 20
CODE = "document.title='hacked'"
HOSTILE = f'<img src=x onerror="{CODE}"></script><script>{CODE}</script>'
UPDATES = 10
DRAW_MS_MAX = 1_000.0  # an update a second must leave time for whoever looks
ROW = "return Treefold.model.members('worker').length + Treefold.model.members('server').length"


@needs_browser
def test_a_page_with_two_hundred_workers_updates_scrolls_and_runs_no_name(
    tmp_path: Path, measured: list[str]
) -> None:
    job, drained = Synthetic(WORKERS, SERVERS, HOSTILE), list[str]()
    job.event(HOSTILE)
    with served(job, drained) as (link, feed), Browser() as browser:
        browser.open(link)
        browser.until("document.body.dataset.draws > 0")
        for number in range(UPDATES):
            job.step()
            feed.publish(job.news())
            browser.until(
                f"Treefold.model.at === {job.at} && document.body.dataset.draws > {number}"
            )
        took = float(browser.run("return document.body.dataset.drawMs"))
        measured.append(f"live page, {WORKERS} workers: the slowest update took {took:.0f} ms")
        assert took < DRAW_MS_MAX
        assert browser.run(ROW) == WORKERS + SERVERS
        assert browser.run("return document.querySelectorAll('.tile').length") == WORKERS + SERVERS

        text = "return document.querySelector(arguments[0]).textContent"
        assert "server-7 is being given it" in browser.run(text, "#chains")
        assert "2 · 255/s" in browser.run(text, ".tile[data-member=worker-199]")
        assert re.search(r"leads 4, backs up 4busy \d+ %", browser.run(text, "#servers"))
        assert "not finite" in browser.run(text, "#tensors")
        assert "async" in browser.run(text, "#staleness")

        before = browser.run("return document.querySelector('#lanes canvas').toDataURL()")
        browser.run("document.getElementById('lanes').scrollTop = 600")
        browser.until(
            f"document.querySelector('#lanes canvas').toDataURL() !== {json.dumps(before)}"
        )

        browser.click(".tile[data-member=worker-199]")
        browser.until("document.getElementById('member').textContent.includes('<img src=x')")
        browser.click("#drain")
        browser.click("#drain")
        browser.until(
            "document.getElementById('member').textContent.includes('hands its work over')"
        )
        assert drained == ["worker-199"]
        assert browser.run("return document.title") == "treefold"

        browser.open(link.partition("#")[0] + f"#{LOOKING}")
        browser.run("location.reload()")
        browser.until("Treefold.model.status && !Treefold.model.mayDrain")
        browser.click(".tile[data-member=worker-199]")
        browser.until("!document.getElementById('member').hidden")
        assert browser.run("return document.getElementById('drain')") is None

        file = tmp_path / "report.html"
        file.write_bytes(report_of(job.begin(is_live=False)))
        browser.open(f"file://{file}")
        browser.until("document.body.dataset.draws > 0")
        assert HOSTILE in browser.run("return document.getElementById('events').textContent")
        assert browser.run("return document.title") == "treefold"
        assert browser.console() == []


@needs_browser
def test_a_page_without_its_token_asks_for_it_and_shows_nothing() -> None:
    with served(Synthetic(2, 1)) as (link, _), Browser() as browser:
        browser.open(link.partition("#")[0] + "#a-token-that-is-wrong")
        browser.until("!document.getElementById('entry').hidden")
        assert browser.run("return Treefold.model.status") is None
        browser.run("document.getElementById('token').value = arguments[0]", link)
        browser.click("#entry button")
        browser.until("Treefold.model.status && document.body.dataset.draws > 0")
