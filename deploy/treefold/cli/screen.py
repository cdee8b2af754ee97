"""A look at a cluster as text that fits a terminal, whatever its height.

What does not fit is left out, and a line says how much that is.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.text import Text

from treefold.cli.rates import ACTIVITIES, Look, ServerLook, TableLook, WorkerLook
from treefold.cli.tables import checkpoint_words
from treefold.common.spans import spans
from treefold.launch.link import EventStatus

MIB = 1 << 20
BAR_CELLS, EPOCH_CELLS = 26, 20
NAMED_MAX = 4
MARKS = {
    "compute": ("█", "compute", "green"), "push": ("▲", "push", "cyan"),
    "pull": ("▼", "pull", "blue"), "wait": ("·", "wait", "red"),
    "fold": ("█", "fold", "green"), "optimizer": ("◆", "step", "cyan"),
    "publish": ("▲", "publish", "blue"), "checkpoint": ("▼", "save", "magenta"),
}  # fmt: skip
"""How a share of time looks, with colours and without, and its word in a title."""
Cell = str | Text


@dataclass(frozen=True, slots=True)
class Section:
    """Rows under a title, of which the first ones (or the last ones) are shown.

    Attributes
    ----------
    weight : int
        How much of the height it should have, compared with others, where all do not fit.
    left : callable
        What to say of a number of rows that are left out.
    """

    titles: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    weight: int
    left: Callable[[int], str]
    is_newest_last: bool = False

    def drawn(self, lines: int) -> list[Text]:
        """In so many lines at most, the title among them."""
        room = lines - 1
        is_whole = len(self.rows) <= room
        count = len(self.rows) if is_whole else max(0, room - 1)
        shown = self.rows[len(self.rows) - count :] if self.is_newest_last else self.rows[:count]
        table = _aligned(self.titles, shown) if count else []
        cut = [] if is_whole else [Text(self.left(len(self.rows) - count), style="dim")]
        return ([*cut, *table] if self.is_newest_last else [*table, *cut])[: max(0, lines)]


def _aligned(titles: tuple[str, ...], rows: Sequence[tuple[Cell, ...]]) -> list[Text]:
    """One line for each row, with columns below each other: words to the left, numbers not."""
    columns = list(zip(titles, *rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    lines = []
    for row in (titles, *rows):
        line = Text(style="bold" if row is titles else "")
        for title, cell, width in zip(titles, row, widths, strict=True):
            gap = " " * (width - len(cell))
            is_number = title.startswith(" ")
            line = line.append(gap).append(cell) if is_number else line.append(cell).append(gap)
            line.append("  ")
        line.rstrip()
        lines.append(line)
    return lines


def shared_out(lines: int, wants: Sequence[int], weights: Sequence[int]) -> list[int]:
    """Lines for each section: what it wants where there is room, else in proportion to weights.

    Parameters
    ----------
    lines : int
        How many there are.
    wants, weights : sequence of int
        Of each section.
    """
    shares = [0] * len(wants)
    left = lines
    while left > 0:
        hungry = [n for n, want in enumerate(wants) if shares[n] < want]
        if not hungry:
            break
        neediest = min(hungry, key=lambda n: (shares[n] / weights[n], n))
        shares[neediest] += 1
        left -= 1
    return shares


def drawn(look: Look, height: int | None = None) -> list[Text]:
    """A look as lines, each of which may be longer than a terminal is wide.

    Parameters
    ----------
    look : Look
        What to show.
    height : int, optional
        How many lines there may be; without it everything is shown.
    """
    head = _head(look)
    every = [
        _workers(look.workers),
        _servers(look.servers),
        _tables(look.tables),
        _events(look.events),
    ]
    sections = [one for one in every if one.rows]
    wants = [len(one.rows) + 1 for one in sections]
    room = sum(wants) if height is None else height - len(head)
    shares = shared_out(room, wants, [one.weight for one in sections])
    lines = [*head]
    for one, share in zip(sections, shares, strict=True):
        lines += one.drawn(share)
    return lines if height is None else lines[:height]


def _head(look: Look) -> list[Text]:
    where = f"{look.phase}, view {look.view}, round {look.round}"
    if look.end_round is not None:
        where += f" of {look.end_round}"
    rates = f"{look.rounds_per_second:.1f} rounds/s, {look.samples_per_second:,.0f} samples/s"
    loss = "" if look.loss is None else f", loss {look.loss:.4f}"
    there = f"{len(look.servers)} servers, {len(look.workers)} workers, {look.slots} slots"
    if look.phase == "forming":
        there += f"; waits for {look.expected.servers} servers and {look.expected.workers} workers"
    gone = f"; dead: {_few(look.gone)}" if look.gone else ""
    lines = [
        Text(f"treefold at {look.scheduler}: {where}", style="bold"),
        Text(f"{rates}{loss}; {there}{gone}"),
    ]
    if look.epoch_progress is not None:
        done = round(EPOCH_CELLS * look.epoch_progress)
        bar = "█" * done + "░" * (EPOCH_CELLS - done)
        lines.append(Text(f"epoch {look.epoch} {bar} {100 * look.epoch_progress:.0f} %"))
    if look.checkpoint is not None:
        lines.append(Text("; ".join(checkpoint_words(look.checkpoint))))
    if look.silent_s:
        text = f"no answer for {look.silent_s:.0f} s: still trying; what is below is as old as that"
        lines.append(Text(text, style="bold red"))
    if look.ending is not None:
        lines.append(Text(f"{look.ending.outcome}: {look.ending.text}", style="bold"))
    return lines


def _bar(shares: dict[str, float]) -> Text:
    """Shares of time as a bar; what is empty went into something else."""
    bar, done, cells = Text(), 0.0, 0
    for what, share in shares.items():
        done += share
        upto = min(BAR_CELLS, round(BAR_CELLS * done))
        mark, _, colour = MARKS[what]
        bar.append(mark * (upto - cells), style=colour)
        cells = upto
    return bar.append(" " * (BAR_CELLS - cells))


def _legend(role: str) -> str:
    return " ".join("".join(MARKS[what][:2]) for what in ACTIVITIES[role])


def _workers(workers: list[WorkerLook]) -> Section:
    rows = [
        (
            f"{one.name} (draining)" if one.is_draining else one.name,
            spans(one.slots),
            str(one.round),
            f"{one.samples_per_second:,.0f}",
            "" if one.loss is None else f"{one.loss:.4f}",
            _bar(one.shares),
            f"{one.rss_bytes / MIB:.0f}",
            f"{one.cpu_percent:.0f}",
            one.waiting,
        )
        for one in workers
    ]
    titles = (
        "worker",
        "slots",
        " round",
        " samples/s",
        " loss",
        _legend("worker"),
        " MiB",
        " cpu %",
    )

    def left(count: int) -> str:
        some = workers[len(workers) - count :]
        rounds = [one.round for one in some]
        speed = sum(one.samples_per_second for one in some)
        waiting = sum(bool(one.waiting) for one in some)
        where = f"rounds {min(rounds)} to {max(rounds)}, {speed:,.0f} samples/s, {waiting} wait"
        return f"... {count} more workers: {where}"

    return Section((*titles, "waits for"), rows, 4, left)


def _servers(servers: list[ServerLook]) -> Section:
    rows = [
        (
            f"{one.name} (draining)" if one.is_draining else one.name,
            f"{one.primaries}/{one.backups}" + (f"+{one.joining}" if one.joining else ""),
            str(one.blocks),
            str(one.round),
            _bar(one.shares),
            f"{one.rss_bytes / MIB:.0f}",
            f"{one.cpu_percent:.0f}",
            one.waiting,
        )
        for one in servers
    ]
    titles = (
        "server",
        "primary/backup",
        " blocks",
        " version",
        _legend("server"),
        " MiB",
        " cpu %",
    )

    def left(count: int) -> str:
        busy = sum(sum(one.shares.values()) for one in servers[len(servers) - count :]) / count
        return f"... {count} more servers, busy for {100 * busy:.0f} % of the time"

    return Section((*titles, "waits for"), rows, 2, left)


def _tables(tables: list[TableLook]) -> Section:
    rows = [
        (
            one.name,
            one.consistency,
            f"{one.elements:,}",
            str(one.shards),
            str(one.joining) if one.joining else "",
            "" if one.staleness is None else str(one.staleness),
            f"{one.missed} slots came too late" if one.missed else "",
        )
        for one in tables
    ]
    titles = (
        "table",
        "mode",
        " elements",
        " shards",
        " copying",
        " staleness p99",
        "",
    )

    def left(count: int) -> str:
        elements = sum(one.elements for one in tables[len(tables) - count :])
        return f"... {count} more tables, {elements:,} elements"

    return Section(titles, rows, 1, left)


def _events(events: list[EventStatus]) -> Section:
    rows = [(time.strftime("%H:%M:%S", time.localtime(one.at)), one.text) for one in events]
    return Section(("events", ""), rows, 2, lambda n: f"... {n} events before", is_newest_last=True)


def _few(names: list[str]) -> str:
    more = len(names) - NAMED_MAX
    return ", ".join(names[-NAMED_MAX:]) + (f" and {more} more" if more > 0 else "")
