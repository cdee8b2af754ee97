"""What a worker writes down, if the job keeps a ledger: which samples each slot has."""

from collections.abc import Sequence

from treefold.common.ledger import SamplesRecord, Writer
from treefold.worker.handed import Task


class Sampled:
    """The ledger of one worker.

    Parameters
    ----------
    folder : str
        Where the job's ledger is; empty if it keeps none.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._writer: Writer | None = None

    def write(self, who: int, task: Task, samples: Sequence[int]) -> None:
        """Write down the samples of a slot."""
        if not self._folder:
            return
        if self._writer is None:
            self._writer = Writer(self._folder, f"worker-{who}")
        self._writer.add(SamplesRecord(who, task.round, task.slot, list(samples)))

    def close(self) -> None:
        """Nothing more follows."""
        if self._writer is not None:
            self._writer.close()
