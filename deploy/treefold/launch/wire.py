"""How long a listener of the cluster takes to answer, and how fast bytes get there and back.

Probes take the way that all messages take, through the same socket and the same loop: what else a
listener has to do at that moment is in the figures.
"""

import time

from treefold.common.errors import UnavailableError
from treefold.transport.access import Access
from treefold.transport.request import Requester, check_allowed
from treefold.wire.codec import decode_all, encode
from treefold.wire.membership import MS
from treefold.wire.permissions import KeyRole
from treefold.wire.probes import Probe, ProbeSeen
from treefold.wire.words import PROBE_BYTES_MAX

TRIPS = 100
RUN = 64  # probes of the full size in one direction; with the trips fewer than are answered at once
WINDOW = 8  # probes on their way at a time, so that none waits for the answer to the one before
FIRST_MS, ANSWER_MS = 4_000, 4_000
REPEAT_MS = 500


class Wire:
    """A connection to one listener.

    Parameters
    ----------
    address : str
        Of the listener.
    access : Access or None
        This process's keys.
    role : KeyRole
        What the listener is.

    Raises
    ------
    ConfigError
        The address is malformed.
    """

    def __init__(self, address: str, access: Access | None, role: KeyRole) -> None:
        self._address = address
        self._requester = Requester(address, access, role)
        self._call = self._answered = 0

    def close(self) -> None:
        """Close it."""
        self._requester.close()

    def round_trips(self) -> list[int]:
        """Nanoseconds of some small questions, one after the other, without the first one.

        Raises
        ------
        AuthError
            This process is refused.
        UnavailableError
            Nobody answers.
        """
        self._connect()
        found = []
        for _ in range(TRIPS):
            began_ns = time.monotonic_ns()
            self._answer(self._ask(0, 0))
            found.append(time.monotonic_ns() - began_ns)
        return found

    def bytes_per_s(self, *, is_upload: bool) -> float:
        """How fast bytes get there, or back, in bytes per second.

        Raises
        ------
        UnavailableError
            Nobody answers.
        """
        there, back = (PROBE_BYTES_MAX, 0) if is_upload else (0, PROBE_BYTES_MAX)
        began_ns = time.monotonic_ns()
        asked = [self._ask(there, back) for _ in range(WINDOW)]
        for number in range(RUN):
            self._answer(asked[number])
            if number < RUN - WINDOW:
                asked.append(self._ask(there, back))
        return RUN * PROBE_BYTES_MAX * 1e9 / (time.monotonic_ns() - began_ns)

    def _connect(self) -> None:
        """Ask until the first answer: what is sent while keys are tried is lost."""
        until_ns = time.monotonic_ns() + FIRST_MS * MS
        while time.monotonic_ns() < until_ns:
            if self._is_answered(self._ask(0, 0), REPEAT_MS):
                return
        raise UnavailableError(f"{self._address} does not answer within {FIRST_MS / 1000:g} s")

    def _ask(self, there: int, back: int) -> int:
        self._call += 1
        self._requester.send(encode(Probe(self._call, back, bytes(there))))
        return self._call

    def _answer(self, call: int) -> None:
        if not self._is_answered(call, ANSWER_MS):
            raise UnavailableError(f"{self._address} has not answered for {ANSWER_MS / 1000:g} s")

    def _is_answered(self, call: int, timeout_ms: int) -> bool:
        """Wait for the answer to a probe, or to a later one: several may come together."""
        until_ns = time.monotonic_ns() + timeout_ms * MS
        while self._answered < call and (left_ms := (until_ns - time.monotonic_ns()) // MS) > 0:
            header = self._requester.receive(left_ms)
            for message in decode_all(header) if header is not None else ():
                check_allowed(self._address, message)
                if isinstance(message, ProbeSeen):
                    self._answered = max(self._answered, message.call)
            if header is None:
                break  # also if it connected anew, and what was sent is lost
        return self._answered >= call
