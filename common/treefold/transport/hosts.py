"""Names, numbers and interfaces of hosts: what to bind, what to tell others, where a name leads.

The only module that looks a name up. What it decides depends on what is passed in, so that tests
can have other machines than the one they run on.
"""

import ipaddress
import socket
import time
from collections.abc import Callable, Mapping, Sequence

import psutil

from treefold.common import address as addresses
from treefold.common.address import EVERYWHERE, TCP, Number, number_of
from treefold.common.errors import ConfigError, SchedulerLostError

HOSTNAME = "{hostname}"
"""Stands in ``advertise`` for this machine's own name."""
LOOK_AGAIN_S = 0.2  # a name that is not known is looked up again after so long
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}

Interfaces = Mapping[str, Sequence[Number]]
"""IP numbers of each interface of a machine, by its name."""


def interfaces() -> dict[str, list[Number]]:
    """The interfaces of this machine that are up, loopback first, without link-local numbers."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found: dict[str, list[Number]] = {}
    for name, ways in psutil.net_if_addrs().items():
        numbers = [number_of(way.address) for way in ways if way.family in FAMILIES.values()]
        usable = [number for number in numbers if number and not number.is_link_local]
        if name in up and usable:
            found[name] = usable
    return found


def listening(address: str, machine: Interfaces | None = None) -> str:
    """What to bind for the setting ``bind``, whose host may be named in several ways.

    Parameters
    ----------
    address : str
        Its host is an IP number, ``*``, a network such as ``10.8.0.0/16``, an interface such as
        ``eth0``, or a host name of this machine.
    machine : Interfaces, optional
        By default this machine's.

    Returns
    -------
    str
        The address with an IP number or ``*``.

    Raises
    ------
    ConfigError
        Nothing here is called so.
    """
    if not address.startswith(TCP):
        return address
    host, port = addresses.split(address)
    if host in EVERYWHERE or number_of(host) is not None:
        return address
    own = interfaces() if machine is None else machine
    wants_ipv6 = addresses.is_ipv6(address)
    found = _in_network(host, own) if "/" in host else list(own.get(host, ()))
    if not found and "/" not in host:
        found = lookup(host)
    # IPv4 where there is a choice and nobody asked: every member can reach that.
    found.sort(key=lambda number: (number.version == 6) is not wants_ipv6)
    if not found:
        known = "; ".join(f"{name} {', '.join(map(str, own[name]))}" for name in own)
        msg = (
            f"cannot listen on {address}: {host} is no address, network, interface or name of "
            f"this machine, which has {known}"
        )
        raise ConfigError(msg)
    return addresses.join(str(found[0]), port)


def told(bound: str, advertise: str, scheduler: str, machine: Interfaces | None = None) -> str:
    """The address that others are told to connect to.

    Parameters
    ----------
    bound : str
        What was bound.
    advertise : str
        The setting; port 0 is the one that was bound, `HOSTNAME` this machine's name.
    scheduler : str
        The scheduler's address, empty for the scheduler itself. Of a process that listens on every
        address, others are told the one from which it reaches the scheduler.
    machine : Interfaces, optional
        By default this machine's.
    """
    if not bound.startswith(TCP):
        return advertise or bound
    host, port = addresses.split(bound)
    if advertise:
        wanted, other = addresses.split(advertise.replace(HOSTNAME, socket.gethostname()))
        is_ipv6 = addresses.is_ipv6(advertise) or _is_ipv6_alone(host)
        return addresses.join(wanted, other or port, is_ipv6=is_ipv6 and number_of(wanted) is None)
    if host not in EVERYWHERE:
        return bound
    versions = (4, 6) if host == "::" else (4,)
    there = addresses.split(scheduler)[0] if scheduler.startswith(TCP) else ""
    way = _source_towards(there, versions) if there else None
    if way is None or way.is_loopback:
        way = _first_beyond(interfaces() if machine is None else machine, versions) or way
    return addresses.join(str(way or "127.0.0.1"), port)


def located(
    address: str,
    patience_s: float,
    find: "Callable[[str], list[Number]] | None" = None,
) -> str:
    """The scheduler's address, in brackets if its name has nothing but IPv6 numbers.

    Waits for a name that is not known yet: in a container it may appear with what bears it.

    Parameters
    ----------
    address : str
        Anything but ``tcp://NAME:PORT`` comes back as it is.
    patience_s : float
        How long to wait.
    find : callable, optional
        Looks a name up; `lookup` by default.

    Raises
    ------
    SchedulerLostError
        Nobody knew the name in time.
    """
    if not addresses.is_named(address) or addresses.is_ipv6(address):
        return address
    host, port = addresses.split(address)
    deadline = time.monotonic() + patience_s
    while not (found := (find or lookup)(host)):
        if time.monotonic() >= deadline:
            msg = (
                f"nobody here knows the scheduler's host {host!r} (of {address}), asked for "
                f"{patience_s:g} s; is the name right, and does the scheduler run?"
            )
            raise SchedulerLostError(msg)
        time.sleep(LOOK_AGAIN_S)
    is_ipv6 = all(number.version == 6 for number in found)
    return addresses.join(host, port, is_ipv6=is_ipv6)


def lookup(host: str) -> list[Number]:
    """IP numbers of a name, none if it is not known."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    numbers = [number_of(str(where[0])) for *_, where in found]
    return [number for number in numbers if number is not None]


def _in_network(host: str, machine: Interfaces) -> list[Number]:
    try:
        network = ipaddress.ip_network(host, strict=False)
    except ValueError as error:
        raise ConfigError(f"cannot listen on {host}: it is not a network ({error})") from error
    return [number for own in machine.values() for number in own if number in network]


def _is_ipv6_alone(host: str) -> bool:
    number = number_of(host)
    return number is not None and number.version == 6 and host != "::"


def _source_towards(host: str, versions: Sequence[int]) -> Number | None:
    """Our own number on the way to a host. Nothing is sent: a datagram socket only chooses."""
    number = number_of(host)
    for there in [number] if number else lookup(host):
        if there.version not in versions:
            continue
        with socket.socket(FAMILIES[there.version], socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((str(there), 9))
            except OSError:
                continue
            return number_of(probe.getsockname()[0])
    return None


def _first_beyond(machine: Interfaces, versions: Sequence[int]) -> Number | None:
    """The first number that other machines may know this one by."""
    every = [number for own in machine.values() for number in own if not number.is_loopback]
    ordered = sorted(every, key=lambda number: number.version)
    return next((number for number in ordered if number.version in versions), None)
