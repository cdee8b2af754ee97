"""Addresses: how they are written, what is bound, what others are told, where a name leads."""

import socket
from ipaddress import ip_address

import pytest
import zmq

from treefold.common import address
from treefold.common.config import load
from treefold.common.errors import ConfigError, SchedulerLostError
from treefold.transport import hosts, sockets
from treefold.transport.sockets import CONTROL_FRAME_BYTES_MAX as SIZE
from treefold.transport.sockets import Hub

MACHINE = {
    "lo": [ip_address("127.0.0.1"), ip_address("::1")],
    "eth0": [ip_address("10.0.0.5"), ip_address("fd00::5")],
    "eth1": [ip_address("fd01::5"), ip_address("10.8.3.5")],
    "ib0": [ip_address("fd02::5")],
}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("tcp://10.0.0.1:29700", ("10.0.0.1", 29700)),
        ("tcp://[fd00::1]:0", ("fd00::1", 0)),
        ("tcp://*:*", ("*", 0)),
        ("tcp://10.8.0.0/16:1", ("10.8.0.0/16", 1)),
        ("tcp://my_host-1.here:65535", ("my_host-1.here", 65535)),
    ],
)
def test_an_address_has_a_host_and_a_port(text: str, parts: tuple[str, int]) -> None:
    assert address.split(text) == parts


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("bind", "10.0.0.1:5", "an address begins with tcp://"),
        ("bind", "tcp://10.0.0.1", "has no port"),
        ("bind", "tcp://[::1]", "has no port"),
        ("bind", "tcp://:5", "names no host"),
        ("bind", "tcp://fd00::1:5", "stands in brackets"),
        ("bind", "tcp://host:65536", "is not a port"),
        ("bind", "tcp://host:http", "is not a port"),
        ("advertise", "tcp://0.0.0.0:5", "nobody can connect to it"),
        ("scheduler", "tcp://[::]:5", "nobody can connect to it"),
        ("scheduler", "tcp://host:0", "which one does the scheduler listen on"),
    ],
)
def test_a_setting_that_cannot_be_an_address_is_refused_by_name(
    key: str, value: str, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{key} is .*{complaint}"):
        load({key: value})


@pytest.mark.parametrize(
    ("bind", "bound"),
    [
        ("tcp://*:0", "tcp://*:0"),
        ("tcp://[::]:7", "tcp://[::]:7"),
        ("tcp://10.0.0.5:0", "tcp://10.0.0.5:0"),
        ("tcp://eth0:0", "tcp://10.0.0.5:0"),
        ("tcp://eth1:7", "tcp://10.8.3.5:7"),
        ("tcp://[eth1]:7", "tcp://[fd01::5]:7"),
        ("tcp://ib0:7", "tcp://[fd02::5]:7"),
        ("tcp://10.8.0.0/16:7", "tcp://10.8.3.5:7"),
        ("tcp://[fd02::/32]:7", "tcp://[fd02::5]:7"),
        ("tcp://localhost:7", "tcp://127.0.0.1:7"),
        ("ipc:///tmp/x", "ipc:///tmp/x"),
    ],
)
def test_what_is_bound_may_be_named_by_number_interface_network_or_name(
    bind: str, bound: str
) -> None:
    assert hosts.listening(bind, MACHINE) == bound


def test_a_host_that_is_not_here_is_refused_and_the_right_ones_are_named() -> None:
    with pytest.raises(ConfigError, match=r"172\.16\.0\.0/12 is no .*eth1 fd01::5, 10\.8\.3\.5"):
        hosts.listening("tcp://172.16.0.0/12:0", MACHINE)
    with pytest.raises(ConfigError, match="it is not a network"):
        hosts.listening("tcp://10.0.0.0/99:0", MACHINE)


@pytest.mark.parametrize(
    ("bound", "advertise", "said"),
    [
        ("tcp://10.0.0.5:4001", "", "tcp://10.0.0.5:4001"),
        ("tcp://0.0.0.0:4001", "", "tcp://10.0.0.5:4001"),
        ("tcp://[::]:4001", "", "tcp://10.0.0.5:4001"),
        ("tcp://0.0.0.0:4001", "tcp://front:0", "tcp://front:4001"),
        ("tcp://0.0.0.0:4001", "tcp://front:80", "tcp://front:80"),
        ("tcp://[fd00::5]:4001", "tcp://front:0", "tcp://[front]:4001"),
        ("tcp://[fd00::5]:4001", "tcp://10.0.0.9:0", "tcp://10.0.0.9:4001"),
        ("tcp://0.0.0.0:4001", "tcp://[fd00::9]:0", "tcp://[fd00::9]:4001"),
        ("ipc:///tmp/x", "", "ipc:///tmp/x"),
    ],
)
def test_others_are_told_an_address_that_they_can_connect_to(
    bound: str, advertise: str, said: str
) -> None:
    assert hosts.told(bound, advertise, "tcp://127.0.0.1:1", MACHINE) == said


def test_who_listens_everywhere_tells_the_address_on_the_way_to_the_scheduler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ways = {"10.8.0.1": ip_address("10.8.3.5"), "fd01::1": ip_address("fd01::5")}
    monkeypatch.setattr(hosts, "_source_towards", lambda host, _: ways.get(host))
    told = [
        hosts.told(bound, "", scheduler, MACHINE)
        for bound, scheduler in (
            ("tcp://0.0.0.0:4001", "tcp://10.8.0.1:29700"),
            ("tcp://[::]:4001", "tcp://[fd01::1]:29700"),
        )
    ]
    assert told == ["tcp://10.8.3.5:4001", "tcp://[fd01::5]:4001"]


def test_a_machine_without_a_network_tells_its_loopback_address() -> None:
    lonely = {"lo": MACHINE["lo"]}
    assert hosts.told("tcp://0.0.0.0:7", "", "", lonely) == "tcp://127.0.0.1:7"


def test_the_way_to_a_host_is_asked_of_the_system() -> None:
    assert str(hosts._source_towards("127.0.0.1", (4,))) == "127.0.0.1"
    assert str(hosts._source_towards("::1", (4, 6))) == "::1"
    assert hosts._source_towards("::1", (4,)) is None


def test_the_hosts_own_name_can_be_told() -> None:
    said = hosts.told("tcp://0.0.0.0:7", "tcp://{hostname}.servers:0", "")
    assert said == f"tcp://{socket.gethostname()}.servers:7"


def test_the_interfaces_of_this_machine_have_its_loopback_address() -> None:
    assert ip_address("127.0.0.1") in hosts.interfaces()["lo"]


def test_a_name_that_has_only_ipv6_is_reached_by_it() -> None:
    where = {"both": MACHINE["eth0"], "six": MACHINE["ib0"]}
    found = [hosts.located(f"tcp://{name}:5", 0, lambda host: list(where[host])) for name in where]
    assert found == ["tcp://both:5", "tcp://[six]:5"]


def test_a_name_that_appears_later_is_waited_for() -> None:
    answers = iter([[], [ip_address("10.0.0.9")]])
    assert hosts.located("tcp://late:5", 60, lambda _: next(answers)) == "tcp://late:5"


def test_a_name_that_nobody_knows_is_told_with_the_address() -> None:
    with pytest.raises(SchedulerLostError, match=r"knows the scheduler's host 'gone' \(of tcp://"):
        hosts.located("tcp://gone:5", 0, lambda _: [])


def test_numbers_need_not_be_looked_up() -> None:
    for there in ("tcp://10.0.0.1:5", "tcp://[fd00::1]:5", "ipc:///tmp/x", "inproc://x"):
        assert hosts.located(there, 0, lambda _: []) == there


@pytest.mark.parametrize(
    ("bind", "link"),
    [("tcp://[::1]:0", "tcp://[::1]:PORT"), ("tcp://lo:0", "tcp://localhost:PORT")],
)
def test_a_listener_hears_who_connects_by_ipv6_number_or_by_name(bind: str, link: str) -> None:
    near, far = Hub(), Hub()
    bound = near.listen("door", hosts.listening(bind), insecure=False, frame_bytes_max=SIZE)
    far.connect("door", link.replace("PORT", bound.rpartition(":")[2]), SIZE)
    far.send("door", None, b"hello")
    try:
        assert [arrival.header for arrival in near.wait(10**10, 1)] == [b"hello"]
    finally:
        far.close()
        near.close()


def test_looking_up_names_is_left_to_a_thread_that_carries_nothing_else() -> None:
    hub = Hub()
    for name, there in enumerate(["tcp://10.0.0.1:5", "tcp://[::1]:5", "tcp://some.name:5"]):
        hub.connect(name, there, SIZE)
    found = [hub._sockets[name].getsockopt(zmq.AFFINITY) for name in range(3)]
    hub.close()
    assert found == [sockets.NUMBERS_THREAD, sockets.NUMBERS_THREAD, sockets.NAMES_THREAD]
