"""A cluster of real shells on loopback sockets, as threads of the test's process."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from treefold.common.config import Settings
from treefold.scheduler.shell import SchedulerShell
from treefold.server.shell import ServerShell
from treefold.wire.words import Outcome
from treefold.worker import Client

Result = TypeVar("Result")
JOIN_S = 30.0


@dataclass
class ThreadCluster:
    """A scheduler and servers; workers are `Client` objects of the test."""

    settings: Settings
    scheduler: SchedulerShell
    servers: list[ServerShell]
    clients: list[Client] = field(default_factory=list)

    def client(self) -> Client:
        """One more worker."""
        self.clients.append(Client(self.settings))
        return self.clients[-1]


@contextmanager
def thread_cluster(servers: int = 1, workers: int = 1) -> Iterator[ThreadCluster]:
    """Start, and end whatever is left."""
    base = Settings(servers=servers, workers=workers, rejoin_grace_s=JOIN_S)
    scheduler = SchedulerShell(base)
    settings = msgspec.structs.replace(base, scheduler=scheduler.address)
    shells = [ServerShell(settings) for _ in range(servers)]
    runs = [scheduler.run, *(shell.run for shell in shells)]
    threads = [threading.Thread(target=run, daemon=True) for run in runs]
    for thread in threads:
        thread.start()
    cluster = ThreadCluster(settings, scheduler, shells)
    try:
        yield cluster
    finally:
        for client in cluster.clients:
            client.leave(Outcome.DONE, "")
        scheduler.stop(Outcome.DONE, "the test is over")
        for thread in threads:
            thread.join(JOIN_S)
            assert not thread.is_alive(), "a shell did not end"


def beside(work: Callable[[], Result]) -> Callable[[], Result]:
    """Run something in a thread of its own; the result, or its error, comes with a call."""
    found: list[Result] = []
    errors: list[Exception] = []

    def target() -> None:
        try:
            found.append(work())
        except Exception as error:  # handed to the test
            errors.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()

    def result() -> Result:
        thread.join(JOIN_S)
        assert not thread.is_alive(), "it takes too long"
        if errors:
            raise errors[0]
        return found[0]

    return result
