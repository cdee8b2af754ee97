"""What the environment of an engine says: where the scheduler is, how many members there are.

One class for each engine, with ``detect``. The first that finds itself is asked for everything;
what it says ranks below the settings that a person gave. Knows no processes and looks nothing up.
"""

from collections.abc import Mapping
from typing import Protocol

import msgspec

from treefold.common import address
from treefold.common.errors import ConfigError

PORT = 29_700
"""Where a scheduler listens if nobody says otherwise."""
SLURM_PORTS = 1_000  # so many jobs may have their schedulers on one node
AUTO, NONE = "auto", "none"
SCRIPT = "script"
"""The role of a script that was started without ``treefold worker``: it may well be alone."""

Environment = Mapping[str, str]


class Found(msgspec.Struct, frozen=True):
    """What an engine says of this process.

    Attributes
    ----------
    engine : str
        Its name.
    role : str
        ``scheduler``, ``server`` or ``worker``; empty if it does not say.
    values : dict
        Settings, each with the variable that says so.
    """

    engine: str
    values: dict[str, tuple[object, str]]
    role: str = ""


class Engine(Protocol):
    """An engine that tells the processes it starts where they are."""

    name: str

    def detect(self, environ: Environment, role: str) -> Found | None:
        """What the engine says to a process with a role, None if it did not start it.

        Raises
        ------
        ConfigError
            A variable is there, and cannot be understood.
        """


class Dmlc:
    """``DMLC_*``, as ps-lite, MXNet and BytePS are told."""

    name = "dmlc"

    def detect(self, environ: Environment, role: str) -> Found | None:
        """See `Engine`."""
        host = environ.get("DMLC_PS_ROOT_URI", "")
        if not host:
            return None
        port = _number(environ, "DMLC_PS_ROOT_PORT", PORT)
        interface = environ.get("DMLC_INTERFACE", "")
        values = _places(role, host, port, "DMLC_PS_ROOT_URI")
        if interface and role in ("scheduler", "server"):
            own = port if role == "scheduler" else 0
            values["bind"] = (address.join(interface, own), "DMLC_INTERFACE")
        if role == "server":
            _take(values, "advertise", environ, "DMLC_NODE_HOST")
        _take(values, "servers", environ, "DMLC_NUM_SERVER")
        _take(values, "workers", environ, "DMLC_NUM_WORKER")
        if role != "scheduler":
            wish = "DMLC_SERVER_ID" if role == "server" else "DMLC_WORKER_ID"
            _take(values, "rank", environ, wish)
        return Found(self.name, values, environ.get("DMLC_ROLE", ""))


class Torchrun:
    """torchrun's variables. ``MASTER_PORT`` is that of torch's own store, so it is not used."""

    name = "torchrun"

    def detect(self, environ: Environment, role: str) -> Found | None:
        """See `Engine`."""
        host = environ.get("MASTER_ADDR", "")
        if not host or not {"RANK", "WORLD_SIZE"} <= environ.keys():
            return None
        size = _number(environ, "WORLD_SIZE")
        if role == SCRIPT and size == 1:
            return None
        values = _places(role, host, PORT, "MASTER_ADDR")
        values["workers"] = (size, "WORLD_SIZE")
        if role in ("worker", SCRIPT):
            values["rank"] = (_number(environ, "RANK"), "RANK")
        return Found(self.name, values)


class Slurm:
    """Slurm's: the scheduler is on the job's first node, at a port that the job's number gives."""

    name = "slurm"

    def detect(self, environ: Environment, role: str) -> Found | None:
        """See `Engine`."""
        nodes = environ.get("SLURM_JOB_NODELIST", "")
        if not nodes or "SLURM_JOB_ID" not in environ:
            return None
        if role == SCRIPT and _number(environ, "SLURM_STEP_NUM_TASKS", 1) == 1:
            return None  # the batch script itself, or a single task: it may well be alone
        port = PORT + _number(environ, "SLURM_JOB_ID") % SLURM_PORTS
        return Found(self.name, _places(role, first_node(nodes), port, "SLURM_JOB_NODELIST"))


class TensorFlow:
    """``TF_CONFIG``: workers and a chief, tasks of type ``ps``, and perhaps a ``scheduler``."""

    name = "tf-config"

    def detect(self, environ: Environment, role: str) -> Found | None:
        """See `Engine`."""
        text = environ.get("TF_CONFIG", "")
        if not text:
            return None
        try:
            config = msgspec.json.decode(text, type=_TensorFlowConfig)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"TF_CONFIG cannot be understood: {error}") from error
        cluster, task = config.cluster, config.task
        servers, kind = cluster.get("ps", []), task.type
        if not servers or kind == "evaluator":
            return None  # a cluster without parameter servers is not for us
        host, port = address.split(cluster.get("scheduler", servers)[0])
        values = _places(role, host, port if "scheduler" in cluster else PORT, "TF_CONFIG")
        chiefs = cluster.get("chief", []) + cluster.get("master", [])
        values["servers"] = (len(servers), "TF_CONFIG")
        values["workers"] = (len(chiefs) + len(cluster.get("worker", [])), "TF_CONFIG")
        if kind == "ps" and role == "server" and task.index < len(servers):
            own = servers[task.index]
            values["bind"] = (address.join("*", address.split(own)[1]), "TF_CONFIG")
            values["advertise"] = (f"{address.TCP}{own}", "TF_CONFIG")
        if role != "scheduler":
            values["rank"] = (task.index + (len(chiefs) if kind == "worker" else 0), "TF_CONFIG")
        known = {"ps": "server", "scheduler": "scheduler"}
        return Found(self.name, values, known.get(kind, "worker"))


