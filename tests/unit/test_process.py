"""What the C allocator does with the memory that a worker receives versions into."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from treefold.common.config import load
from treefold.common.fold import Payload
from treefold.transport.carrier import Held
from treefold.worker import shell as shells
from treefold.worker.shell import FRAMED_VERSIONS, WorkerShell

AGAIN_AND_AGAIN = """
import ctypes, resource, sys, threading
from treefold.common.process import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
FRAME, FRAMES = 4 << 20, 25


def receive():
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        frames = [libc.malloc(FRAME) for _ in range(FRAMES)]
        for frame in frames:
            libc.memset(frame, 1, FRAME)
        for frame in frames:
            libc.free(frame)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


if sys.argv[1] == "kept":
    keep_freed_memory(is_received=True)
thread = threading.Thread(target=receive)  # as ZeroMQ's, which has memory of its own
thread.start()
thread.join()
"""


def faults(how: str) -> list[int]:
    """How often the system had to find a page, each time that 100 MiB came."""
    command = [sys.executable, "-c", AGAIN_AND_AGAIN, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")
def test_what_was_received_into_is_used_again_and_not_mapped_anew() -> None:
    first, *others = faults("kept")
    assert 20 * max(others) <= first
    assert min(faults("given back")) > 10 * max(1, *others), "the control shows nothing"


def test_a_worker_keeps_it_once_versions_come_by_sockets_and_not_for_the_first_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[bool] = []
    monkeypatch.setattr(
        shells, "keep_freed_memory", lambda *, is_received: kept.append(is_received)
    )
    worker = WorkerShell(load({"scheduler": "ipc:///nonexistent/never"}).settings)
    framed = [Held(Payload(torch.zeros(1)))]
    for version in range(FRAMED_VERSIONS - 1):
        worker._keep_memory(version, framed)
        worker._keep_memory(version, framed)  # another table's, or another part's
    assert kept == []
    for version in range(FRAMED_VERSIONS - 1, FRAMED_VERSIONS + 5):
        worker._keep_memory(version, framed)
    assert kept == [True]
    worker.hub.close()
