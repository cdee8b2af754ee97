"""A host's cable with delay, jitter and loss: a process that carries its frames in its own time.

Run as ``python -m tests.support.relay NEAR FAR DELAY_MS LOSS``: makes the two ends as TAP devices
in the network namespace that it runs in, says so, and carries until it is killed. Kernels without
the queueing discipline ``netem`` have no such thing of their own.
"""

import fcntl
import heapq
import itertools
import os
import random
import select
import struct
import sys
import time
from contextlib import suppress

TUNSETIFF = 0x400454CA  # linux/if_tun.h
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
FRAME_BYTES_MAX = 1 << 16
WAITING_MAX = 1_000  # frames on their way in one direction; more are lost, as in any queue


def make(name: str) -> int:
    """A TAP device of this name; its descriptor."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return descriptor


def carry(ends: tuple[int, int], delay_s: float, loss: float) -> None:
    """Carry frames between two descriptors for ever.

    Parameters
    ----------
    ends : (int, int)
        Devices.
    delay_s : float
        Mean time that a frame takes; up to a quarter more or less, so that some overtake others.
    loss : float
        Share of the frames that do not arrive.
    """
    rng = random.Random(1)
    order = itertools.count()
    waiting: list[tuple[float, int, int, bytes]] = []
    while True:
        timeout_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for end in select.select(ends, [], [], timeout_s)[0]:
            frame = os.read(end, FRAME_BYTES_MAX)
            if rng.random() >= loss and len(waiting) < WAITING_MAX:
                due_s = time.monotonic() + delay_s * rng.uniform(0.75, 1.25)
                other = ends[1 - ends.index(end)]
                heapq.heappush(waiting, (due_s, next(order), other, frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, other, frame = heapq.heappop(waiting)
            with suppress(OSError):  # a device whose link is down yet loses it, as a network does
                os.write(other, frame)


if __name__ == "__main__":
    near, far, delay_ms, share = sys.argv[1:]
    made = make(near), make(far)
    sys.stdout.write("made\n")
    sys.stdout.flush()
    carry(made, float(delay_ms) / 1e3, float(share))
