"""How an address is written: ``tcp://HOST:PORT``. Words only; looks nothing up.

An IPv6 number stands in brackets. A name in brackets means that name's IPv6 address.
"""

import ipaddress

from treefold.common.errors import ConfigError

TCP = "tcp://"
SCHEMES = (TCP, "ipc://", "inproc://")
PORT_MAX = 65_535
EVERYWHERE = ("*", "0.0.0.0", "::")  # noqa: S104 # named to be told apart, not to be bound

Number = ipaddress.IPv4Address | ipaddress.IPv6Address


def split(address: str) -> tuple[str, int]:
    """Host without brackets, and port, of a ``tcp://`` address; a port ``*`` is 0.

    Raises
    ------
    ConfigError
        It is not written like one.
    """
    rest = address.removeprefix(TCP)
    host, colon, port = rest.rpartition(":")
    is_closed = host.startswith("[") and host.endswith("]")
    if not rest.endswith("]") and ":" in host and not is_closed:
        msg = f"{address!r}: an IPv6 address stands in brackets, such as tcp://[fd00::1]:29700"
        raise ConfigError(msg)
    if not colon or rest.endswith("]"):
        msg = f"{address!r} has no port: write tcp://HOST:PORT, with port 0 for a free one"
        raise ConfigError(msg)
    host = host[1:-1] if is_closed else host
    if not host:
        msg = f"{address!r} names no host: write tcp://HOST:PORT, with * for every interface"
        raise ConfigError(msg)
    number = "0" if port == "*" else port
    if not (number.isascii() and number.isdigit() and int(number) <= PORT_MAX):
        msg = f"{address!r}: {port!r} is not a port; a port is a number from 0 to {PORT_MAX}"
        raise ConfigError(msg)
    return host, int(number)


def join(host: str, port: int, *, is_ipv6: bool = False) -> str:
    """The address of a host and a port."""
    return f"{TCP}[{host}]:{port}" if is_ipv6 or ":" in host else f"{TCP}{host}:{port}"


def number_of(host: str) -> Number | None:
    """The host as an IP number, None if it is a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_ipv6(address: str) -> bool:
    """Whether an address is to be reached or bound by IPv6: what brackets mean."""
    return address.startswith(f"{TCP}[")


def is_named(address: str) -> bool:
    """Whether the host of a ``tcp://`` address has to be looked up."""
    if not address.startswith(TCP):
        return False
    host = address.removeprefix(TCP).rpartition(":")[0].strip("[]")
    return host not in EVERYWHERE and number_of(host) is None


def check(key: str, address: str) -> None:
    """Refuse what cannot be the setting ``key``.

    Raises
    ------
    ConfigError
        It is not written like an address, or it is one that nobody could connect to.
    """
    if not address.startswith(SCHEMES):
        msg = f"{key} is {address!r}; an address begins with tcp://, ipc:// or inproc://"
        raise ConfigError(msg)
    if not address.startswith(TCP):
        return
    try:
        host, port = split(address)
    except ConfigError as error:
        raise ConfigError(f"{key} is {error}") from None
    if key != "bind" and host in EVERYWHERE:
        msg = (
            f"{key} is {address!r}, which stands for every address of a machine: nobody can "
            "connect to it; name one of them"
        )
        raise ConfigError(msg)
    if key == "scheduler" and port == 0:
        msg = f"{key} is {address!r}: port 0 is none; which one does the scheduler listen on?"
        raise ConfigError(msg)
