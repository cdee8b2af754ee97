"""Parts of a version on their way from the I/O thread to a training thread that computes already.

The I/O thread puts parts in, the training thread takes out those that it needs and waits for those
that are not here. The end of the stream, an error, or a part that was overwritten wakes it up.
"""

import threading

import torch

from treefold.common.process import Spent
from treefold.transport.segments import Segment, holds


class Arrivals:
    """The parts of one version of one table.

    Parameters
    ----------
    version : int
        Which.
    ranges : list of (int, int)
        Elements of each part.
    spent : Spent, optional
        Counts the time that was waited for parts.

    Attributes
    ----------
    is_void : bool
        Whether what is computed with this version does not count.
    is_torn : bool
        Whether that is since a part was overwritten before it was read to its end.
    """

    def __init__(
        self, version: int, ranges: list[tuple[int, int]], spent: Spent | None = None
    ) -> None:
        self.version = version
        self.ranges = ranges
        self.is_void = self.is_torn = False
        self._error: Exception | None = None
        self._spent = Spent() if spent is None else spent
        self._here: dict[int, tuple[torch.Tensor, Segment | None]] = {}
        self._change = threading.Condition()

    def put(self, part: int, values: torch.Tensor, segment: Segment | None) -> None:
        """A part is here, in ``segment`` if in a server's memory. For the I/O thread."""
        with self._change:
            self._here[part] = values, segment
            self._change.notify_all()

    def end(self, error: Exception | None) -> None:
        """Nothing more comes, and what was computed does not count. For the I/O thread."""
        with self._change:
            self.is_void, self._error = True, error
            self._change.notify_all()

    def take(self, part: int) -> tuple[torch.Tensor, Segment | None] | None:
        """Wait for a part; None if it will not come, and the loop body does not count.

        Raises
        ------
        TreefoldError
            Nothing can go on.
        """
        with self._change:
            if part not in self._here and not self.is_void:
                with self._spent.on("await"):
                    self._wait_for(part)
            if self._error is not None:
                raise self._error
            return None if self.is_void else self._here.pop(part)

    def _wait_for(self, part: int) -> None:
        while part not in self._here and not self.is_void:
            self._change.wait()

    def is_here(self, part: int) -> bool:
        """Whether a part can be taken without waiting."""
        with self._change:
            return part in self._here or self.is_void

    def check(self, segment: Segment | None) -> None:
        """See whether what was read of a part since `take` was this version."""
        if segment is not None and not holds(segment, self.version):
            self.is_void = self.is_torn = True
