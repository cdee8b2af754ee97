"""``treefold doctor``: is everything there that a cluster needs, and does a push come back right.

Each check is a function that returns what it found, or raises `CheckError` with what to change.
What may be missing is imported by the check that looks for it.
"""

import argparse
import os
import resource
import socket
import sys
import tempfile
from collections.abc import Iterable
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from treefold.cli.checks import Check, CheckError
from treefold.common.errors import TreefoldError

if TYPE_CHECKING:
    from treefold.common.config import Settings

DESCRIPTION = (
    "Check this machine, and try a push and pull round trip; with --scheduler, look at a running "
    "cluster from here instead. Says what to change."
)
NEEDED = ("torch", "numpy", "pyzmq", "msgspec", "psutil", "rich", "safetensors", "fsspec")
SUBPACKAGES = (
    "checkpoint", "cli", "common", "launch", "scheduler", "server", "torch", "transport", "wire",
    "worker",
)  # fmt: skip
MACHINE = {"clock": "check_clock", "processes": "check_processes", "shared memory": "check_memory"}
PYTHON_MIN = (3, 11)
FILES_MIN = 1_024  # enough for some hundred workers: a process has a handful per peer


def main(words: list[str]) -> int:
    """Check everything.

    Parameters
    ----------
    words : list of str
        The command line after ``treefold doctor``.

    Returns
    -------
    int
        0 if all is well, 1 if something has to be changed.
    """
    scheduler, settings = _read(words)
    checks: dict[str, Check] = {
        "python": check_python,
        "packages": check_packages,
        "treefold": check_namespace,
        "processors": check_processors,
        "open files": check_files,
        "temporary folder": check_folder,
        "loopback": check_loopback,
        **{name: _of_machine(function) for name, function in MACHINE.items()},
    }
    if settings is not None and scheduler:
        from treefold.cli.checkup import cluster_checks  # noqa: PLC0415 # may lack its packages

        checks |= cluster_checks(settings, scheduler)
    else:
        checks |= {
            "port": _of_machine("check_port"),
            "one process": lambda: check_trial("embedded"),
            "real processes": lambda: check_trial("processes"),
        }
    failed = examine(checks)
    if failed:
        sys.stdout.write(f"\n{failed} of {len(checks)} checks failed\n")
    return 1 if failed else 0


def _read(words: list[str]) -> "tuple[str, Settings | None]":
    """The address of a cluster to look at, if there is one, and the settings.

    Where packages are missing that settings need, there are none; a check says what is missing.
    """
    try:
        from treefold.cli.flags import Parser  # noqa: PLC0415 # as above
    except ImportError:
        argparse.ArgumentParser(prog="treefold doctor", description=DESCRIPTION).parse_args(words)
        return "", None
    _, loaded = Parser("doctor", DESCRIPTION, ["scheduler", "keys"]).read(words)
    return loaded.settings.scheduler, loaded.settings


def _of_machine(name: str) -> Check:
    """A check of `treefold.cli.machine`, which is imported when it is made."""

    def check() -> str:
        try:
            module = import_module("treefold.cli.machine")
        except ImportError as error:
            raise CheckError(f"not looked at: {error}", "install what is missing first") from error
        found: Check = getattr(module, name)
        return found()

    return check


def examine(checks: dict[str, Check]) -> int:
    """Make every check and print what it found.

    Parameters
    ----------
    checks : dict of str to callable
        By what they look at.

    Returns
    -------
    int
        How many failed.
    """
    failed = 0
    width = max(map(len, checks))
    for name, check in checks.items():
        try:
            text = f"ok    {name:{width}}  {check()}"
        except CheckError as error:
            failed += 1
            lines = [f"FAIL  {name:{width}}  {error.found}", f"      {'':{width}}  {error.advice}"]
            text = "\n".join(lines)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    return failed


# ---- the installation ----------------------------------------------------------------------------


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> str:
    """The interpreter is new enough."""
    found = ".".join(map(str, version))
    if version < PYTHON_MIN:
        raise CheckError(f"Python {found}", "install Python 3.11 or later")
    return f"{found} at {sys.executable}"


