"""Times of a worker, and which error a refusal raises in the training thread."""

from dataclasses import dataclass

from treefold.common import errors
from treefold.wire.membership import MS
from treefold.wire.words import Code

ERRORS: dict[Code, type[errors.TreefoldError]] = {
    Code.PROTOCOL_VERSION: errors.RemoteProtocolError,
    Code.JOB_MISMATCH: errors.JobFailedError,
    Code.SPEC_MISMATCH: errors.SpecMismatchError,
    Code.UNKNOWN_TABLE: errors.DataError,
    Code.BAD_PAYLOAD: errors.DataError,
    Code.FUTURE_ROUND: errors.RemoteProtocolError,
    Code.BAD_NODE: errors.RemoteProtocolError,
    Code.BAD_SPEC: errors.DataError,
    Code.CLUSTER_FULL: errors.CapacityError,
    Code.NOT_MEMBER: errors.FencedError,
    Code.BAD_MESSAGE: errors.RemoteProtocolError,
    Code.NON_FINITE: errors.DataError,
    Code.NOT_ALLOWED: errors.AuthError,
}


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """Times of a worker, in nanoseconds.

    Attributes
    ----------
    connect_timeout_ns : int
        How long to wait for the scheduler's first answer.
    retry_ns : int
        Silence after which a server is asked again.
    unreachable_ns : int
        Silence of all servers after which a wait fails.
    """

    connect_timeout_ns: int
    retry_ns: int
    unreachable_ns: int = 60_000 * MS
