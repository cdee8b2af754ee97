"""Figures of the running process for heartbeats: memory and processor time."""

import psutil

SAMPLE_NS = 500_000_000  # as often as a heartbeat by default; more would only cost


class ProcessFigures:
    """Resident memory and processor share of this process, looked up at most twice a second."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._next_ns = 0
        self.rss_bytes = 0
        self.cpu_percent = 0.0

    def sample(self, now_ns: int) -> bool:
        """Look again if it is time; True if it was."""
        if now_ns < self._next_ns:
            return False
        self._next_ns = now_ns + SAMPLE_NS
        self.rss_bytes = self._process.memory_info().rss
        self.cpu_percent = self._process.cpu_percent()
        return True
