"""Hands one document after the other to everybody who looks: encoded once, kept for nobody.

The thread that owns the sockets publishes; threads of the HTTP server wait here.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

VIEWERS_MAX = 16  # pages that are open at a time


class Feed:
    """The newest document, and who waits for the next one."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._body = b""
        self._number = 0
        self._viewers = 0
        self._is_over = False

    @property
    def is_watched(self) -> bool:
        """Whether anybody looks."""
        return self._viewers > 0

    @contextmanager
    def viewer(self) -> Iterator[bool]:
        """Count somebody in who looks; False if there are too many already."""
        with self._news:
            is_welcome = self._viewers < VIEWERS_MAX
            self._viewers += is_welcome
        try:
            yield is_welcome
        finally:
            with self._news:
                self._viewers -= is_welcome
                self._news.notify_all()

    def publish(self, body: bytes) -> None:
        """Hand out a document."""
        with self._news:
            self._body = body
            self._number += 1
            self._news.notify_all()

    def documents(self, patience_s: float) -> Iterator[bytes]:
        """Documents from now on, but for those that somebody who is slow has missed.

        Parameters
        ----------
        patience_s : float
            After so long without any an empty one comes, so that who is gone is noticed.
        """
        number = self._number
        while True:
            with self._news:
                is_new = self._news.wait_for(partial(self._has_more, number), patience_s)
                if self._number == number and self._is_over:
                    return
                body, number = (self._body, self._number) if is_new else (b"", number)
            yield body

    def _has_more(self, number: int) -> bool:
        return self._number > number or self._is_over

    def end(self, patience_s: float) -> None:
        """Nothing comes any more; give everybody so long to take what is there."""
        with self._news:
            self._is_over = True
            self._news.notify_all()
            self._news.wait_for(lambda: not self._viewers, patience_s)
