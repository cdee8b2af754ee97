"""Machines of their own for fault tests: network namespaces on one bridge, whose paths can be cut.

A path is cut with a wrong, permanent neighbour entry: what is sent that way goes to an address that
nobody has, and is lost without an error, as in a real partition. Nothing but iproute2 is needed,
and root. Paths have one direction; the kernel retransmits what was lost when it is healed. With TCP
the direction that was not cut soon stands still as well: its acknowledgements are lost, so that it
carries a first message if nothing was unacknowledged, and after a timeout nothing more.

Members that find themselves on one machine use shared memory, which no cut reaches: tests of a
cluster set ``lane`` to ``socket``.

Names carry the process that made them, so that what a killed one left is found and removed.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

NAME = re.compile(r"treefold-(?P<pid>[0-9]+)-(?P<number>[0-9]+)-\w+")
FOLDER = Path("/run/netns")
NOBODY = "02:00:00:00:00:99"
CLONE_NEWNET = 0x40000000  # linux/sched.h


class Network:
    """Hosts 0, 1, ... that reach each other; see `network`.

    Parameters
    ----------
    hosts : int
        How many.
    """

    made = 0

    def __init__(self, hosts: int = 5) -> None:
        Network.made += 1
        self._prefix = f"treefold-{os.getpid()}-{Network.made}"
        self.hosts = hosts
        self._macs: list[str] = []
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def address(self, host: int) -> str:
        """The address of a host."""
        return f"10.77.0.{host + 1}"

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """The command line that runs ``command`` on a host; it keeps the process's number."""
        return ["ip", "netns", "exec", self._name(host), *command]

    def place(self, host: int) -> str:
        """What `enter` takes to go to a host."""
        return str(FOLDER / self._name(host))

    @contextmanager
    def visit(self, host: int) -> Iterator[ThreadPoolExecutor]:
        """A thread that is on a host: what runs in it sees that host's network, and no cut."""
        with ThreadPoolExecutor(1, initializer=enter, initargs=(self.place(host),)) as visitor:
            yield visitor

    def cut(self, source: int, target: int) -> None:
        """Lose what ``source`` sends to ``target`` from now on. The other way stays."""
        self._neighbour(source, target, NOBODY)

    def heal(self, source: int, target: int) -> None:
        """Let what ``source`` sends to ``target`` arrive again."""
        self._neighbour(source, target, self._macs[target])

    def cut_both(self, one: int, other: int) -> None:
        """Cut both ways between two hosts."""
        self.cut(one, other)
        self.cut(other, one)

    def heal_both(self, one: int, other: int) -> None:
        """Heal both ways between two hosts."""
        self.heal(one, other)
        self.heal(other, one)

    def split(self, some: Sequence[int]) -> None:
        """Cut all paths between these hosts and the others, both ways."""
        for one in some:
            for other in range(self.hosts):
                if other not in some:
                    self.cut_both(one, other)

    def heal_all(self) -> None:
        """Heal every path."""
        for source in range(self.hosts):
            for target in range(self.hosts):
                if source != target:
                    self.heal(source, target)

    @contextmanager
    def slow(self, host: int, delay_ms: float, loss: float) -> Iterator[None]:
        """A host whose frames take a while each way, and some of which are lost.

        Before anything runs there: connections that exist are broken.
        """
        hub, name, port = self._hub, self._name(host), f"slow{host}"
        relay = [sys.executable, "-m", "tests.support.relay", port, f"far{host}"]
        command = ["ip", "netns", "exec", hub, *relay, str(delay_ms), str(loss)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as carrier:
            try:
                assert carrier.stdout is not None
                assert carrier.stdout.readline() == b"made\n", "the relay has not begun"
                _ip("-n", name, "link", "del", "eth0")
                _ip("-n", hub, "link", "set", f"far{host}", "netns", name, "name", "eth0")
                _ip("-n", hub, "link", "set", port, "master", "bridge", "up")
                self._macs[host] = self._wire(host)
                yield
            finally:
                carrier.kill()

    def close(self) -> None:
        """Kill what runs on the hosts, and remove them."""
        for name in _names():
            if name.startswith(self._prefix + "-"):
                _remove(name)

    @property
    def _hub(self) -> str:
        return f"{self._prefix}-hub"

    def _name(self, host: int) -> str:
        return f"{self._prefix}-h{host}"

    def _make(self) -> None:
        hub = self._hub  # the bridge has a namespace of its own: all goes with it
        _ip("netns", "add", hub)
        _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", hub, "link", "set", "bridge", "up")
        for host in range(self.hosts):
            name, port = self._name(host), f"port{host}"
            _ip("netns", "add", name)
            _ip("-n", hub, "link", "add", port, "type", "veth", "peer", "eth0", "netns", name)
            _ip("-n", hub, "link", "set", port, "master", "bridge", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            self._macs.append(self._wire(host))

    def _wire(self, host: int) -> str:
        """Give a host's end of its cable its address; returns the hardware's own."""
        name = self._name(host)
        _ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        match = re.search(r"link/ether (\S+)", _ip("-n", name, "link", "show", "eth0"))
        assert match
        return match[1]

    def _neighbour(self, source: int, target: int, mac: str) -> None:
        address, name = self.address(target), self._name(source)
        where = ("neigh", "replace", address, "lladdr", mac, "dev", "eth0", "nud", "permanent")
        _ip("-n", name, *where)


def enter(place: str) -> None:
    """Go to a host with the calling thread; sockets and threads that it makes later are there."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(descriptor, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot go to {place}")
    finally:
        os.close(descriptor)


@contextmanager
def network(hosts: int = 5) -> Iterator[Network]:
    """A network for the time of a test. Removes first what killed processes left."""
    janitor()
    made = Network(hosts)
    try:
        yield made
    finally:
        made.close()


@cache
def available() -> str:
    """Why there can be no such network here; empty if there can."""
    try:
        with network(2):
            return ""
    except FileNotFoundError:
        return "there is no ip command (Debian: apt-get install iproute2)"
    except RuntimeError as error:
        return str(error)


def can_be_slow() -> str:
    """Why hosts cannot be made slow here; empty if they can."""
    is_there = Path("/dev/net/tun").exists()
    return available() or ("" if is_there else "there is no /dev/net/tun")


def janitor() -> list[str]:
    """Remove the namespaces of processes that are no more, and what runs in them; their names."""
    gone = []
    for name in _names():
        match = NAME.fullmatch(name)
        if match and not Path(f"/proc/{match['pid']}").exists():
            _remove(name)
            gone.append(name)
    return gone


def _names() -> list[str]:
    return sorted(file.name for file in FOLDER.iterdir()) if FOLDER.is_dir() else []


def _remove(name: str) -> None:
    """Kill what runs in a namespace, by the numbers that the system tells, and delete it."""
    with suppress(RuntimeError):  # one whose making was interrupted has no processes to list
        for pid in _ip("netns", "pids", name).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    _ip("netns", "del", name)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
