"""Who can reach an address, and what is said when nothing can listen there."""

import errno
from urllib.parse import urlsplit

import zmq

from treefold.common.errors import ConfigError

LOOPBACK_HOSTS = ("localhost", "[::1]", "::1")


def is_reachable(address: str) -> bool:
    """Whether other machines may be able to reach what listens there."""
    if not address.startswith("tcp://"):
        return False
    host = urlsplit(address).hostname or ""
    return not (host.startswith("127.") or host in LOOPBACK_HOSTS)


def check_reach(address: str, *, insecure: bool) -> None:
    """Refuse to listen beyond this machine without keys, unless told in so many words.

    Raises
    ------
    ConfigError
        The address is not a loopback one and ``insecure`` is false.
    """
    if insecure or not is_reachable(address):
        return
    msg = (
        f"{address} can be reached from other machines, and without keys nothing is encrypted and "
        "whoever connects can do anything: make keys with `treefold keys init DIR` and pass "
        "--keys DIR to every process, or bind to 127.0.0.1, or set insecure if the network is "
        "yours alone"
    )
    raise ConfigError(msg)


def bind_text(address: str, error: zmq.ZMQError) -> str:
    """Why nothing can listen there."""
    if error.errno == zmq.EADDRINUSE:
        return f"{address} is in use by another process; choose another port, or 0 for a free one"
    if error.errno == zmq.EADDRNOTAVAIL or error.errno == errno.ENODEV:
        return f"{address} is not an address of this machine"
    return f"cannot listen on {address}: {error}"