def check_packages(names: Iterable[str] = NEEDED) -> str:
    """Everything that treefold needs is installed."""
    found, missing = [], []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        text = ", ".join(missing)
        raise CheckError(f"not installed: {text}", "pip install -c constraints.txt .")
    return ", ".join(found)


def check_namespace(paths: Iterable[str] | None = None) -> str:
    """The package is the namespace that it has to be, and whole.

    Parameters
    ----------
    paths : iterable of str, optional
        Folders where Python looks; by default its own, and the one that scripts here would add.
    """
    for path in [*sys.path, str(Path.cwd())] if paths is None else paths:
        for stray in (Path(path) / "treefold.py", Path(path) / "treefold" / "__init__.py"):
            if stray.is_file():
                raise CheckError(f"{stray} hides the package", "remove or rename that file")
    missing = [name for name in SUBPACKAGES if find_spec(f"treefold.{name}") is None]
    if missing:
        text = ", ".join(missing)
        raise CheckError(f"parts are missing: {text}", "install treefold again")
    roots = list(dict.fromkeys(import_module("treefold").__path__))
    return f"{metadata.version('treefold')} in {', '.join(roots)}"


# ---- the machine ---------------------------------------------------------------------------------


def check_processors() -> str:
    """How many there are."""
    return f"{os.cpu_count()}; every process computes with one thread unless told otherwise"


def check_files(limits: tuple[int, int] | None = None) -> str:
    """Enough files may be open.

    Parameters
    ----------
    limits : (int, int), optional
        Soft and hard limit; this process's by default.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE) if limits is None else limits
    if soft != resource.RLIM_INFINITY and soft < FILES_MIN:
        raise CheckError(f"{soft} may be open", f"ulimit -n {FILES_MIN} (the hard limit is {hard})")
    return f"{soft} may be open"


def check_folder(folder: str | None = None) -> str:
    """Sockets can be made in the temporary folder.

    Parameters
    ----------
    folder : str, optional
        By default the one that Python chose.
    """
    from treefold.launch.commands import check_socket_path  # noqa: PLC0415 # needs msgspec

    try:
        with (
            tempfile.TemporaryDirectory(prefix="treefold-", dir=folder) as made,
            socket.socket(socket.AF_UNIX) as sock,
        ):
            path = f"{made}/1/server-999"
            check_socket_path(path)
            sock.bind(f"{made}/socket")
    except (OSError, TreefoldError) as error:
        raise CheckError(
            f"{error}", "set TMPDIR to a short path of a folder to write to"
        ) from error
    return f"{folder or tempfile.gettempdir()} takes sockets"


def check_loopback(host: str = "127.0.0.1") -> str:
    """Processes of this machine can talk over TCP.

    Parameters
    ----------
    host : str
        Where to listen.
    """
    try:
        with socket.create_server((host, 0)) as listener:
            port = listener.getsockname()[1]
            with socket.create_connection((host, port), timeout=2) as near:
                far, _ = listener.accept()
                with far:
                    near.sendall(b"?")
                    is_heard = far.recv(1) == b"?"
    except OSError as error:
        raise CheckError(f"{host}: {error}", "bring the loopback interface up") from error
    if not is_heard:
        raise CheckError(f"{host} loses data", "look for a firewall rule on the loopback interface")
    return f"{host} takes connections"


# ---- a round trip --------------------------------------------------------------------------------


def check_trial(name: str) -> str:
    """A push comes back right.

    Parameters
    ----------
    name : str
        A function of `treefold.cli.trials`.
    """
    try:
        trial: Check = getattr(import_module("treefold.cli.trials"), name)
        return trial()
    except ImportError as error:
        raise CheckError(f"not tried: {error}", "install what is missing first") from error
    except (OSError, TreefoldError) as error:
        raise CheckError(f"{error}", "the checks above say what may be missing") from error
