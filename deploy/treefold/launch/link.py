"""The scheduler's status, asked from outside: typed, and never waited for longer than told."""

import time

import msgspec

from treefold.common.errors import RemoteProtocolError, UnavailableError
from treefold.transport.access import Access
from treefold.transport.hosts import located
from treefold.transport.request import Requester, check_allowed
from treefold.wire.codec import decode_all, encode
from treefold.wire.messages import StatusReply, StatusRequest

REPEAT_MS = 500  # a question without an answer is asked again after so long


class FactsStatus(msgspec.Struct, frozen=True):
    """Where a member runs; ``clock_ahead_s`` is its clock against the scheduler's."""

    package: str
    python: str
    torch: str
    files_max: int
    memory_free_bytes: int
    clock_ahead_s: float


class MemberStatus(msgspec.Struct, frozen=True):
    """One member, live or not, as the scheduler knows it; ``docs/cli.md`` describes the fields."""

    name: str
    role: str
    rank: int
    incarnation: int
    state: str
    host: str
    pid: int
    address: str
    seen_ms_ago: int
    slots: list[int]
    round: int
    slot_time_ms: float
    samples: int
    loss: float | None
    waiting: str
    rss_bytes: int
    cpu_percent: float
    is_draining: bool = False
    metrics: str = ""
    spent_s: dict[str, float] = {}
    facts: FactsStatus | None = None

    @property
    def is_live(self) -> bool:
        """Whether the cluster counts on it."""
        return self.state == "live"


class ShardStatus(msgspec.Struct, frozen=True):
    """One shard and the servers that hold it, and those that are being copied to."""

    shard: int
    server: str
    first_block: int
    blocks: int
    backups: list[str] = msgspec.field(default_factory=list)
    joining: list[str] = msgspec.field(default_factory=list)


class WorkerStaleness(msgspec.Struct, frozen=True):
    """How stale a worker's contributions to an asynchronous table were."""

    contributions: int
    median: int
    p99: int


class TableStatus(msgspec.Struct, frozen=True):
    """One table and its shards."""

    name: str
    rule: str
    optimizer: str | None
    tensors: int
    elements: int
    shards: list[ShardStatus]
    consistency: str = "sync"
    staleness: dict[str, WorkerStaleness] = {}
    missed: int = 0
    health: str = "off"
    aggregation: str = "mean"
    unhealthy: dict[str, dict[str, int]] = {}
    rounds_skipped: int = 0
    usual: tuple[float, float] | None = None
    finding: str = ""


class PlanStatus(msgspec.Struct, frozen=True):
    """The newest pass over the data."""

    kind: str
    epoch: int
    first_round: int
    end_round: int
    batch_size: int
    samples: int


class Expected(msgspec.Struct, frozen=True):
    """How many members form the cluster."""

    servers: int
    workers: int


class Ending(msgspec.Struct, frozen=True):
    """How the job ended, and why."""

    outcome: str
    text: str


class SourceStatus(msgspec.Struct, frozen=True):
    """What a job began with, or went back to."""

    folder: str
    version: int


class CheckpointStatus(msgspec.Struct, frozen=True):
    """The checkpoints of a job."""

    folder: str
    newest: int | None
    saving: int
    source: SourceStatus | None


class EventStatus(msgspec.Struct, frozen=True):
    """Something that happened to the cluster: its number, when (seconds since 1970), in words."""

    number: int
    at: float
    text: str


class Status(msgspec.Struct, frozen=True):
    """The whole document; ``docs/cli.md`` describes the fields."""

    phase: str
    view: int
    job: int
    expected: Expected
    round: int
    rounds_per_second: float
    slots: int
    plan: PlanStatus | None
    members: list[MemberStatus]
    tables: list[TableStatus]
    ending: Ending | None
    checkpoint: CheckpointStatus | None = None
    metrics: str = ""
    events: list[EventStatus] = []
    protocol: int = 0
    facts: dict[str, str | int] = {}

    def live(self, role: str) -> list[MemberStatus]:
        """Live members of a role, by rank."""
        found = [member for member in self.members if member.is_live and member.role == role]
        return sorted(found, key=lambda member: member.rank)


class StatusLink:
    """Asks one scheduler for its status, without waiting.

    Parameters
    ----------
    address : str
        The scheduler's.
    access : Access, optional
        This process's keys.

    Raises
    ------
    ConfigError
        The address is malformed.
    """

    def __init__(self, address: str, access: Access | None = None) -> None:
        self._address = address
        self._requester = Requester(address, access)
        self._call = 0
        self._asked_ns = 0

    def ask(self, now_ns: int, *, is_watching: bool = False) -> None:
        """Ask; answers to earlier questions do not count any more.

        Parameters
        ----------
        now_ns : int
            When.
        is_watching : bool
            Whether this is done again and again, until the job has ended.
        """
        self._call += 1
        self._asked_ns = now_ns
        self._requester.send(encode(StatusRequest(self._call, is_watching)))

    def body(self, timeout_ms: int = 0) -> tuple[int, bytes] | None:
        """When the last question was asked, and the answer to it if it has come.

        Parameters
        ----------
        timeout_ms : int
            How long to wait for it.

        Returns
        -------
        (int, bytes) or None
            Nanoseconds as given to `ask`, and the document as JSON.

        Raises
        ------
        AuthError
            This process is refused.
        """
        deadline_ns = time.monotonic_ns() + timeout_ms * 1_000_000
        while (header := self._requester.receive(timeout_ms)) is not None:
            for message in decode_all(header):
                check_allowed(self._address, message)
                if isinstance(message, StatusReply) and message.call == self._call:
                    return self._asked_ns, message.body
            timeout_ms = max(0, (deadline_ns - time.monotonic_ns()) // 1_000_000)
        return None

    def close(self) -> None:
        """Close the link."""
        self._requester.close()


def parse(body: bytes) -> Status:
    """The document of a status reply.

    Raises
    ------
    RemoteProtocolError
        It is not one that this version understands.
    """
    try:
        return msgspec.json.decode(body, type=Status)
    except msgspec.MsgspecError as error:
        msg = f"the scheduler's status is not as expected: {error}; is it of another version?"
        raise RemoteProtocolError(msg) from error


def fetch(address: str, timeout_ms: int, access: Access | None = None) -> bytes:
    """Ask a scheduler for its status and wait for the answer.

    Parameters
    ----------
    address : str
        The scheduler's.
    timeout_ms : int
        How long to wait.
    access : Access, optional
        This process's keys.

    Returns
    -------
    bytes
        The document as JSON.

    Raises
    ------
    ConfigError
        The address is malformed.
    AuthError
        This process is refused.
    UnavailableError
        Nobody answered, or nobody knows the scheduler's name.
    """
    link = StatusLink(located(address, timeout_ms / 1000), access)
    try:
        deadline_ns = time.monotonic_ns() + timeout_ms * 1_000_000
        while (left_ms := (deadline_ns - time.monotonic_ns()) // 1_000_000) > 0:
            link.ask(time.monotonic_ns())
            answer = link.body(min(REPEAT_MS, left_ms))
            if answer is not None:
                return answer[1]
    finally:
        link.close()
    msg = f"no scheduler answered at {address} within {timeout_ms / 1000:g} s; is it running there?"
    raise UnavailableError(msg)
