"""Cuts between network namespaces cut and heal: shown with plain ZeroMQ sockets.

Skipped, with the reason, where no namespaces can be made.
"""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.support import netns
from tests.support.netns import Network

ARRIVAL_S = 20.0  # the longest that a message may take, after a cut was healed too
SILENCE_S = 0.5  # a message that is not held up takes a few milliseconds

# Listens at its own address; says what arrives, sends to each host what is written to it.
NODE = """
import sys, threading
import zmq
own, *addresses = sys.argv[1:]
context = zmq.Context()
inbox = context.socket(zmq.PULL)
inbox.bind(f"tcp://{own}:5555")
def listen():
    while True:
        print(inbox.recv_string(), flush=True)
threading.Thread(target=listen, daemon=True).start()
outboxes = {}
for address in addresses:
    outboxes[address] = context.socket(zmq.PUSH)
    outboxes[address].connect(f"tcp://{address}:5555")
for line in sys.stdin:
    address, text = line.split()
    outboxes[address].send_string(text)
"""

# Makes a network with something running in it, and waits to be killed.
LEFT = """
import subprocess, sys
from tests.support.netns import Network
network = Network(2)
command = network.command(1, ["sh", "-c", "echo; exec sleep 1000"])
child = subprocess.Popen(command, stdout=subprocess.PIPE)
child.stdout.read(1)
print(child.pid, flush=True)
sys.stdin.read()
"""


class Nodes:
    """A ZeroMQ process on each host."""

    def __init__(self, network: Network, stack: ExitStack) -> None:
        self.network = network
        self.processes = []
        addresses = [network.address(host) for host in range(network.hosts)]
        for host, own in enumerate(addresses):
            others = [address for address in addresses if address != own]
            command = network.command(host, [sys.executable, "-c", NODE, own, *others])
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            self.processes.append(process)

    def send(self, source: int, target: int, text: str) -> None:
        """Let one host send to another."""
        pipe = self.processes[source].stdin
        assert pipe is not None
        pipe.write(f"{self.network.address(target)} {text}\n".encode())

    def arrived(self, host: int, seconds: float) -> str:
        """The next text that arrived at a host, empty if none does in this time."""
        pipe = self.processes[host].stdout
        assert pipe is not None
        if not select.select([pipe], [], [], seconds)[0]:
            return ""
        line = b""
        while not line.endswith(b"\n"):
            line += pipe.read(1) or b"\n"
        return line.decode().strip()

    def settle(self) -> None:
        """Return when all is acknowledged: a TCP connection that waits would stand still if cut."""
        deadline = time.monotonic() + ARRIVAL_S
        for host in range(self.network.hosts):
            sockets = self.network.command(host, ["ss", "-tnH"])
            unacknowledged = True
            while unacknowledged:
                assert time.monotonic() < deadline
                lines = subprocess.check_output(sockets, text=True).splitlines()
                assert len(lines) == 2 * (self.network.hosts - 1)
                unacknowledged = any(line.split()[2] != "0" for line in lines)

    def passes(self, source: int, target: int, text: str) -> bool:
        """Whether a message arrives."""
        self.send(source, target, text)
        return self.arrived(target, ARRIVAL_S) == text

    def is_held_up(self, source: int, target: int, text: str) -> bool:
        """Whether a message does not arrive although it was sent."""
        self.send(source, target, text)
        return not self.arrived(target, SILENCE_S)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Five hosts, all connected to all."""
    if netns.available():
        pytest.skip(f"no network namespaces: {netns.available()}")
    with netns.network() as network, ExitStack() as stack:
        made = Nodes(network, stack)
        for source in range(5):
            for target in range(5):
                if source != target:
                    assert made.passes(source, target, f"hello{source}{target}")
        yield made


def test_a_cut_one_way_holds_up_that_way_alone_until_it_is_healed(nodes: Nodes) -> None:
    nodes.settle()
    nodes.network.cut(0, 1)
    assert nodes.passes(1, 0, "back")
    assert nodes.is_held_up(0, 1, "late")
    assert nodes.passes(0, 2, "beside")
    assert nodes.passes(2, 1, "around")
    nodes.network.heal(0, 1)
    assert nodes.arrived(1, ARRIVAL_S) == "late"
    assert nodes.passes(0, 1, "again")


def test_a_cut_pair_is_cut_both_ways_and_the_others_are_not(nodes: Nodes) -> None:
    nodes.network.cut_both(3, 4)
    assert nodes.is_held_up(3, 4, "there")
    assert nodes.is_held_up(4, 3, "back")
    assert nodes.passes(3, 2, "beside")
    assert nodes.passes(2, 4, "around")
    nodes.network.heal_both(3, 4)
    assert nodes.arrived(4, ARRIVAL_S) == "there"
    assert nodes.arrived(3, ARRIVAL_S) == "back"


def test_a_split_parts_two_groups_and_leaves_each_whole(nodes: Nodes) -> None:
    nodes.network.split([0, 1])
    assert nodes.is_held_up(0, 2, "over")
    assert nodes.is_held_up(4, 1, "back")
    assert nodes.passes(1, 0, "within")
    assert nodes.passes(2, 4, "within")
    nodes.network.heal_all()
    assert nodes.arrived(2, ARRIVAL_S) == "over"
    assert nodes.arrived(1, ARRIVAL_S) == "back"


@pytest.mark.parametrize("delay_ms", [0, 200])
def test_a_slow_host_is_reached_late_and_another_as_ever(delay_ms: int) -> None:
    if netns.can_be_slow():
        pytest.skip(f"no slow hosts: {netns.can_be_slow()}")
    with netns.network(3) as network, ExitStack() as stack:
        stack.enter_context(network.slow(1, delay_ms, 0.02))
        made = Nodes(network, stack)
        assert made.passes(0, 1, "there")
        assert made.passes(1, 0, "back")
        began_s = time.monotonic()
        assert made.passes(0, 1, "again")
        assert time.monotonic() - began_s > 0.75 * delay_ms / 1e3
        assert made.passes(0, 2, "beside")


def test_a_host_whose_frames_are_all_lost_is_not_reached() -> None:
    if netns.can_be_slow():
        pytest.skip(f"no slow hosts: {netns.can_be_slow()}")
    with netns.network(2) as network, ExitStack() as stack:
        stack.enter_context(network.slow(1, 0, 1.0))
        made = Nodes(network, stack)
        assert made.is_held_up(0, 1, "there")


def test_what_a_killed_process_left_is_removed_with_what_runs_in_it() -> None:
    if netns.available():
        pytest.skip(f"no network namespaces: {netns.available()}")
    command = [sys.executable, "-c", LEFT]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        watched = os.pidfd_open(child)
        names = [f"treefold-{process.pid}-1-{host}" for host in ("h0", "h1", "hub")]
        assert not [name for name in netns.janitor() if name in names], "its process lives"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert [name for name in netns.janitor() if name in names] == names
    assert select.select([watched], [], [], ARRIVAL_S)[0], "what ran in it has ended"
    os.close(watched)
    assert not [name for name in netns.janitor() if name in names]
