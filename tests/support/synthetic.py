"""A made-up cluster for the live page: as many workers and servers as one likes, second by second.

    python -m tests.support.synthetic [WORKERS SERVERS]

serves it until it is stopped, and prints the link.
"""

import json
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from treefold.scheduler.feed import Feed
from treefold.scheduler.lanes import ACTIVITIES
from treefold.scheduler.pages import Desk, PageServer, Right
from treefold.scheduler.report import report_of

TOKEN = "sixteen-letters-or-more"  # noqa: S105 # of a job of which nothing is true
LOOKING = "may-only-look-at-things"
BEGIN = 1_790_000_000.0
PAST = 120
SHARDS_PER_SERVER = 4


class Synthetic:
    """A job of which nothing is true.

    Parameters
    ----------
    workers, servers : int
        How many.
    host : str
        What all of them say that their host is called.
    """

    def __init__(self, workers: int, servers: int, host: str = "node") -> None:
        self._random = random.Random(7)
        self._workers, self._servers, self._host = workers, servers, host
        self._seconds = 0
        self.events: list[dict[str, object]] = []
        self.cells: dict[str, list[list[int]]] = {f"worker-{n}": [] for n in range(workers)}
        self.cells |= {f"server-{n}": [] for n in range(servers)}
        self.series: dict[str, list[tuple[float, int, float]]] = {}
        for _ in range(PAST):
            self.step()
        self.event("the job begins")

    @property
    def at(self) -> float:
        """Now."""
        return BEGIN + self._seconds

    def event(self, text: str) -> None:
        """Something happens."""
        self.events.append({"number": len(self.events) + 1, "at": self.at, "text": text})

    def step(self) -> None:
        """A second goes by."""
        self._seconds += 1
        draw = self._random.random
        for name, cells in self.cells.items():
            if name.startswith("worker"):
                compute = int(55 + 30 * draw())
                cells.append(
                    [compute, int(6 * draw()), int(8 * draw()), int((90 - compute) * draw())]
                )
            else:
                cells.append([int(30 * draw()), int(20 * draw()), int(9 * draw()), 0])
        points = {
            "loss": 2.3 / (1 + self._seconds / 30) + 0.05 * draw(),
            "samples/s": 51_000 + 4_000 * draw(),
            "rounds/s": 24 + 2 * draw(),
            "accuracy": 1 - 0.9 / (1 + self._seconds / 40),
        }
        for name, value in points.items():
            self.series.setdefault(name, []).append((self.at, 24 * self._seconds, value))

    def begin(self, *, is_live: bool = True) -> bytes:
        """What a page begins with."""
        return self._document(
            series=self.series,
            activities={role.name.lower(): list(names) for role, names in ACTIVITIES.items()},
            columns=[BEGIN + second + 1 for second in range(self._seconds)],
            lanes=self._lanes(self._seconds),
            is_live=is_live,
            tensors=[self._tensor(n) for n in range(12)],
        )

    def news(self) -> bytes:
        """What the last second brought."""
        return self._document(
            points={name: points[-1] for name, points in self.series.items()},
            columns=[BEGIN + second + 1 for second in range(self._seconds - 10, self._seconds)],
            lanes=self._lanes(10),
        )

    def _lanes(self, columns: int) -> dict[str, object]:
        return {
            name: {"role": name.partition("-")[0], "cells": cells[-columns:]}
            for name, cells in self.cells.items()
        }

    def _document(self, **parts: object) -> bytes:
        status = {
            "phase": "running", "view": 41, "round": 24 * self._seconds, "slots": 2 * self._workers,
            "expected": {"servers": self._servers, "workers": self._workers},
            "plan": {"end_round": 50_000}, "ending": None, "events": self.events,
            "members": [*self._members("server"), *self._members("worker")],
            "tables": [self._table()],
        }  # fmt: skip
        return json.dumps(parts | {"at": self.at, "status": status}).encode()

    def _members(self, role: str) -> list[dict[str, object]]:
        is_worker = role == "worker"
        return [
            {
                "name": f"{role}-{n}", "role": role, "rank": n, "state": "live", "pid": 4_000 + n,
                "incarnation": n + 1 + (1_000 if is_worker else 0), "host": self._host,
                "address": "tcp://10.0.0.1:1", "seen_ms_ago": 100, "is_draining": False,
                "slots": [2 * n, 2 * n + 1] if is_worker else [], "round": 24 * self._seconds,
                "slot_time_ms": 19.5, "samples": 255 * self._seconds, "loss": 0.5,
                "waiting": f"version {24 * self._seconds} of table model shard {n % 80}",
                "rss_bytes": 400 << 20, "cpu_percent": 97.0,
            }
            for n in range(self._workers if is_worker else self._servers)
        ]  # fmt: skip

    def _tensor(self, number: int) -> dict[str, object]:
        sums = {"count": 4_096, "mean": 0.01, "std": 0.3, "min": -1.2, "max": 1.3, "norm": 20.0}
        name = f"layers.{number}.weight"
        lost = sums | {"mean": None, "norm": None}
        kinds = {"weights": sums, "gradient": lost if number == 5 else sums}
        return {"table": "model", "name": name, "shape": [64, 64], **kinds}

    def _table(self) -> dict[str, object]:
        server = "server-{}".format
        shards = [
            {
                "shard": n, "server": server(n % self._servers), "first_block": n, "blocks": 1,
                "backups": [server((n + 1) % self._servers)],
                "joining": [server((n + 2) % self._servers)] if n == 5 else [],
            }
            for n in range(SHARDS_PER_SERVER * self._servers)
        ]  # fmt: skip
        counts = {"worker-3": {"contributions": 4_000, "median": 1, "p99": 7}}
        return {"name": "model", "consistency": "async", "staleness": counts, "shards": shards}


@contextmanager
def served(job: Synthetic, drained: list[str] | None = None) -> Iterator[tuple[str, Feed]]:
    """Serve a made-up job; gives the link and what hands out news."""
    feed, left = Feed(), [] if drained is None else drained

    def drain(member: str) -> str:
        left.append(member)
        return "" if member in job.cells else f"there is no {member!r}"

    rights = {TOKEN: Right.DRAIN, LOOKING: Right.LOOK}
    report = lambda: report_of(job.begin(is_live=False))  # noqa: E731 # as the next one
    desk = Desk(feed, job.begin, report, drain, rights, "127.0.0.1")
    server = PageServer("127.0.0.1", 0, desk)
    server.start("synthetic")
    try:
        yield f"http://127.0.0.1:{server.port}/#{TOKEN}", feed
    finally:
        feed.end(1.0)
        server.stop()


def main() -> None:
    """Serve one until somebody stops it."""
    workers, servers = [int(word) for word in sys.argv[1:]] or [200, 20]
    job = Synthetic(workers, servers)
    with served(job) as (link, feed):
        sys.stdout.write(f"{link}\n")
        sys.stdout.flush()
        while not threading.Event().wait(1.0):
            job.step()
            feed.publish(job.news())


if __name__ == "__main__":
    main()
