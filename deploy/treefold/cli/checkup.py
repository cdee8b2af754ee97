"""What `treefold doctor --scheduler` looks at of a running cluster, from this machine.

Members tell the scheduler where they run with their heartbeats, and its status says so; how fast
bytes get to servers is measured by this process itself.
"""

from collections.abc import Callable, Iterable
from statistics import median

from treefold.cli.checks import Check, CheckError
from treefold.common.config import Settings
from treefold.common.errors import AuthError, TreefoldError
from treefold.launch.link import FactsStatus, MemberStatus, Status, fetch, parse
from treefold.launch.wire import RUN, Wire
from treefold.transport.access import Access, access_of
from treefold.transport.hosts import located
from treefold.wire.permissions import CURIOUS, KeyRole
from treefold.wire.words import PROBE_BYTES_MAX, PROTOCOL_VERSION

ANSWER_MS = 4_000
MIB = 1 << 20
MEASURED_MAX = 16  # servers to which bytes are sent; each takes 16 MiB and a moment
NAMED_MAX = 6
ROUND_TRIP_MAX_MS = 100.0  # the median; control messages wait for it, rounds do not
RATE_MIN = 10e6  # bytes/s; less is a network of 100 Mbit/s at most
CLOCK_APART_MAX_S = 1.0
FILES_MIN = 1_024
MEMORY_MIN_BYTES = 256 * MIB
VERSIONS = ("package", "torch", "python")


def cluster_checks(settings: Settings, address: str) -> dict[str, Check]:
    """The checks of a cluster, by what they look at; one alone if the scheduler does not answer.

    Parameters
    ----------
    settings : Settings
        With the keys, if the cluster has some.
    address : str
        The scheduler's.
    """
    access = None
    try:
        access = access_of(settings, *CURIOUS)
        status = parse(fetch(address, ANSWER_MS, access))
    except TreefoldError as error:
        failed = CheckError(
            str(error), _advice(error, "start it, look at firewalls, or pass --keys if it has some")
        )
        return {"scheduler": lambda: _raise(failed)}
    members = [member for member in status.members if member.is_live]
    checks: dict[str, Check] = {
        "scheduler": lambda: reached(status, address),
        "versions": lambda: agreed_versions(status, members),
        "clocks": lambda: agreed_clocks(members),
        "files of members": lambda: enough_files(members),
        "memory of members": lambda: enough_memory(members),
        "way to scheduler": lambda: way(address, access, KeyRole.SCHEDULER),
    }
    for server in status.live("server")[:MEASURED_MAX]:
        checks[f"way to {server.name}"] = _way_to(server, access)
    return checks


def reached(status: Status, address: str) -> str:
    """Who is there.

    Parameters
    ----------
    status : Status
        Of the scheduler.
    address : str
        Of it.
    """
    if status.protocol != PROTOCOL_VERSION:
        text = f"{address} speaks protocol {status.protocol}, this installation {PROTOCOL_VERSION}"
        raise CheckError(text, "install the cluster's version here, or the other way round")
    servers, workers = len(status.live("server")), len(status.live("worker"))
    dead = sum(member.state == "dead" for member in status.members)
    more = f"; {dead} members died" if dead else ""
    return f"{address}: {status.phase}, {servers} servers and {workers} workers{more}"


def agreed_versions(status: Status, members: list[MemberStatus]) -> str:
    """Everybody has the same versions: bits are promised for one torch only.

    Parameters
    ----------
    status : Status
        Of the scheduler.
    members : list of MemberStatus
        Live ones.
    """
    known = _known(members)
    own = {key: str(status.facts.get(key, "")) for key in VERSIONS}
    for key in VERSIONS:
        others: dict[str, list[str]] = {}
        for name, facts in known.items():
            found = getattr(facts, key)
            if found != own[key]:
                others.setdefault(found, []).append(name)
        if others:
            which = "; ".join(f"{found} on {_few(names)}" for found, names in others.items())
            name = "treefold" if key == "package" else key
            text = f"{name} is {own[key]} at the scheduler, but {which}"
            raise CheckError(text, "install the same everywhere: pip install -c constraints.txt .")
    versions = f"treefold {own['package']}, torch {own['torch']}, Python {own['python']}"
    return f"{versions}, protocol {status.protocol}, the same on {len(known)} members"


def agreed_clocks(members: list[MemberStatus]) -> str:
    """The clocks of all machines show the same time.

    Parameters
    ----------
    members : list of MemberStatus
        Live ones.
    """
    ahead = {name: facts.clock_ahead_s for name, facts in _known(members).items()}
    wrong = [name for name, ahead_s in ahead.items() if abs(ahead_s) > CLOCK_APART_MAX_S]
    if wrong:
        some = [f"{name} by {ahead[name]:+.1f} s" for name in wrong]
        text = f"clocks differ from the scheduler's: {_few(some)}"
        advice = (
            "let chrony or ntpd keep them: logs have their times, though nothing is decided by it"
        )
        raise CheckError(text, advice)
    worst = max((abs(ahead_s) for ahead_s in ahead.values()), default=0.0)
    return f"within {worst * 1e3:.0f} ms of the scheduler's, or less: messages take time"


