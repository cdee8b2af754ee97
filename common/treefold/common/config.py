"""Settings of a process, read here alone: argument, flag, environment, file, default.

Every key is a field of `Settings`; its environment variable is ``TREEFOLD_`` and the key in
capitals, its flag ``--`` and the key with dashes, its place in ``treefold.toml`` the key itself.
``docs/config.md`` lists them all.
"""

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from treefold.common import address, engines
from treefold.common.errors import ConfigError
from treefold.common.spec import COMPENSATIONS, HEALTH_POLICIES

FILE_NAME = "treefold.toml"
PREFIX = "TREEFOLD_"

Positive = Annotated[int, Meta(ge=1, le=1 << 31)]
NotNegative = Annotated[int, Meta(ge=0, le=1 << 31)]
Seconds = Annotated[float, Meta(gt=0, le=1e9)]


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that can be set.

    Attributes
    ----------
    scheduler : str
        Address of the scheduler, such as ``tcp://10.0.0.1:29700``; empty: this process is alone.
    bind : str
        Address that a scheduler or server listens on: a number, ``*``, an interface, a network or
        a name of this machine; port 0 takes a free one.
    advertise : str
        Address that others are told to connect to; port 0 is the bound one, ``{hostname}`` this
        machine's name; empty: the bound one.
    engine : str
        Whose environment says where the scheduler is when no setting does: ``auto``, ``none``,
        ``dmlc``, ``torchrun``, ``slurm``, ``tf-config`` or ``kubernetes``.
    insecure : bool
        Whether an address beyond this machine may be bound without keys, so that nothing is
        encrypted and whoever connects can do anything.
    keys : str
        Folder of keys, as ``treefold keys init`` makes it; empty: none. With keys every connection
        is encrypted, both ends prove their keys, and roles say who may do what.
    audit : str
        File to which scheduler and servers append who asked for what; empty: none.
    servers, workers : int
        How many of each form the cluster.
    replicas : int
        How many servers hold each shard.
    journal : str
        Folder of the scheduler's journal; empty: none, and a scheduler that dies is gone for good.
    checkpoint : str
        Folder of checkpoints, or its address as fsspec writes it, which scheduler and servers all
        reach; empty: none are made.
    checkpoint_every : int
        Versions from one checkpoint to the next.
    checkpoints_kept : int
        How many checkpoints are kept; older ones are removed.
    resume : str
        Folder of checkpoints that the job begins from, with the newest one that is whole.
    state : str
        Folder in which a scheduler keeps journals and checkpoints of one job after another; it
        takes the place of ``journal``, ``checkpoint`` and ``resume``.
    check_every : int
        Rounds between two comparisons of a shard's copies; 0: never.
    rank : int
        Rank that this member would like to have; it gets the lowest free one if that is taken, or
        -1 is asked for.
    slots : int
        V, the slots of a round.
    seed : int
        The job's seed.
    consistency : str
        When contributions are applied, unless the script says it: ``sync``, ``async``, ``ssp`` or
        ``quorum``.
    staleness : int
        How many rounds a slot may be ahead of the slowest one with ``ssp``.
    staleness_max : int
        How many versions a contribution may be behind with ``async``, 0 for any number.
    quorum : int
        How many slots of a round are enough with ``quorum``; it has to be said there.
    grace : float
        How long the others are waited for, in units of the time that it usually takes to get them.
    late : str
        What becomes of the batches of others: ``requeue`` or ``drop``.
    compensation : str
        What is done about stale contributions, unless the script says it: one of `COMPENSATIONS`.
    health : str
        What is done about gradients that are not what is usual, unless the script says it: one of
        `HEALTH_POLICIES`.
    heartbeat_ms : int
        Milliseconds between two signs of life of a member.
    dead_after_ms : int
        Silence after which a worker is given up. Harmless when wrong: it comes back.
    server_dead_after_ms : int
        Silence after which a server is given up that holds the only copy of its shards; with
        several replicas ``dead_after_ms`` counts for servers as well.
    connect_timeout_s : float
        Seconds a member waits for the scheduler's first answer.
    form_timeout_s : float
        Seconds that the cluster may take to form.
    rejoin_grace_s : float
        Seconds that a job without any worker waits for one to come back.
    retry_ms : int
        Silence after which a worker asks a server again.
    lane : str
        ``auto``: members on one host exchange tensors in shared memory; ``socket``: nobody does.
    lane_bytes_max : int
        Shared memory that one process may make, in bytes; what is beyond goes through sockets.
    lane_bytes_per_s : int
        Cap on the payload bytes that a member sends over each connection, for measurements; 0:
        none. With one every payload goes through sockets.
    max_restarts : int
        How many times ``treefold run`` starts a dead role again.
    linger : bool
        Whether the scheduler stays when the job is over, so that its status can be read.
    ledger : str
        Folder in which the samples and slots of every version are recorded; empty: none.
    tape : str
        Name of the files in which servers record everything that they step, for ``treefold
        replay``; empty: none.
    tape_bytes_max : int
        Bytes that each server may record.
    metrics_port : int
        Port of this process's metrics; 0 takes a free one, -1: they are not offered. ``treefold
        run`` counts up from it, one port for each process.
    metrics_bind : str
        Host that metrics are offered on.
    metrics_token_file : str
        File with the bearer token that whoever asks for metrics has to have; needed if
        ``metrics_bind`` can be reached from other machines.
    peer_bytes_max : int
        How many bytes of one connection may wait at a scheduler or server that listens on TCP; more
        closes the connection. Needs Linux.
    peer_bytes_per_s : int
        How many bytes all connections of one host may bring in a second there, on average and after
        ``peer_bytes_max`` at once; more closes them. 0: any number. Needs Linux.
    page_port : int
        Port of the scheduler's live page; 0 takes a free one, -1: there is none. ``treefold run``
        has one unless it is told otherwise.
    page_bind : str
        Host that the live page is offered on.
    page_token_file : str
        File with the token that the link to the live page bears; empty: one is made up, which is
        enough for a page that only this machine can reach. Whoever has it may drain members, and
        whoever has that of ``metrics_token_file`` may look.
    report : str
        File in which the scheduler saves the live page when the job is over; empty: none.
    timeline : str
        Name of the files in which processes write what took how long, for Chrome's trace viewer;
        ``treefold run`` puts them together in the file of that name. Empty: none.
    log_level : str
        ``debug``, ``info``, ``warning`` or ``error``.
    """

    scheduler: str = ""
    bind: str = "tcp://127.0.0.1:0"
    advertise: str = ""
    engine: str = engines.AUTO
    insecure: bool = False
    keys: str = ""
    audit: str = ""
    servers: Positive = 1
    workers: Positive = 1
    rank: Annotated[int, Meta(ge=-1, le=65_535)] = -1
    replicas: Annotated[int, Meta(ge=1, le=16)] = 1
    journal: str = ""
    checkpoint: str = ""
    checkpoint_every: Positive = 200
    checkpoints_kept: Positive = 3
    resume: str = ""
    state: str = ""
    check_every: NotNegative = 100
    slots: Annotated[int, Meta(ge=1, le=65_536)] = 8
    seed: Annotated[int, Meta(ge=-(1 << 62), le=1 << 62)] = 0
    consistency: str = "sync"
    staleness: NotNegative = 4
    staleness_max: NotNegative = 0
    quorum: Annotated[int, Meta(ge=0, le=65_536)] = 0
    grace: Annotated[float, Meta(ge=0, le=1e6)] = 0.5
    late: str = "requeue"
    compensation: str = "none"
    health: str = "off"
    heartbeat_ms: Positive = 500
    dead_after_ms: Positive = 2_000
    server_dead_after_ms: Positive = 10_000
    connect_timeout_s: Seconds = 15.0
    form_timeout_s: Seconds = 120.0
    rejoin_grace_s: Annotated[float, Meta(ge=0, le=1e9)] = 5.0
    retry_ms: Positive = 1_000
    lane: str = "auto"
    lane_bytes_max: Annotated[int, Meta(ge=0, le=1 << 50)] = 1 << 36
    lane_bytes_per_s: Annotated[int, Meta(ge=0, le=1 << 50)] = 0
    max_restarts: NotNegative = 0
    linger: bool = False
    ledger: str = ""
    tape: str = ""
    tape_bytes_max: Annotated[int, Meta(ge=1, le=1 << 50)] = 1 << 34
    metrics_port: Annotated[int, Meta(ge=-1, le=65_535)] = -1
    metrics_bind: str = "127.0.0.1"
    metrics_token_file: str = ""
    peer_bytes_max: Annotated[int, Meta(ge=1 << 27, le=1 << 50)] = 1 << 29
    peer_bytes_per_s: Annotated[int, Meta(ge=0, le=1 << 50)] = 0
    page_port: Annotated[int, Meta(ge=-1, le=65_535)] = -1
    page_bind: str = "127.0.0.1"
    page_token_file: str = ""
    report: str = ""
    timeline: str = ""
    log_level: str = "info"

    def __post_init__(self) -> None:
        """Check what concerns several keys at once."""
        if self.dead_after_ms < 2 * self.heartbeat_ms:
            msg = (
                f"dead_after_ms is {self.dead_after_ms} and heartbeat_ms {self.heartbeat_ms}: a "
                "member must be allowed to miss a beat, so dead_after_ms has to be at least twice "
                "heartbeat_ms"
            )
            raise ConfigError(msg)
        if self.replicas > self.servers:
            msg = (
                f"replicas is {self.replicas} and servers {self.servers}: each copy of a shard "
                "needs a server of its own, so replicas can be at most servers"
            )
            raise ConfigError(msg)
        if self.log_level not in ("debug", "info", "warning", "error"):
            msg = f"log_level is {self.log_level!r}; it is one of debug, info, warning, error"
            raise ConfigError(msg)
        if self.consistency not in ("sync", "async", "ssp", "quorum"):
            msg = f"consistency is {self.consistency!r}; it is sync, async, ssp or quorum"
            raise ConfigError(msg)
        if self.consistency == "quorum" and self.quorum < 1:
            msg = (
                "quorum is 0; with consistency=quorum it says how many slots of a round are enough"
            )
            raise ConfigError(msg)
        if self.late not in ("requeue", "drop"):
            msg = f"late is {self.late!r}; it is requeue or drop"
            raise ConfigError(msg)
        named = (
            ("compensation", COMPENSATIONS), ("health", HEALTH_POLICIES), ("engine", engines.NAMES),
        )  # fmt: skip
        for key, names in named:
            if getattr(self, key) not in names:
                msg = f"{key} is {getattr(self, key)!r}; it is one of {', '.join(names)}"
                raise ConfigError(msg)
        if self.lane not in ("auto", "socket"):
            msg = f"lane is {self.lane!r}; it is auto or socket"
            raise ConfigError(msg)
        for key in ("scheduler", "bind", "advertise"):
            value: str = getattr(self, key)
            if value:
                address.check(key, value)

    @property
    def is_recoverable(self) -> bool:
        """Whether the job goes on when a server dies: from its copies, or from a checkpoint."""
        return self.replicas > 1 or bool(self.checkpoint) or bool(self.resume)


KEYS = Settings.__struct_fields__


class Loaded(msgspec.Struct, frozen=True):
    """Settings, and where the value of each key came from.

    That is ``argument``, ``environment``, the name of a file, a variable of an engine, or
    ``default``. ``engine`` says in one line what was taken from an engine, if anything was.
    """

    settings: Settings
    origins: dict[str, str]
    engine: str = ""


def load(arguments: Mapping[str, object], file: str | None = None, role: str = "") -> Loaded:
    """Gather the settings of this process.

    Parameters
    ----------
    arguments : mapping
        What the caller or the command line gave; a value of None means not given.
    file : str, optional
        A TOML file; by default ``TREEFOLD_CONFIG`` or ``treefold.toml`` in the working directory if
        there is one.
    role : str
        What this process is for an engine: ``scheduler``, ``server``, ``worker``, or a ``script``
        that may be alone; empty: engines are not asked.

    Raises
    ------
    ConfigError
        An unknown key (the nearest right one is named), or a value of the wrong type or out of
        range.
    """
    values: dict[str, object] = {}
    origins = dict.fromkeys(KEYS, "default")
    given = {key: value for key, value in arguments.items() if value is not None}
    for origin, source in (
        _from_file(file),
        ("environment", _from_environment()),
        ("argument", given),
    ):
        for key, value in source.items():
            _check_known(key, origin)
            values[key] = value
            origins[key] = origin
    said = _ask_engine(values, origins, role)
    try:
        return Loaded(msgspec.convert(values, Settings, strict=False), origins, said)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        where = ", ".join(f"{key} from {origins[key]}" for key in values)
        msg = f"a setting is wrong: {error} (given: {where})"
        raise ConfigError(msg) from error


def _ask_engine(values: dict[str, object], origins: dict[str, str], role: str) -> str:
    """Fill in what an engine says and nobody else has said; returns it as a line."""
    chosen = str(values.get("engine", engines.AUTO))
    if not role or chosen not in engines.NAMES:
        return ""
    found = engines.find(chosen, os.environ, role)
    told = {} if found is None else dict(found.values)
    # Whoever says where the scheduler is, or where to listen, does not want half of it replaced.
    if values.get("scheduler"):
        told = {key: value for key, value in told.items() if key == "rank"}
    if values.get("bind"):
        told = {key: value for key, value in told.items() if key not in ("bind", "advertise")}
    used = {key: value for key, value in told.items() if key not in values}
    for key, (value, variable) in used.items():
        values[key], origins[key] = value, variable
    parts = [f"{key} {value} ({variable})" for key, (value, variable) in used.items()]
    return f"from the environment of {found.engine}: {', '.join(parts)}" if found and used else ""


def environment_of(values: Mapping[str, object]) -> dict[str, str]:
    """Environment variables that hand these settings to a child process."""
    return {
        PREFIX + key.upper(): str(value).lower() if isinstance(value, bool) else str(value)
        for key, value in values.items()
    }


def metrics_port_of(settings: Settings, role: str, number: int = 0) -> int:
    """The port of one of several processes that were started together, from that of the first.

    That is the scheduler's; servers follow it, and workers follow them.
    """
    first = settings.metrics_port
    if first <= 0 or role == "scheduler":
        return first
    return first + 1 + number + (settings.servers if role == "worker" else 0)


def failpoints() -> tuple[str, str, str]:
    """What tests want to fail, the folder of what has failed already, and from when on it counts.

    All are usually empty. No settings: `treefold.common.failpoints` says how they are written.
    """
    names = ("FAILPOINT", "FAILPOINT_ONCE", "FAILPOINT_FROM")
    spec, once, start = (os.environ.get(PREFIX + name, "") for name in names)
    return spec, once, start


def _from_environment() -> dict[str, object]:
    return {
        key: os.environ[PREFIX + key.upper()]
        for key in KEYS
        if os.environ.get(PREFIX + key.upper(), "") != ""
    }


def _from_file(file: str | None) -> tuple[str, dict[str, object]]:
    name = file or os.environ.get(PREFIX + "CONFIG", "")
    path = Path(name or FILE_NAME)
    if not name and not path.is_file():
        return FILE_NAME, {}
    try:
        return str(path), tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        msg = f"the configuration file {path} cannot be read: {error}"
        raise ConfigError(msg) from error


def _check_known(key: str, origin: str) -> None:
    if key in KEYS:
        return
    near = difflib.get_close_matches(key, KEYS, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(KEYS)}"
    msg = f"unknown setting {key!r} from {origin}{hint}"
    raise ConfigError(msg)
