"""Shared memory between processes: found by whom it may be, believed only if it is what was said.

A peer that lies, is gone, or has run out of descriptors or memory costs the lane and nothing else:
every test also counts the descriptors that are left. Limits are the kernel's own, set in a child.
"""

import errno
import faulthandler
import fcntl
import gc
import mmap
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from treefold.common.errors import CapacityError
from treefold.transport import segments
from treefold.transport.segments import PAGE, SEALS, TOKEN_BYTES, Offer, attach, create

NBYTES = 40_000  # not a whole number of pages
DONE, WRONG = 0, 1
NOBODY = 65_534


def descriptors() -> list[str]:
    """What is open in this process."""
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    gc.collect()
    before = descriptors()
    yield
    gc.collect()
    assert descriptors() == before


def in_child(action: Callable[[], None]) -> None:
    """Run something in a process of its own, whose limits are its own too."""
    pid = os.fork()
    if pid == 0:
        status = WRONG
        try:
            action()
            status = DONE
        except BaseException:  # as the interpreter does at its outermost
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == DONE


def limit(kind: int, value: int) -> None:
    """Lower a limit of this process."""
    resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def memory_file(size: int, seals: int = SEALS, token: bytes = b"") -> int:
    """An anonymous file that a peer could take for a segment."""
    file = os.memfd_create("lie", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.posix_fallocate(file, 0, size)
    os.pwrite(file, token, 0)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


# ---- what a segment is ---------------------------------------------------------------------------


def test_what_the_owner_writes_is_what_a_peer_reads() -> None:
    own = create("here", NBYTES)
    peer = attach(own.offer)
    own.body.copy_(torch.arange(NBYTES) % 251)
    own.words[3] = 7
    assert peer.nbytes == own.nbytes == NBYTES
    assert torch.equal(peer.body, own.body)
    assert int(peer.words[3]) == 7


def test_a_new_segment_is_zeroed_and_has_a_name_for_people() -> None:
    own = create("treefold-5-server", NBYTES)
    assert not own.body.any()
    assert "/memfd:treefold-5-server" in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_a_segment_cannot_be_made_shorter_or_longer_or_less_sealed() -> None:
    own = create("here", NBYTES)
    path = f"/proc/self/fd/{own.offer.descriptor}"
    file = os.open(path, os.O_RDWR)
    for size in (0, PAGE, PAGE + NBYTES - 1, PAGE + NBYTES + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(file, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    os.close(file)


def test_a_peer_that_writes_to_a_segment_is_ended_by_the_processor() -> None:
    own = create("here", NBYTES)
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.disable()
        peer = attach(own.offer)
        with torch.inference_mode():
            peer.body.fill_(1)
        os._exit(DONE)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGSEGV
    assert not own.body.any()


def test_memory_outlives_its_owner_for_a_peer_that_has_mapped_it() -> None:
    own = create("here", NBYTES)
    own.body.fill_(9)
    peer = attach(own.offer)
    assert peer.is_open()
    del own
    gc.collect()
    assert not peer.is_open()
    assert bool((peer.body == 9).all())


def test_memory_of_a_process_that_was_killed_is_known_to_be_without_an_owner() -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        own = create("other", NBYTES)
        own.body.fill_(5)
        os.write(writer, msgspec.msgpack.encode(own.offer))
        signal.pause()
    offer = msgspec.msgpack.decode(os.read(reader, 1_000), type=Offer)
    peer = attach(offer)
    assert peer.is_open()
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert not peer.is_open(), "a process that nobody has waited for yet is gone too"
    os.waitpid(pid, 0)
    assert not peer.is_open()
    assert bool((peer.body == 5).all())
    with pytest.raises(CapacityError, match="not on this host, or not ours to read"):
        attach(offer)
    for descriptor in (reader, writer):
        os.close(descriptor)


# ---- offers that are not true --------------------------------------------------------------------


def other_token(offer: Offer) -> Offer:
    """What a process of another host or container, which has this number there, would say."""
    return replace(offer, token=bytes(TOKEN_BYTES))


def nobody(offer: Offer) -> Offer:
    """A process that is gone."""
    pid = os.fork()
    if pid == 0:
        os._exit(DONE)
    os.waitpid(pid, 0)
    return replace(offer, pid=pid)


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        (other_token, "has this number here: another host"),
        (nobody, "not on this host, or not ours to read"),
        (lambda offer: replace(offer, pid=0), "not on this host, or not ours to read"),
        (lambda offer: replace(offer, pid=1 << 61), "not on this host, or not ours to read"),
        (lambda offer: replace(offer, descriptor=1 << 61), "not on this host"),
        (lambda offer: replace(offer, nbytes=NBYTES + 1), "not a sealed segment"),
        (lambda offer: replace(offer, nbytes=NBYTES - 1), "not a sealed segment"),
        (lambda offer: replace(offer, nbytes=0), "not a sealed segment"),
        (lambda offer: replace(offer, nbytes=1 << 62), "not a sealed segment"),
    ],
)
def test_an_offer_that_is_not_true_is_refused(lie: Callable[[Offer], Offer], words: str) -> None:
    own = create("here", NBYTES)
    with pytest.raises(CapacityError, match=words):
        attach(lie(own.offer))


@pytest.mark.parametrize("kind", ["unsealed", "shrinkable", "sparse", "pipe", "file", "device"])
def test_a_descriptor_that_is_something_else_is_refused(
    kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    token, far = bytes(range(TOKEN_BYTES)), -1
    if kind == "unsealed":
        file = memory_file(PAGE + NBYTES, 0, token)
    elif kind == "shrinkable":
        file = memory_file(PAGE + NBYTES, SEALS & ~fcntl.F_SEAL_SHRINK, token)
    elif kind == "sparse":  # reading it would take memory that nobody has reserved
        file = os.memfd_create("lie", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(file, PAGE + NBYTES)
        os.pwrite(file, token, 0)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, SEALS)
    elif kind == "pipe":
        file, far = os.pipe()  # opening one for reading could wait for ever
    elif kind == "file":
        path = tmp_path_factory.mktemp("file") / "segment"
        path.write_bytes(token + bytes(PAGE + NBYTES - TOKEN_BYTES))
        file = os.open(path, os.O_RDONLY)
    else:
        file = os.open("/dev/zero", os.O_RDONLY)
    with pytest.raises(CapacityError, match="not a se"):
        attach(Offer(5, os.getpid(), file, NBYTES, token))
    for descriptor in {file, far} - {-1}:
        os.close(descriptor)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_process_of_another_user_cannot_open_a_segment() -> None:
    own = create("here", NBYTES)

    def try_it() -> None:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        with pytest.raises(CapacityError, match="not ours to read: Permission denied"):
            attach(own.offer)

    in_child(try_it)


# ---- when there is no shared memory --------------------------------------------------------------


@pytest.mark.parametrize("free", [0, 1])
def test_without_free_descriptors_there_is_an_error_that_says_so(free: int) -> None:
    own = create("here", NBYTES)

    def exhaust() -> None:
        before = descriptors()
        lowest = os.open(os.devnull, os.O_RDONLY)
        os.close(lowest)
        limit(resource.RLIMIT_NOFILE, lowest + free)
        with pytest.raises(CapacityError, match="Too many open files"):
            create("more", NBYTES)
        with pytest.raises(CapacityError, match="Too many open files"):
            attach(own.offer)
        limit(resource.RLIMIT_NOFILE, lowest + 8)
        assert descriptors() == before

    in_child(exhaust)


@pytest.mark.parametrize(
    ("kind", "value"),
    [(resource.RLIMIT_FSIZE, NBYTES), (resource.RLIMIT_AS, 0)],
    ids=["file", "address space"],
)
def test_without_so_much_memory_there_is_an_error_and_nothing_stays_open(
    kind: int, value: int
) -> None:
    def exhaust() -> None:
        nbytes = 1 << 30 if kind == resource.RLIMIT_AS else NBYTES
        before = descriptors()
        own = create("before", PAGE)
        limit(kind, value or own_size() + (nbytes >> 4))
        with pytest.raises(CapacityError, match=f"cannot reserve {PAGE + nbytes} bytes"):
            create("too large", nbytes)
        del own
        assert descriptors() == before

    in_child(exhaust)


def own_size() -> int:
    """Address space of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * mmap.PAGESIZE


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOMEM])
def test_a_full_memory_file_system_is_an_error_and_nothing_stays_open(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CapacityError, match=os.strerror(number)):
        create("here", NBYTES)


def test_another_platform_has_no_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    own = create("here", NBYTES)
    monkeypatch.setattr(segments.sys, "platform", "darwin")  # type: ignore[attr-defined] # a module
    with pytest.raises(CapacityError, match="darwin has no anonymous shared memory"):
        create("here", NBYTES)
    with pytest.raises(CapacityError, match="darwin cannot open another process's memory"):
        attach(own.offer)
