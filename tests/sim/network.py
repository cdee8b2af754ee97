"""The simulated network: connections that lose, repeat, delay and reorder messages, and partitions.

A connection has a client's end (a DEALER socket) and a listener's end (a ROUTER socket). The
listener knows a client by its routing identity, which is another one after a reconnection.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from tests.sim.memory import NOTHING, Cargo
from tests.sim.words import Words
from tests.sim.world import World

Receive = Callable[[object, bytes, Cargo], None]


@dataclass(frozen=True, slots=True)
class Weather:
    """How the network behaves. Probabilities are per message.

    Attributes
    ----------
    is_reliable : bool
        Like TCP: nothing is lost, repeated or reordered; what meets a partition waits.
    is_close_lossy : bool
        Whether what is on its way when a client dies or reconnects is lost.
    bytes_per_s : float
        What every process can send and can receive at most; 0 for any number.
    element_bytes : int
        How much of it each simulated element stands for.
    """

    latency_ns: int
    jitter_ns: int
    drop: float = 0.0
    duplicate: float = 0.0
    tail: float = 0.0
    tail_ns: int = 0
    is_reliable: bool = True
    is_close_lossy: bool = True
    bytes_per_s: float = 0.0
    element_bytes: int = 4

    def healed(self) -> "Weather":
        """The same network without faults."""
        rate, element_bytes = self.bytes_per_s, self.element_bytes
        return Weather(
            self.latency_ns, self.jitter_ns, bytes_per_s=rate, element_bytes=element_bytes
        )


@dataclass(eq=False, slots=True)
class End:
    """Where one direction of a connection leads."""

    source: str
    target: str
    sender: object
    receive: Receive
    last_ns: int = 0


@dataclass(eq=False, slots=True)
class Connection:
    """A client and a listener. ``up`` leads to the listener, ``down`` to the client."""

    identity: bytes
    up: End
    down: End
    is_open: bool = True


@dataclass(slots=True)
class _Flight:
    connection: Connection
    end: End
    header: bytes
    cargo: Cargo


@dataclass(slots=True)
class Network:
    """All connections of one cluster.

    Attributes
    ----------
    kinds : dict of str to int
        How many messages of each kind were sent, and what else was counted.
    closed : int
        Connections that were closed.
    sent, received : dict of str to [messages, bytes]
        By process, where bytes take time. Bytes are headers and payloads.
    words : Words
        Messages as bytes, and back.
    """

    world: World
    weather: Weather
    connections: dict[bytes, Connection] = field(default_factory=dict)
    blocked: dict[tuple[str, str], int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    closed: int = 0
    links: int = 0
    sent: dict[str, list[int]] = field(default_factory=dict)
    received: dict[str, list[int]] = field(default_factory=dict)
    words: Words = field(default_factory=Words)
    _free_ns: dict[tuple[str, bool], int] = field(default_factory=dict)

    def connect(self, connection: Connection) -> None:
        """Open a connection."""
        self.links += 1
        self.connections[connection.identity] = connection

    def opened(self) -> int:
        """How many connections were opened so far."""
        return self.links

    def close(self, connection: Connection) -> None:
        """Close it: whoever sends to this identity from now on learns that it is gone."""
        connection.is_open = False
        self.closed += 1
        self.connections.pop(connection.identity, None)

    def block(self, source: str, target: str, until_ns: int) -> None:
        """Let nothing pass in one direction until then."""
        self.blocked[source, target] = until_ns

    def heal(self) -> None:
        """End all faults."""
        self.weather = self.weather.healed()
        self.blocked.clear()

    def count(self, kind: str) -> None:
        """Count a message, or something else that is worth a figure."""
        self.kinds[kind] = self.kinds.get(kind, 0) + 1

    def send(self, connection: Connection, end: End, header: bytes, cargo: Cargo = NOTHING) -> None:
        """Send a message to one end; what happens to it is up to the weather."""
        world, weather = self.world, self.weather
        chance = world.rng.random
        leaves_ns = world.now_ns
        if self.blocked:
            until_ns = self.blocked.get((end.source, end.target), 0)
            if leaves_ns < until_ns:
                self.count("cut off")
                if not weather.is_reliable:
                    return
                leaves_ns = until_ns
        flight = _Flight(connection, end, header, cargo)
        copies = 1
        if not weather.is_reliable:
            if chance() < weather.drop:
                self.count("dropped")
                return
            if chance() < weather.duplicate:
                self.count("repeated")
                copies = 2
        for _ in range(copies):
            arrives_ns = leaves_ns + weather.latency_ns + int(chance() * weather.jitter_ns)
            if weather.bytes_per_s:
                arrives_ns = self._carried(flight, leaves_ns, arrives_ns - leaves_ns)
            if weather.tail and chance() < weather.tail:
                self.count("delayed")
                arrives_ns += int(chance() * weather.tail_ns)
            if weather.is_reliable:
                end.last_ns = arrives_ns = max(arrives_ns, end.last_ns)
            world.at(arrives_ns, self._arrive, flight)

    def _carried(self, flight: _Flight, leaves_ns: int, delay_ns: int) -> int:
        """When a message is there, if links carry so many bytes a second only."""
        end = flight.end
        nbytes = self._counted(end, len(flight.header), flight.cargo)
        sent_ns = self._taken(end.source, True, leaves_ns, nbytes)
        return self._taken(end.target, False, sent_ns + delay_ns, nbytes)

    def _counted(self, end: End, header: int, cargo: Cargo) -> int:
        """Count a message for both of its ends; returns its bytes."""
        elements = 0 if cargo.is_shared else sum(part.elements for part in cargo.parts)
        nbytes = header + elements * self.weather.element_bytes
        for ways, name in ((self.sent, end.source), (self.received, end.target)):
            way = ways.setdefault(name, [0, 0])
            way[0] += 1
            way[1] += nbytes
        return nbytes

    def _taken(self, name: str, is_out: bool, from_ns: int, nbytes: int) -> int:
        """When so many bytes have passed one way of a process's link, after what came before."""
        took_ns = int(nbytes / self.weather.bytes_per_s * 1e9)
        begin_ns = from_ns if is_out else from_ns - took_ns  # a byte arrives as soon as it can
        free_ns = max(begin_ns, self._free_ns.get((name, is_out), 0)) + took_ns
        self._free_ns[name, is_out] = free_ns
        return free_ns

    def _arrive(self, argument: object) -> None:
        assert isinstance(argument, _Flight)
        if argument.connection.is_open or not self.weather.is_close_lossy:
            argument.end.receive(argument.end.sender, argument.header, argument.cargo.arrived())
