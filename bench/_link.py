"""The thread that a benchmark's conductor has to each process that it measures: orders and answers.

One Unix socket, one JSON document per line. A member says who it is, waits for the others'
addresses, and then does what it is told until it is told to end. When the conductor is gone, so are
its members.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypedDict, cast

import torch

from treefold.launch.processes import Guard

PATIENCE_S = 120.0  # longest wait for a member; the slowest thing is a set-up with many processes


class BenchError(Exception):
    """A contender failed, or came to a wrong result."""


class Hello(TypedDict):
    """What a member says first."""

    role: str
    rank: int
    address: str


class Order(TypedDict):
    """What the conductor wants: ``window``, ``end``, or a question of the benchmark's own."""

    do: str
    steps: int
    settle: int
    given: str


class Answer(TypedDict):
    """When a member began and ended, on the clock that all processes share, and what it found."""

    began_ns: int
    ended_ns: int
    value: object


@dataclass(frozen=True, slots=True)
class Link:
    """Where the conductor is, and as whom a member comes: ``player`` or ``server``."""

    path: str
    role: str
    rank: int


class Member:
    """The member's end. It computes with one thread.

    Parameters
    ----------
    link : Link
        Where the conductor is.
    address : str
        Where this member can be reached by the others of its contender, if it can.
    """

    def __init__(self, link: Link, address: str = "") -> None:
        torch.set_num_threads(1)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(link.path)
        self._file = self._socket.makefile("rw")
        self._say(Hello(role=link.role, rank=link.rank, address=address))

    def meet(self) -> list[str]:
        """Wait until everybody is there; the servers' addresses by rank."""
        line = self._file.readline()
        return cast("list[str]", json.loads(line)) if line else []

    def serve(
        self,
        run: Callable[[int], object],
        asks: Mapping[str, Callable[[str], object]] | None = None,
    ) -> None:
        """Do what the conductor says until it says that it is over.

        Parameters
        ----------
        run : callable
            Takes so many steps; what it returns is the window's value.
        asks : mapping of str to callable, optional
            Answers to the benchmark's own questions.
        """
        for order in self._orders():
            if order["settle"]:
                run(order["settle"])
            began_ns = time.monotonic_ns()
            if order["do"] == "window":
                value = run(order["steps"])
            else:
                value = (asks or {})[order["do"]](order["given"])
            self._say(Answer(began_ns=began_ns, ended_ns=time.monotonic_ns(), value=value))

    def end_with_conductor(self) -> None:
        """End this process when the conductor says so or is gone; for those that get no orders."""

        def watch() -> None:
            self._file.readline()
            os._exit(0)

        threading.Thread(target=watch, daemon=True).start()

    def _orders(self) -> Iterator[Order]:
        for line in self._file:
            order: Order = json.loads(line)
            if order["do"] == "end":
                return
            yield order

    def _say(self, what: Hello | Answer) -> None:
        self._file.write(json.dumps(what) + "\n")
        self._file.flush()


class Seat:
    """The conductor's end of one member's link."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(PATIENCE_S)
        self._socket = connection
        self._file = connection.makefile("r")
        self.hello: Hello = json.loads(self._line())

    def tell(self, what: Order | list[str]) -> None:
        """Send an order, or everybody's addresses."""
        try:
            self._socket.sendall(f"{json.dumps(what)}\n".encode())
        except OSError as error:
            raise BenchError(f"{self} is gone: {error}") from error

    def hear(self) -> Answer:
        """Wait for the answer."""
        answer: Answer = json.loads(self._line())
        return answer

    def close(self) -> None:
        """Let go of the member."""
        self._file.close()
        self._socket.close()

    def __str__(self) -> str:
        return f"{self.hello['role']} {self.hello['rank']}"

    def _line(self) -> str:
        try:
            line = self._file.readline()
        except TimeoutError as error:
            raise BenchError(f"no answer within {PATIENCE_S} s") from error
        except ConnectionError as error:
            raise BenchError("a member ended too early") from error
        if not line:
            raise BenchError("a member ended too early")
        return line


class Stage:
    """Where members report.

    Parameters
    ----------
    folder : str
        For the socket, and for whatever contenders keep in files.
    guard : Guard
        Ends what this process leaves behind if it is killed.
    """

    def __init__(self, folder: str, guard: Guard) -> None:
        self.folder = folder
        self._guard = guard
        guard.add_folder(folder)
        self.path = f"{folder}/conductor"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()

    def gather(self, count: int, check: Callable[[], None]) -> list[Seat]:
        """Wait for so many members, and tell each where the servers are.

        Parameters
        ----------
        count : int
            How many.
        check : callable
            Raises `BenchError` if one of them cannot come any more.
        """
        self._listener.settimeout(0.5)
        until = time.monotonic() + PATIENCE_S
        seats: list[Seat] = []
        while len(seats) < count:
            try:
                seats.append(Seat(self._listener.accept()[0]))
            except TimeoutError:
                check()
                if time.monotonic() > until:
                    msg = f"{len(seats)} of {count} members came within {PATIENCE_S} s"
                    raise BenchError(msg) from None
        seats.sort(key=lambda seat: (seat.hello["role"], seat.hello["rank"]))
        servers = [seat.hello["address"] for seat in seats if seat.hello["role"] == "server"]
        for seat in seats:
            seat.tell(servers)
        return seats

    def watch(self, session: int) -> None:
        """Have a process that leads a session killed with all of it if this one dies."""
        os.write(self._guard.descriptor, f"+{session}\n".encode())

    def forget(self, session: int) -> None:
        """A session has ended."""
        self._guard.forget(session)

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()
