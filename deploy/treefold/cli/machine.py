"""What `treefold doctor` looks at of this machine: clocks, limits, shared memory, a port."""

import datetime
import errno
import resource
import socket
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

import psutil

from treefold.cli.checks import CheckError
from treefold.cli.scheduler import DEFAULT_ADDRESS
from treefold.common.address import split
from treefold.common.errors import TreefoldError
from treefold.common.host import memory_free_bytes
from treefold.launch.runtime import running

MIB = 1 << 20
PROCESSES_MIN = 512  # a member has a handful of threads beside those of torch
MEMORY_MIN_BYTES = 512 * MIB  # a server with torch needs half of it before it holds anything
SEGMENT_BYTES = MIB
READINGS = 1_000
READING_MAX_NS = 10_000  # a round reads the clock some hundred times
DAY_S = 86_400
CLOCK_SOURCE = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")


def check_clock(
    monotonic_ns: Callable[[], int] = time.monotonic_ns,
    wall_s: float | None = None,
    installed_s: float | None = None,
) -> str:
    """Time goes on, reading it is cheap, and the system's clock cannot be far off.

    Parameters
    ----------
    monotonic_ns : callable
        The clock that deadlines are made of.
    wall_s : float, optional
        What the system's clock shows, in seconds since 1970.
    installed_s : float, optional
        When this file was written.
    """
    readings = [monotonic_ns() for _ in range(READINGS)]
    steps = [after - before for before, after in pairwise(readings)]
    if min(steps) < 0 or readings[-1] <= readings[0]:
        text = "the monotonic clock stands still or goes back"
        raise CheckError(text, "choose another clock source of the kernel, such as tsc")
    cost_ns = median(steps)
    is_known = CLOCK_SOURCE.exists()
    source = CLOCK_SOURCE.read_text(encoding="utf-8").strip() if is_known else "of this system"
    if cost_ns > READING_MAX_NS:
        text = f"reading the clock takes {cost_ns / 1e3:.0f} us with the clock source {source}"
        raise CheckError(text, "choose a faster one of the kernel, such as tsc")
    now_s = time.clock_gettime(time.CLOCK_REALTIME) if wall_s is None else wall_s
    known_s = Path(__file__).stat().st_mtime if installed_s is None else installed_s
    shown = datetime.datetime.fromtimestamp(now_s, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    if now_s < known_s - DAY_S:
        text = f"the system's clock shows {shown}, before treefold was installed"
        raise CheckError(text, "set it, and let chrony or ntpd keep it: logs have its times")
    return f"{shown}, clock source {source}, {cost_ns:.0f} ns a reading"


def check_processes(limits: tuple[int, int] | None = None) -> str:
    """Enough processes and threads may run.

    Parameters
    ----------
    limits : (int, int), optional
        Soft and hard limit; this process's by default.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC) if limits is None else limits
    if soft == resource.RLIM_INFINITY:
        return "as many as you like may run"
    if soft < PROCESSES_MIN:
        advice = f"ulimit -u {PROCESSES_MIN} (the hard limit is {hard})"
        raise CheckError(f"{soft} processes and threads of this user may run", advice)
    return f"{soft} processes and threads of this user may run"


def check_memory(free_bytes: int | None = None) -> str:
    """Segments of shared memory can be made and opened, and there is room for them.

    Parameters
    ----------
    free_bytes : int, optional
        Memory that is left; looked up by default.
    """
    from treefold.transport import segments  # noqa: PLC0415 # needs torch

    free = memory_free_bytes() if free_bytes is None else free_bytes
    try:
        made = segments.create("treefold-doctor", SEGMENT_BYTES)
        segments.attach(made.offer)
    except (OSError, TreefoldError) as error:
        advice = "members on this machine will use sockets, which is slower; --lane socket says so"
        raise CheckError(f"no shared memory: {error}", advice) from error
    if free < MEMORY_MIN_BYTES:
        text = f"{free / MIB:,.0f} MiB of memory are left, for shared segments as well"
        advice = "end something else, or raise the container's memory limit (not its /dev/shm)"
        raise CheckError(text, advice)
    return f"segments can be shared (memfd, not /dev/shm); {free / MIB:,.0f} MiB of memory are left"


def check_port(address: str = DEFAULT_ADDRESS) -> str:
    """A scheduler can listen where it does by default, or does so.

    Parameters
    ----------
    address : str
        Where.
    """
    host, port = split(address)
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise CheckError(f"{address}: {error}", "give --bind another address") from error
        pid, who = _holder(port)
        if any(note.pid == pid for note in running()):
            return f"a scheduler listens at {address} (process {pid})"
        advice = "stop it, or give treefold scheduler another port: --bind tcp://HOST:PORT"
        raise CheckError(f"{address} is held by {who}", advice) from error
    return f"{address} is free for a scheduler"


def _holder(port: int) -> tuple[int, str]:
    """Who listens there: its process number, 0 if that is not known, and its name."""
    try:
        listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        there = [one.pid for one in listening if getattr(one.laddr, "port", 0) == port]
        pid = next((pid for pid in there if pid), 0)
        name = psutil.Process(pid).name() if pid else ""
    except psutil.Error:
        pid, name = 0, ""
    return pid, f"process {pid} ({name})" if pid else "a process of somebody else"
