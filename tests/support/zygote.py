"""A process that has imported everything once, and forks the processes of a test from itself.

Importing torch takes seconds of a processor; a fork takes milliseconds. What comes of it is a
process like any other: memory, sockets, signals and exit status of its own. The zygote itself runs
no thread and opens no socket but its link to the tests, so that a fork inherits nothing.

A request is one JSON message with two descriptors, for standard output and standard error. It may
name a host of `tests.support.netns` for the process to live on. Answers
are ``started`` with the process id and ``ended`` with the exit status. When the link breaks, every
child is killed.
"""

import atexit
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
from importlib import import_module
from pathlib import Path

from tests.support import netns

MESSAGE_BYTES_MAX = 1 << 17
PRELOADED = (
    "treefold.torch", "treefold.scheduler.shell", "treefold.server.shell", "treefold.cli.main",
    "torch.optim.sgd", "torch.optim.adamw", "torch.optim.adagrad",
)  # fmt: skip


def main(descriptor: int) -> None:
    """Fork what is asked for until the link breaks."""
    link = socket.socket(fileno=descriptor)
    for name in PRELOADED:
        import_module(name)
    import_module("torch").set_num_threads(1)
    import_module("treefold.server.shell").spare_compiler()
    wake, bell = socket.socketpair()
    wake.setblocking(False)
    bell.setblocking(False)
    signal.set_wakeup_fd(bell.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, int] = {}
    waits = selectors.DefaultSelector()
    waits.register(link, selectors.EVENT_READ)
    waits.register(wake, selectors.EVENT_READ)
    while True:
        ready = [key.fileobj for key, _ in waits.select()]
        if wake in ready:
            wake.recv(4096)
            _tell_ended(link, children)
        if link in ready:
            body, descriptors, _, _ = socket.recv_fds(link, MESSAGE_BYTES_MAX, 2)
            if not body:
                break
            _fork(link, json.loads(body), descriptors, children)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _tell_ended(link: socket.socket, children: dict[int, int]) -> None:
    """Report every child that has ended."""
    for pid, number in list(children.items()):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            del children[pid]
            code = os.waitstatus_to_exitcode(status)
            link.send(json.dumps({"number": number, "ended": code}).encode())


def _fork(
    link: socket.socket, request: dict[str, object], streams: list[int], children: dict[int, int]
) -> None:
    pid = os.fork()
    if pid == 0:
        link.close()
        os._exit(_become(request, streams))
    for stream in streams:
        os.close(stream)
    number = request["number"]
    children[pid] = int(str(number))
    link.send(json.dumps({"number": number, "started": pid}).encode())


def _become(request: dict[str, object], streams: list[int]) -> int:
    """Run a command in this fresh process as the interpreter would; returns its exit status."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in enumerate((nothing, *streams)):
        os.dup2(source, target)
        os.close(source)
    environment, command = request["environment"], request["command"]
    assert isinstance(environment, dict)
    assert isinstance(command, list)
    os.environ.clear()
    os.environ.update(environment)
    status = 1
    try:
        if request["place"]:
            netns.enter(str(request["place"]))
        run(command)
        status = 0
    except SystemExit as ending:
        status = _status_of(ending)
    except BaseException as error:  # as the interpreter does at its outermost
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        threading._shutdown()  # type: ignore[attr-defined] # what the interpreter calls here
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    return status


def run(command: list[str]) -> None:
    """Run a command in this interpreter.

    Parameters
    ----------
    command : list of str
        ``["fault:NAME", ...]`` plants a fault of `tests.support.faults` first, or with
        ``fault:MODULE.NAME`` of another module there; then a script's path or a module with ``-m``,
        and its arguments.
    """
    while command[0].startswith("fault:"):
        module, _, name = command[0].removeprefix("fault:").rpartition(".")
        getattr(import_module(f"tests.support.{module or 'faults'}"), name)()
        command = command[1:]
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = command
    sys.path[0] = str(Path(command[0]).parent)
    runpy.run_path(command[0], run_name="__main__")


def _status_of(ending: SystemExit) -> int:
    if ending.code is None or isinstance(ending.code, int):
        return ending.code or 0
    sys.stderr.write(f"{ending.code}\n")
    return 1


if __name__ == "__main__":
    if sys.argv[1] == "--run":
        run(sys.argv[2:])
    else:
        main(int(sys.argv[1]))
