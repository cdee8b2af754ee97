"""The progress table on a terminal, below the output that scrolls past."""

from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from treefold.cli.display import Progress
from treefold.common.spans import spans


class LiveView:
    """A table that is drawn anew in place.

    Parameters
    ----------
    out : file
        The terminal.
    error : file
        Where errors go: above the table if it is a terminal, too.
    """

    def __init__(self, out: TextIO, error: TextIO) -> None:
        self._console = Console(file=out, highlight=False)
        self._error = None if error.isatty() else error
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._live.start()

    def write(self, text: str, *, is_error: bool) -> None:
        """One line of text."""
        if is_error and self._error is not None:
            self._error.write(text + "\n")
            self._error.flush()
        else:
            self._console.print(Text.from_ansi(text), soft_wrap=True)

    def show(self, progress: Progress) -> None:
        """The newest progress."""
        self._live.update(drawn(progress), refresh=True)

    def close(self) -> None:
        """Take the table away."""
        self._live.stop()


def drawn(progress: Progress) -> Group:
    """The table of all workers, and the total.

    Parameters
    ----------
    progress : Progress
        What to draw.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("worker")
    for title in ("round", "samples/s", "loss"):
        table.add_column(title, justify="right")
    table.add_column("slots")
    table.add_column("waits for", no_wrap=True, overflow="ellipsis")
    for row in progress.rows:
        loss = "" if row.loss is None else f"{row.loss:.4f}"
        figures = (str(row.round), f"{row.speed:,.0f}", loss)
        table.add_row(row.name, *figures, spans(row.slots), row.waiting)
    total = progress.summary if progress.round else "training has not begun"
    return Group(table, Text(f"total: {total} ({progress.headline})", style="bold"))
