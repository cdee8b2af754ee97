"""Memory of simulated processes: whoever reads a payload sees what is in its place at that moment.

A payload is sent as bytes, or as a place in memory that sender and receiver share. The second kind
is what must not be written to while anybody may still read it, or be found out if it was.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import msgspec

from tests.sim.world import Violation
from treefold.wire.chain import UnitCopy
from treefold.wire.messages import Pulled, Push

TensorMessage = Push | Pulled | UnitCopy
BUFFERS = 2
SEGMENT = 7  # what a frame of shared memory says; no core may look at it
UNWRITTEN = -1


@dataclass(eq=False, slots=True)
class Memory:
    """The place of one part: its value now, and the published buffer that it lies in, if any."""

    value: object
    elements: int
    buffer: "Buffer | None" = None
    is_retired: bool = False

    def copy(self) -> "Memory":
        """The same value in a place of its own."""
        return Memory(self.value, self.elements)


@dataclass(eq=False, slots=True)
class Buffer:
    """Room for one version of a shard. ``word`` says which one it holds, or is to hold soon."""

    is_shared: bool
    word: int = UNWRITTEN
    parts: list[Memory] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Cargo:
    """The payloads of a message, one per part."""

    parts: tuple[Memory, ...] = ()
    is_shared: bool = False

    def arrived(self) -> "Cargo":
        """What the receiver holds: bytes as they are now, or places in the sender's memory."""
        if self.is_shared or not self.parts:
            return self
        return Cargo(tuple(part.copy() for part in self.parts))


NOTHING = Cargo()


def pieces_of(
    rng: random.Random, message: TensorMessage, parts: Sequence[Memory], shared: float
) -> Iterator[tuple[TensorMessage, Cargo]]:
    """Cut a run of parts into messages, as a carrier may, each by one lane or the other.

    ``shared`` is the chance that a message goes through shared memory.
    """
    at = 0
    while at < len(parts):
        is_shared = rng.random() < shared
        left = len(parts) - at
        count = left if rng.random() < 0.5 else rng.randint(1, left)
        chosen = tuple(parts[at : at + count])
        assert message.frame is not None
        frame = msgspec.structs.replace(
            message.frame,
            elements=sum(part.elements for part in chosen),
            segment=SEGMENT * is_shared,
        )
        piece = msgspec.structs.replace(message, part=message.part + at, count=count, frame=frame)
        if isinstance(message, Push) and isinstance(piece, Push) and message.absent:
            piece = msgspec.structs.replace(piece, absent=message.absent[at : at + count])
        yield piece, Cargo(chosen, is_shared)
        at += count


class Shelf:
    """The versions of one shard that can be pulled, as `treefold.server.published` keeps them.

    Parameters
    ----------
    name : str
        Of the shard, for failures.
    sizes : sequence of int
        Elements of each part.
    is_constant : bool
        Whether there is one version only.
    """

    def __init__(self, name: str, sizes: Sequence[int], is_constant: bool) -> None:
        self._name = name
        self._sizes = list(sizes)
        self._buffers = [self._make(is_shared=True) for _ in range(1 if is_constant else BUFFERS)]
        self.versions: dict[int, Buffer] = {}
        self.made: dict[int, dict[int, None]] = {}

    def put(self, version: int, part: int, value: object, is_busy: bool) -> None:
        """Write one part of a version.

        ``is_busy`` says that the buffer is still on its way out, if this is a version's first part.
        """
        buffer = self.versions.get(version)
        if buffer is None:
            buffer = self._begin(version, is_busy)
        if part in self.made[version]:
            raise Violation(f"version {version} of {self._name}: part {part} is made twice")
        self.made[version][part] = None
        buffer.parts[part].value = value

    def get(self, version: int, first: int, count: int) -> list[Memory]:
        """Where parts of a version lie."""
        parts = range(first, first + count)
        made = self.made.get(version)
        if made is None or any(part not in made for part in parts):
            raise Violation(f"parts {parts} of version {version} of {self._name} are not held")
        return self.versions[version].parts[first : first + count]

    def drop(self, version: int) -> None:
        """A version is not asked for any more."""
        if self.versions.pop(version, None) is None:
            raise Violation(f"version {version} of {self._name} is released, but not held")
        del self.made[version]

    def check_whole(self, version: int) -> None:
        """Every part of a version is there."""
        made = len(self.made.get(version, {}))
        if made != len(self._sizes):
            text = f"with {made} of {len(self._sizes)} parts"
            raise Violation(f"version {version} of {self._name} is published {text}")

    def _begin(self, version: int, is_busy: bool) -> Buffer:
        self.made[version] = {}
        if is_busy:
            buffer = self._make(is_shared=False)
        else:
            buffer = self._buffers[version % len(self._buffers)]
            for other, held in self.versions.items():
                if held is buffer:
                    text = f"is written over {other}, which can still be pulled"
                    raise Violation(f"version {version} of {self._name} {text}")
        buffer.word = version
        self.versions[version] = buffer
        return buffer

    def _make(self, is_shared: bool) -> Buffer:
        buffer = Buffer(is_shared)
        buffer.parts = [Memory(None, size, buffer) for size in self._sizes]
        return buffer