def enough_files(members: list[MemberStatus]) -> str:
    """Every member may have enough files open.

    Parameters
    ----------
    members : list of MemberStatus
        Live ones.
    """
    least = _least(members, lambda facts: facts.files_max, FILES_MIN)
    if isinstance(least, list):
        some = [f"{name} {count}" for name, count in least]
        advice = f"ulimit -n {FILES_MIN} before it starts, or nofile of its container or unit"
        raise CheckError(f"too few files may be open: {_few(some)}", advice)
    return f"{least:,} may be open, or more" if least < 1 << 62 else "no limit"


def enough_memory(members: list[MemberStatus]) -> str:
    """Every member has memory left, which shared segments are made of.

    Parameters
    ----------
    members : list of MemberStatus
        Live ones.
    """
    least = _least(members, lambda facts: facts.memory_free_bytes, MEMORY_MIN_BYTES)
    if isinstance(least, list):
        some = [f"{name} has {count / MIB:.0f} MiB left" for name, count in least]
        advice = "more memory, more servers, or a higher limit of its container"
        raise CheckError(_few(some), advice)
    return f"{least / MIB:,.0f} MiB are left, or more; shared segments are made of it"


def way(address: str, access: Access | None, role: KeyRole) -> str:
    """How long a listener takes to answer, and how fast bytes get there and back.

    Parameters
    ----------
    address : str
        Of it.
    access : Access or None
        This process's keys.
    role : KeyRole
        What it is.
    """
    try:
        wire = Wire(located(address, ANSWER_MS / 1000), access, role)
        try:
            trips_ns = sorted(wire.round_trips())
            there, back = (wire.bytes_per_s(is_upload=is_upload) for is_upload in (True, False))
        finally:
            wire.close()
    except TreefoldError as error:
        advice = _advice(error, "look at firewalls, and at the address with which it was started")
        raise CheckError(str(error), advice) from error
    return judged(trips_ns, there, back)


def judged(trips_ns: list[int], there: float, back: float) -> str:
    """What measured figures mean.

    Parameters
    ----------
    trips_ns : list of int
        Of round trips, in ascending order.
    there, back : float
        Bytes per second.
    """
    middle_ms, late_ms = median(trips_ns) / 1e6, trips_ns[-1 - len(trips_ns) // 100] / 1e6
    text = (
        f"answers in {middle_ms:.2f} ms (p99 {late_ms:.2f}), {there / 1e6:,.0f} MB/s there and "
        f"{back / 1e6:,.0f} MB/s back ({RUN * PROBE_BYTES_MAX // MIB} MiB each way)"
    )
    if middle_ms > ROUND_TRIP_MAX_MS:
        raise CheckError(text, "it is far away, or has too little of a processor")
    if min(there, back) < RATE_MIN:
        raise CheckError(text, "a slow network, or a busy one; a bf16 wire halves what has to pass")
    return text


def _way_to(server: MemberStatus, access: Access | None) -> Check:
    if server.address.startswith("inproc:"):
        return lambda: "within the process of the scheduler, not to be reached from here"
    return lambda: way(server.address, access, KeyRole.SERVER)


def _known(members: list[MemberStatus]) -> dict[str, FactsStatus]:
    """What each member says of where it runs."""
    silent = [member.name for member in members if member.facts is None]
    if silent:
        text = f"{_few(silent)} said nothing of where they run"
        raise CheckError(text, "ask again in 5 s; if it stays so, they are of an older version")
    return {member.name: member.facts for member in members if member.facts is not None}


def _least(
    members: list[MemberStatus], figure: Callable[[FactsStatus], int], enough: int
) -> int | list[tuple[str, int]]:
    """The least of all, or those who have less than enough."""
    found = {name: figure(facts) for name, facts in _known(members).items()}
    lacking = [(name, count) for name, count in found.items() if count < enough]
    return lacking or min(found.values(), default=enough)


def _advice(error: TreefoldError, otherwise: str) -> str:
    if isinstance(error, AuthError):
        return "pass --keys with a folder that has an observer's or an admin's key"
    return otherwise


def _raise(error: CheckError) -> str:
    raise error


def _few(names: Iterable[str]) -> str:
    known = list(names)
    more = len(known) - NAMED_MAX
    return ", ".join(known[:NAMED_MAX]) + (f" and {more} more" if more > 0 else "")
