"""What a process finds where it runs: versions, limits, memory, and how far its clock is."""

import functools
import platform
import resource
import time
from importlib import metadata
from pathlib import Path

import psutil

from treefold.common.facts import HostFacts

CGROUP = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 62  # files, where there is no limit


def host_facts() -> HostFacts:
    """Everything, as it is now."""
    return HostFacts(
        *_versions(),
        files_max(),
        memory_free_bytes(),
        wall_lead_ns(),
    )


@functools.cache
def _versions() -> tuple[str, str, str]:
    """Of the package, Python and torch: looked up once, since that reads files."""
    return metadata.version("treefold"), platform.python_version(), metadata.version("torch")


def files_max() -> int:
    """How many files this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft


def wall_lead_ns() -> int:
    """What the system's clock shows more than the monotonic one; nothing is decided by it."""
    return time.clock_gettime_ns(time.CLOCK_REALTIME) - time.monotonic_ns()


def memory_free_bytes(cgroup: Path = CGROUP) -> int:
    """Memory that is left: what the machine has available, or the container's limit allows.

    Parameters
    ----------
    cgroup : Path
        This process's control group, as a container sees it.
    """
    free = psutil.virtual_memory().available
    try:
        limit = (cgroup / "memory.max").read_text(encoding="utf-8").strip()
        if not limit.isdigit():
            return free
        used = int((cgroup / "memory.current").read_text(encoding="utf-8"))
        lines = (cgroup / "memory.stat").read_text(encoding="utf-8").splitlines()
        cached = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        return min(free, max(0, int(limit) - used + cached))  # the kernel gives files' pages back
    except (OSError, ValueError):  # no such control group, or an older kind of them
        return free