class Gradients:
    """The gradient buffers of a script for one table, as `treefold.torch.gradients` has them.

    Parameters
    ----------
    sizes : sequence of int
        Elements of each part.

    Attributes
    ----------
    flat : list of Memory
        Where backward writes.
    is_lent : bool
        Whether something of it was contributed as it lies there.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = list(sizes)
        self.flat = self._make()
        self._spare: list[Memory] | None = None
        self.is_lent = self.is_retired = False

    def begin_slot(self, is_in_use: bool) -> None:
        """Write to the buffer from now on, or to another one if it is in use."""
        if self.is_retired:
            self.flat, self._spare = self._make(), None
        elif self.is_lent and is_in_use:
            new = self._make() if self._spare is None else self._spare
            self.flat, self._spare = new, self.flat
        self.is_lent = self.is_retired = False
        for memory in self.flat:
            memory.value = ("written to by backward", memory.value)

    def _make(self) -> list[Memory]:
        return [Memory(None, size) for size in self._sizes]


class Origin(Enum):
    """Whose memory a payload lies in."""

    OWN = auto()  # written to again once the payload is released
    LENT = auto()  # the script's own
    FOREIGN = auto()  # a peer's, or bytes that came


@dataclass(slots=True)
class _Held:
    memory: Memory
    origin: Origin
    is_sent: bool = False


class Payloads:
    """The payloads of one process by handle. A handle that was released is gone for good."""

    def __init__(self) -> None:
        self.held: dict[int, _Held] = {}
        self.added = 0
        self.lent = 0

    @property
    def is_lending(self) -> bool:
        """Whether a payload that was lent is in use."""
        return any(held.origin is Origin.LENT for held in self.held.values())

    def add(self, memory: Memory, origin: Origin) -> int:
        """Hold a payload; returns its handle."""
        self.added += 1
        self.lent += origin is Origin.LENT
        self.held[self.added] = _Held(memory, origin)
        return self.added

    def get(self, handle: int) -> Memory:
        """Where the payload of a handle lies."""
        return self._get(handle).memory

    def send(self, handle: int) -> Memory:
        """The same, for a message: nothing may be folded into it any more."""
        held = self._get(handle)
        held.is_sent = True
        return held.memory

    def keep(self, handle: int) -> None:
        """Make the payload one of this process's own, which nobody else writes to."""
        held = self._get(handle)
        if held.origin is not Origin.OWN:
            self.held[handle] = _Held(held.memory.copy(), Origin.OWN, held.is_sent)

    def pop(self, handle: int) -> Memory:
        """The same, held no longer; own memory is used for something else at once."""
        held = self._get(handle)
        del self.held[handle]
        self._reuse(held)
        return held.memory

    def fold(self, left: int, right: int) -> None:
        """Let ``left`` be the sum; ``right`` is released."""
        one, other = self._get(left), self._get(right)
        if one.is_sent or other.is_sent:
            raise Violation(f"payloads {left} and {right} are folded after one was sent")
        if one.memory.elements != other.memory.elements:
            text = f"a fold of {one.memory.elements} and {other.memory.elements} elements"
            raise Violation(text)
        total = Memory(fold(one.memory.value, other.memory.value), one.memory.elements)
        self._reuse(one)
        self.pop(right)
        self.held[left] = _Held(total, Origin.OWN)

    def retire(self) -> None:
        """Never write to what is held now."""
        for held in self.held.values():
            held.memory.is_retired = True

    def _get(self, handle: int) -> _Held:
        if handle not in self.held:
            raise Violation(f"payload {handle} is used, but was released or never there")
        return self.held[handle]

    def _reuse(self, held: _Held) -> None:
        if held.origin is Origin.OWN and not held.memory.is_retired:
            held.memory.value = ("used for something else", held.memory.value)


def fold(left: object, right: object) -> object:
    """The sum of two nodes; a node without any gradient is None and adds nothing."""
    if left is None or right is None:
        return right if left is None else left
    return (left, right)
