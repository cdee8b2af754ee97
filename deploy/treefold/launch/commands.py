"""Which command and which environment each process of a launch gets."""

import os
import secrets
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from treefold.checkpoint.store import Store
from treefold.common.config import KEYS, PREFIX, Settings, environment_of, metrics_port_of
from treefold.common.engines import NONE
from treefold.common.errors import ConfigError
from treefold.launch.core import SCHEDULER
from treefold.transport.web import is_loopback

IPC_PATH_MAX = 103  # bytes of a socket's path that Linux and macOS both take
AGAIN_S = 15.0  # for a worker that is started again to find the scheduler, which was there before
LOOPBACK = "tcp://127.0.0.1:0"
TRANSPORTS = ("ipc", "tcp")
CHILD = str(Path(__file__).with_name("child.py"))
GUARD = str(Path(__file__).with_name("guard.py"))
BARE_PYTHON = [sys.executable, "-I", "-S"]  # starts in milliseconds and sees nothing of the user's
TOKEN_BYTES = 18
THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """What is to be launched.

    Attributes
    ----------
    settings : Settings
        Handed on to every process, but for addresses.
    command : list of str
        What each worker runs.
    transport : str
        ``ipc`` or ``tcp``.
    environment : mapping of str to str
        Of the launcher; the processes' own is based on it.
    """

    settings: Settings
    command: list[str]
    transport: str = "ipc"
    environment: Mapping[str, str] = field(default_factory=dict)


class Attempt:
    """One start of the whole job: its addresses, and what follows from them.

    Parameters
    ----------
    plan : LaunchPlan
        What is to be launched.
    folder : str
        For the sockets of this attempt.
    is_again : bool
        Whether there was one before, whose checkpoints it goes on from.

    Attributes
    ----------
    link : str
        Opens the live page, as a scheduler of this launch has said; empty if none has.

    Raises
    ------
    ConfigError
        The folder's path is too long for sockets.
    """

    def __init__(self, plan: LaunchPlan, folder: str, *, is_again: bool = False) -> None:
        self._plan = plan
        self._folder = folder
        self.scheduler = ""
        self._begun: dict[str, None] = {}
        self.link = ""
        self._page_token = page_token(plan.settings, folder)
        made = plan.settings.checkpoint
        is_made = is_again and bool(made) and bool(Store(made).versions())
        self._resume = made if is_made else plan.settings.resume
        given = plan.settings.journal
        own = f"{folder}/journal" if plan.settings.is_recoverable else ""
        # A new job in each attempt: it must not go on from what another one wrote there.
        self._journal = f"{given}/{'-'.join(Path(folder).parts[-2:])}" if given else own
        if plan.transport == "ipc":
            check_socket_path(f"{folder}/server-{plan.settings.servers}")
            self.scheduler = self._bind(SCHEDULER)

    def command(self, name: str) -> list[str]:
        """The command of one process, by its name such as ``server-0``."""
        role = name.partition("-")[0]
        if role == "worker":
            return self._plan.command
        return [sys.executable, "-P", "-m", "treefold.cli", role]

    def environment(self, name: str) -> dict[str, str]:
        """The environment of one process that is about to start: settings of the launch alone."""
        patience_s = self._plan.settings.connect_timeout_s
        if name.startswith("worker") and name in self._begun:
            patience_s = min(patience_s, AGAIN_S)
        self._begun[name] = None
        role, _, number = name.partition("-")
        port = metrics_port_of(self._plan.settings, role, int(number or 0))
        of_member = msgspec.structs.replace(
            self._plan.settings,
            scheduler="" if name == SCHEDULER else self.scheduler,
            bind=self._known(name) or self._bind(name),
            advertise="",
            engine=NONE,
            insecure=False,
            linger=False,
            journal=self._journal if name == SCHEDULER else "",
            resume=self._resume if name == SCHEDULER else "",
            rank=int(number or -1),
            metrics_port=port,
            page_port=self._page_port() if name == SCHEDULER else -1,
            page_token_file=self._page_token if name == SCHEDULER else "",
            report=self._plan.settings.report if name == SCHEDULER else "",
            connect_timeout_s=patience_s,
        )
        values = environment_of(msgspec.to_builtins(of_member))
        return prepared(self._plan.environment) | values | {PREFIX + "CONFIG": os.devnull}

    def _page_port(self) -> int:
        """The port of the page; a scheduler that is started again has that of the one before."""
        known = urlsplit(self.link).port
        return self._plan.settings.page_port if known is None else known

    def _known(self, name: str) -> str:
        """Where a scheduler that is started again is expected, empty before it was anywhere."""
        return self.scheduler if name == SCHEDULER else ""

    def _bind(self, name: str) -> str:
        is_ipc = self._plan.transport == "ipc" and not name.startswith("worker")
        return f"ipc://{self._folder}/{name}" if is_ipc else LOOPBACK


def page_token(settings: Settings, folder: str) -> str:
    """The file with the token of the live page, one for all schedulers of a launch.

    So that a page that is open goes on with a scheduler that was started again.
    """
    if settings.page_port < 0 or settings.page_token_file or not is_loopback(settings.page_bind):
        return settings.page_token_file
    file = Path(folder).with_name("page-token")  # in the launch's own folder, as the attempt's is
    if not file.exists():
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
            opened.write(secrets.token_urlsafe(TOKEN_BYTES))
    return str(file)


def prepared(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for processes of a cluster, without any setting of treefold.

    Parameters
    ----------
    environment : mapping of str to str
        The caller's.

    Returns
    -------
    dict of str to str
        Output is not held back, and one thread computes unless the caller had said how many.
    """
    own = {PREFIX + key.upper() for key in KEYS} | {PREFIX + "CONFIG"}
    kept = {key: value for key, value in environment.items() if key not in own}
    return {THREADS: "1", "PYTHONUNBUFFERED": "1"} | kept


def check_socket_path(path: str) -> None:
    """Refuse a path that is too long for a socket.

    Raises
    ------
    ConfigError
        It is.
    """
    length = len(os.fsencode(path))
    if length > IPC_PATH_MAX:
        msg = (
            f"{path} is {length} bytes long, and a socket's path may have {IPC_PATH_MAX}; use the "
            f"tcp transport, or set TMPDIR to something shorter than {tempfile.gettempdir()}"
        )
        raise ConfigError(msg)
