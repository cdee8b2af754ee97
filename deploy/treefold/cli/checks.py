"""What a check of `treefold doctor` is."""

from collections.abc import Callable

Check = Callable[[], str]
"""Returns what it found, or raises `CheckError`."""


class CheckError(Exception):
    """Something is not as it must be.

    Parameters
    ----------
    found : str
        What is wrong.
    advice : str
        What to do about it.
    """

    def __init__(self, found: str, advice: str) -> None:
        self.found = found
        self.advice = advice
        super().__init__(f"{found}: {advice}")
