"""Questions that only the thread that owns the sockets can answer, asked by any other thread.

Whoever asks leaves a question and rings the bell; it is answered between two events, so that
nothing is ever read while it changes, and no lock is taken in the exchange.
"""

import queue
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from treefold.common.errors import UnavailableError

ANSWER_MAX_S = 5.0  # how long somebody who asks waits for a process that is busy
ANSWERED_MAX = 4  # questions that are answered between two events
AnswerT = TypeVar("AnswerT")


class Questions:
    """Asked on any thread, answered on one.

    Parameters
    ----------
    ring : callable
        Wakes the thread that answers.
    """

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        # Each may have an answer of another type; `ask` gives it back as that.
        self._waiting: deque[tuple[Callable[[], Any], queue.SimpleQueue[Any]]] = deque()

    def ask(self, what: Callable[[], AnswerT]) -> AnswerT:
        """Let the other thread call something, and wait for what comes of it.

        Raises
        ------
        UnavailableError
            The process is too busy to answer.
        """
        answers: queue.SimpleQueue[AnswerT | _Failure] = queue.SimpleQueue()
        self._waiting.append((what, answers))
        self._ring()
        try:
            found = answers.get(timeout=ANSWER_MAX_S)
        except queue.Empty:
            text = f"this process is busy: it did not answer within {ANSWER_MAX_S:.0f} s"
            raise UnavailableError(text) from None
        if isinstance(found, _Failure):
            raise found.error
        return found

    def answer(self) -> None:
        """Answer some, on the thread that owns what they are about."""
        for _ in range(min(len(self._waiting), ANSWERED_MAX)):
            what, answers = self._waiting.popleft()
            try:
                answers.put(what())
            except Exception as error:  # whoever asks hears of it; training goes on
                answers.put(_Failure(error))


class _Failure:
    """What came of a question that could not be answered."""

    def __init__(self, error: Exception) -> None:
        self.error = error
