"""How long the scheduler waits: for workers when none is left, and for farewells after the end.

Part of `treefold.scheduler.core` in a file of its own; just as pure.
"""

from treefold.scheduler.admission import SchedulerLimits
from treefold.wire.exchange import Halt, Peer
from treefold.wire.membership import MS
from treefold.wire.messages import Heartbeat, StatusRequest, Stop
from treefold.wire.words import Outcome

FAREWELL_MS = 3_000  # after the end, how long members are answered before the scheduler goes
WATCHERS_MAX = 64  # who are known; others may hear of the end or not
SAVING_MAX_MS = 600_000  # the same, while servers still write to a checkpoint


class Solitude:
    """A job without workers, which waits for one to come back."""

    def __init__(self) -> None:
        self._since_ns: int | None = None
        self._grace_ns = 0

    def begin(
        self, now_ns: int, limits: SchedulerLimits, *, is_done: bool, is_anew: bool = False
    ) -> None:
        """Nobody is left; some script had come to its end, or all of them begin anew."""
        self._since_ns = now_ns
        self._grace_ns = limits.dead_after_ns if is_done else limits.rejoin_grace_ns
        if is_anew:  # and that may take as long as the cluster took to form
            self._grace_ns = max(self._grace_ns, limits.form_timeout_ns)

    def end(self) -> None:
        """Somebody is there."""
        self._since_ns = None

    def deadlines_ns(self) -> list[int]:
        """When the job is given up, if it waits."""
        return [] if self._since_ns is None else [self._since_ns + self._grace_ns]

    def given_up(self, now_ns: int, *, is_done: bool) -> tuple[Outcome, str] | None:
        """How the job ends, None if it does not yet."""
        if self._since_ns is None or now_ns - self._since_ns < self._grace_ns:
            return None
        if is_done:
            return Outcome.DONE, "the job is done"
        waited_s = (now_ns - self._since_ns) / 1e9
        return Outcome.FAILED, f"no worker is left and none came back within {waited_s:.0f} s"


class Farewell:
    """The time between the end of the job and that of the scheduler.

    Parameters
    ----------
    is_lingering : bool
        Whether it stays for good.
    """

    def __init__(self, is_lingering: bool) -> None:
        self._is_lingering = is_lingering
        self._is_over = False
        self._ended_ns = 0
        self._until_ns = 0
        self._watchers: dict[Peer, int] = {}

    def begin(self, now_ns: int) -> None:
        """The job has ended."""
        self._ended_ns = now_ns
        self._until_ns = now_ns + FAREWELL_MS * MS

    def hear(self, now_ns: int, message: object) -> None:
        """A member is still there."""
        if isinstance(message, Heartbeat) and message.saving:
            self.stay(now_ns)

    def watch(self, now_ns: int, peer: Peer, request: StatusRequest, *, is_over: bool) -> None:
        """Somebody asks for the status, and hears with it how the job ended if it is over."""
        known = self._watchers.items()
        self._watchers = {who: at for who, at in known if who != peer and _is_recent(now_ns, at)}
        if request.is_watching and not is_over and len(self._watchers) < WATCHERS_MAX:
            self._watchers[peer] = now_ns

    def is_watched(self, now_ns: int) -> bool:
        """Whether somebody asked a moment ago, and has not heard of the end."""
        return any(_is_recent(now_ns, at_ns) for at_ns in self._watchers.values())

    def stay(self, now_ns: int) -> None:
        """Somebody still writes to a checkpoint."""
        if now_ns - self._ended_ns < SAVING_MAX_MS * MS:
            self._until_ns = max(self._until_ns, now_ns + FAREWELL_MS * MS)

    def next_deadline_ns(self) -> int | None:
        """When `end` has something to do."""
        return None if self._is_lingering or self._is_over else self._until_ns

    def end(self, now_ns: int, ending: Stop, *, is_busy: bool) -> list[Halt]:
        """The end of the scheduler, once nobody is left who would hear it."""
        is_busy = is_busy or self.is_watched(now_ns)
        if self._is_over or self._is_lingering or (is_busy and now_ns < self._until_ns):
            return []
        self._is_over = True
        status = {Outcome.FAILED: 1, Outcome.NOT_FORMED: 3}.get(ending.outcome, 0)
        return [Halt(status, ending.text)]


def _is_recent(now_ns: int, at_ns: int) -> bool:
    return now_ns - at_ns < FAREWELL_MS * MS
