"""Clusters larger than any machine here: real cores and messages, simulated time and network.

    python -m bench.simulated [--workers 10,30,100,300,1000] [--servers 100] [--svg FILE]

Run from the root of the repository. Every worker computes one slot of 500 ms and every process has
a link of 10 Gbit/s; the model has 25 million float32 parameters. What servers compute takes no
time. Prints what a member exchanges per round, control messages, and rounds per second; writes them
as a curve, and a last line of JSON. It takes about a millisecond per round, worker and server: nine
minutes of one core with 1,000 workers, and 1 GB of memory.
"""

import argparse
import gc
from dataclasses import asdict
from pathlib import Path

from bench._harness import print_document, print_table
from tests.sim.scale import Figures, Job, quiet_rounds

WIDTH, HEIGHT, MARGIN = 640, 360, 60
GARBAGE_AFTER = 1_000_000  # objects; to look through millions of live ones takes long


def curve(found: dict[int, Figures], title: str) -> str:
    """An SVG picture of rounds per second over workers."""
    top = max(figures.rounds_per_s for figures in found.values())
    step = (WIDTH - 2 * MARGIN) / max(1, len(found) - 1)
    points = [
        (MARGIN + n * step, HEIGHT - MARGIN - figures.rounds_per_s / top * (HEIGHT - 2 * MARGIN))
        for n, figures in enumerate(found.values())
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    texts = [
        f'<text x="{x:.1f}" y="{HEIGHT - MARGIN + 20}">{workers}</text>'
        f'<text x="{x:.1f}" y="{y - 10:.1f}">{figures.rounds_per_s:.2f}</text>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#1f6fb4"/>'
        for (x, y), (workers, figures) in zip(points, found.items(), strict=True)
    ]
    size = f'width="{WIDTH}" height="{HEIGHT}"'
    font = 'font-family="sans-serif" font-size="13" text-anchor="middle"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            f'<text x="{WIDTH / 2}" y="24" font-size="15">{title}</text>',
            f'<polyline points="{line}" fill="none" stroke="#1f6fb4" stroke-width="2"/>',
            *texts,
            f'<text x="{WIDTH / 2}" y="{HEIGHT - 14}">workers</text>',
            "</svg>\n",
        ]
    )


def main() -> None:
    """Simulate, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", default="10,30,100,300,1000")
    parser.add_argument("--servers", type=int, default=100)
    parser.add_argument("--svg", type=Path, help="where to write the curve")
    chosen = parser.parse_args()
    counts = [int(count) for count in chosen.workers.split(",")]
    gc.set_threshold(GARBAGE_AFTER)
    found = {count: quiet_rounds(Job(count, chosen.servers)) for count in counts}
    rows = [
        [
            str(count),
            f"{figures.rounds_per_s:.3f}",
            f"{figures.worker_messages:.0f}",
            f"{figures.worker_bytes / 1e6:.1f}",
            f"{figures.server_messages:.0f}",
            f"{figures.server_bytes / 1e6:.1f}",
            f"{sum(figures.control.values()):g}",
        ]
        for count, figures in found.items()
    ]
    columns = ["workers", "rounds/s", "messages", "MB", "at server", "MB at server", "control"]
    print_table(f"{chosen.servers} servers, simulated, per round and member", columns, rows)
    if chosen.svg:
        title = f"rounds per second with {chosen.servers} servers (simulated, 10 Gbit/s)"
        chosen.svg.write_text(curve(found, title), encoding="utf-8")
    clusters = [{"workers": count} | asdict(figures) for count, figures in found.items()]
    print_document({"servers": chosen.servers, "clusters": clusters})


if __name__ == "__main__":
    main()
