"""Memory that processes on one host share: a writer's segments, and those mapped from peers.

A segment is an anonymous file in memory (`memfd`). It has no name that could be left behind: the
kernel frees it when the last process that maps it is gone, however that process died. A peer opens
it through ``/proc``, which only a process of the same user on the same host and in the same
container can do, and believes it only if it begins with the token that was agreed.

Nothing here knows messages, parts or rounds.
"""

import errno
import fcntl
import mmap
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from treefold.common.errors import CapacityError
from treefold.common.fold import read_only
from treefold.common.process import random_number

PAGE = 4_096
"""A segment begins with one page of its own: the token, and words that say what the rest holds."""
TOKEN_BYTES = 16
WORDS_AT = 64
WORDS = 8
SEALS = (
    0 if sys.platform != "linux" else fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
)
"""A segment cannot change its size: a mapping of it never reaches beyond its end."""

BLOCK_BYTES = 512  # what ``st_blocks`` counts
OURS_ALONE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of opening a peer's segment that say nothing about the peer."""

_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class Offer:
    """Where a segment can be found, as its owner says."""

    segment: int
    pid: int
    descriptor: int
    nbytes: int
    token: bytes


class Segment:
    """A mapped segment.

    Attributes
    ----------
    number : int
        Random; names the segment in messages.
    body : Tensor, uint8 [nbytes]
        Everything after the first page. Only the owner may write to it.
    words : Tensor, int64 [WORDS]
        What the body holds at this moment, by the owner's convention.
    pid : int
        The owner's process.
    """

    __slots__ = (
        "_file",
        "_inode",
        "_memory",
        "_typed",
        "address",
        "body",
        "number",
        "offer",
        "pid",
        "words",
    )

    def __init__(
        self, offer: Offer, memory: mmap.mmap, file: int | None, inode: tuple[int, int]
    ) -> None:
        self.offer = offer
        self.number = offer.segment
        self.pid = offer.pid
        self._file = file
        self._inode = inode
        self._memory = memory
        if file is None:
            whole = read_only(memory, torch.uint8)
        else:
            whole = torch.frombuffer(memory, dtype=torch.uint8)
        with torch.inference_mode(mode=file is None):  # nobody may write to what is a peer's
            self.words = whole[WORDS_AT : WORDS_AT + 8 * WORDS].view(torch.int64)
            self.body = whole[PAGE:]
        self.address = self.body.data_ptr()
        self._typed: dict[torch.dtype, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the body."""
        return self.body.numel()

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """The body as so many values of a type as are in it; a peer's may only be read."""
        known = self._typed.get(dtype)
        if known is None:
            end = self.nbytes - self.nbytes % dtype.itemsize
            with torch.inference_mode(mode=self._file is None):
                known = self._typed[dtype] = self.body[:end].view(dtype)
        return known

    def window(self, offset: int, elements: int) -> torch.Tensor:
        """Values in the body that autograd may compute with, float32 [elements].

        Parameters
        ----------
        offset : int
            Where they begin, in bytes.
        elements : int
            How many, above 0.

        Returns
        -------
        Tensor
            Keeps the memory mapped, and has a storage of nothing but these values. In a peer's
            segment whoever writes to it ends the process (SIGSEGV).
        """
        at = PAGE + offset
        return torch.frombuffer(self._memory, dtype=torch.float32, offset=at, count=elements)

    def is_open(self) -> bool:
        """Whether the owner still has it: not if it died, also when its number is used again."""
        try:
            found = Path(_path(self.offer)).stat()
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._inode

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Where in the body a tensor begins, None if it lies elsewhere."""
        offset = tensor.data_ptr() - self.address
        return offset if 0 <= offset < self.nbytes else None

    def __del__(self) -> None:
        """Close the file; the memory lives as long as anybody maps it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def create(name: str, nbytes: int) -> Segment:
    """Make a segment of this process's own.

    Parameters
    ----------
    name : str
        Seen in ``/proc/<pid>/maps``, for people.
    nbytes : int
        Bytes of the body, zeroed. The memory is reserved now, not when it is first written.

    Returns
    -------
    Segment

    Raises
    ------
    CapacityError
        There is not so much memory, or this platform has no such segments.
    """
    if sys.platform != "linux":
        raise CapacityError(f"{sys.platform} has no anonymous shared memory that peers can open")
    total = PAGE + nbytes
    try:
        file = os.memfd_create(name[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise CapacityError(f"cannot create shared memory: {error}") from error
    try:
        os.posix_fallocate(file, 0, total)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, SEALS)
        memory = mmap.mmap(file, total, mmap.MAP_SHARED | mmap.MAP_POPULATE)
    except OSError as error:
        os.close(file)
        raise CapacityError(f"cannot reserve {total} bytes of shared memory: {error}") from error
    token = os.urandom(TOKEN_BYTES)
    memory[:TOKEN_BYTES] = token
    offer = Offer(random_number(), os.getpid(), file, nbytes, token)
    return Segment(offer, memory, file, _inode(os.fstat(file)))


def attach(offer: Offer) -> Segment:
    """Map a peer's segment for reading.

    Parameters
    ----------
    offer : Offer
        What the peer said.

    Returns
    -------
    Segment

    Raises
    ------
    CapacityError
        It cannot be opened from here (another host, container or user), or is not what was offered.
    """
    if sys.platform != "linux":
        raise CapacityError(f"{sys.platform} cannot open another process's memory")
    try:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        file = os.open(_path(offer), flags)
    except OSError as error:
        if error.errno in OURS_ALONE:
            raise CapacityError(f"cannot open a peer's memory: {error.strerror}") from error
        raise CapacityError(f"not on this host, or not ours to read: {error.strerror}") from error
    try:
        seals = fcntl.fcntl(file, fcntl.F_GET_SEALS)
        found = os.fstat(file)
        size = PAGE + offer.nbytes
        if seals & SEALS != SEALS or found.st_size != size or found.st_blocks * BLOCK_BYTES < size:
            raise CapacityError(f"not a sealed segment with memory for {offer.nbytes} bytes")
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        memory = mmap.mmap(file, size, flags, mmap.PROT_READ)
    except OSError as error:
        raise CapacityError(f"not a segment that can be mapped: {error.strerror}") from error
    finally:
        os.close(file)
    if memory[:TOKEN_BYTES] != offer.token:
        raise CapacityError("another process's memory has this number here: another host")
    return Segment(offer, memory, None, _inode(found))


def announce(segment: Segment, buffer: int, version: int) -> None:
    """Say that one of the segment's two buffers holds a version from now on, before writing it."""
    segment.words[buffer] = version
    _barrier()


def holds(segment: Segment, version: int) -> bool:
    """Whether everything read so far from the buffer of a version was that version."""
    _barrier()
    return int(segment.words[version % 2]) == version


def _path(offer: Offer) -> str:
    return f"/proc/{offer.pid}/fd/{offer.descriptor}"


def _inode(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _barrier() -> None:
    """Keep the processor from moving memory accesses across; a lock does it, and is portable."""
    with _LOCK:
        return