class Kubernetes:
    """An indexed job's ``JOB_COMPLETION_INDEX``, and a service called ``treefold-scheduler``."""

    name = "kubernetes"
    SERVICE = "TREEFOLD_SCHEDULER_SERVICE_"

    def detect(self, environ: Environment, role: str) -> Found | None:
        """See `Engine`."""
        if "JOB_COMPLETION_INDEX" not in environ or role == "scheduler":
            return None
        values: dict[str, tuple[object, str]] = {}
        host = environ.get(f"{self.SERVICE}HOST", "")
        if host:
            port = _number(environ, f"{self.SERVICE}PORT", PORT)
            values = _places(role, host, port, f"{self.SERVICE}HOST")
        rank = _number(environ, "JOB_COMPLETION_INDEX")
        return Found(self.name, values | {"rank": (rank, "JOB_COMPLETION_INDEX")})


ENGINES: tuple[Engine, ...] = (Dmlc(), Torchrun(), Slurm(), TensorFlow(), Kubernetes())
NAMES = (AUTO, NONE, *(engine.name for engine in ENGINES))


class _TensorFlowTask(msgspec.Struct):
    type: str = "worker"
    index: int = 0


class _TensorFlowConfig(msgspec.Struct):
    cluster: dict[str, list[str]] = {}
    task: _TensorFlowTask = msgspec.field(default_factory=_TensorFlowTask)


def find(chosen: str, environ: Environment, role: str) -> Found | None:
    """What the engine says that started this process.

    Parameters
    ----------
    chosen : str
        One of `NAMES`.
    environ : mapping
        The process's environment.
    role : str
        ``scheduler``, ``server``, ``worker`` or `SCRIPT`.

    Raises
    ------
    ConfigError
        The chosen one did not; a variable cannot be understood; or a script is to be no worker.
    """
    asked = [engine for engine in ENGINES if chosen in (AUTO, engine.name)]
    found = next((one for engine in asked if (one := engine.detect(environ, role))), None)
    if found is None and chosen not in (AUTO, NONE):
        raise ConfigError(f"engine is {chosen!r}, and its variables are not in the environment")
    if found is not None and role == SCRIPT and found.role in ("scheduler", "server"):
        msg = (
            f"the environment ({found.engine}) says that this process is a {found.role}, and it "
            f"runs a worker's script: start `treefold {found.role}` here instead"
        )
        raise ConfigError(msg)
    return found


def first_node(nodes: str) -> str:
    """The first host of Slurm's list, such as ``gpu[07-09,12],login1``.

    Raises
    ------
    ConfigError
        It is not such a list.
    """
    name = ""
    rest = nodes
    while rest and not rest.startswith(","):
        plain, bracket, more = rest.partition("[")
        head, comma, _ = plain.partition(",")
        if comma or not bracket:
            return name + head
        inside, closed, rest = more.partition("]")
        if not closed:
            raise ConfigError(f"SLURM_JOB_NODELIST is {nodes!r}, in which a bracket stays open")
        name += plain + inside.partition(",")[0].partition("-")[0]
    return name


def _places(role: str, host: str, port: int, variable: str) -> dict[str, tuple[object, str]]:
    """Where the scheduler is, and where a process listens whose scheduler is there."""
    number = address.number_of(host)
    is_near = host == "localhost" or (number is not None and number.is_loopback)
    there = address.join(host, port)
    if role == "scheduler":
        bind = there if is_near else address.join("*", port)
        return {"bind": (bind, variable), "advertise": (there, variable)}
    values: dict[str, tuple[object, str]] = {"scheduler": (there, variable)}
    if role == "server":
        values["bind"] = ("tcp://127.0.0.1:0" if is_near else "tcp://*:0", variable)
    return values


def _take(
    values: dict[str, tuple[object, str]], key: str, environ: Environment, variable: str
) -> None:
    """Take a variable as it is, if it is there; an address gets its form."""
    text = environ.get(variable, "")
    if text:
        values[key] = (address.join(text, 0) if key == "advertise" else text, variable)


def _number(environ: Environment, variable: str, default: int | None = None) -> int:
    text = environ.get(variable, "")
    if not text and default is not None:
        return default
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"{variable} is {text!r}; it has to be a number")
    return int(text)
