"""Faults that a test plants in a process before it starts: each breaks one promise on purpose.

Named by a command's first words, ``fault:NAME``; see `tests.support.zygote.run`.
"""

import resource
import signal
import sys

import torch

from treefold.common import layout
from treefold.common.kernels import Compiler
from treefold.common.tree import FoldSet, Merge, Node, canonical, contains, root_level, span
from treefold.scheduler import core as scheduler_core
from treefold.scheduler.balance import Balance
from treefold.server.chains import Chain
from treefold.server.effects import MakeParts
from treefold.server.shell import ServerShell
from treefold.wire import membership
from treefold.wire.words import PROTOCOL_VERSION
from treefold.worker.handed import Snapshot

SLOW_READ_VERSION = 10
FLIPPED_VERSION = 10
SMALL_FILE_BYTES = 100_000
FEW_RECORDS = 2
SMALL_BLOCK_ELEMENTS = 1_024


def arrival_order() -> None:
    """Fold whatever is there when it comes, not siblings as they meet."""
    setattr(FoldSet, "add", _add_as_it_comes)  # noqa: B010 # mypy forbids it otherwise
    setattr(FoldSet, "missing", _missing_of_all)  # noqa: B010


def compiled_at_once() -> None:
    """Compile folds before the first one is done; no fault, but what takes long otherwise."""
    setattr(Compiler, "count", lambda self, _: self.compile())  # noqa: B010


def other_protocol() -> None:
    """Register as a process of another protocol version."""
    setattr(membership, "PROTOCOL_VERSION", PROTOCOL_VERSION + 1)  # noqa: B010


def slow_reader() -> None:
    """Stop once, having read version 10 or a later one; read it again after a signal."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    look = vars(Snapshot)["is_intact"].fget
    stops = iter([True])

    def is_intact(snapshot: Snapshot) -> bool:
        found: bool = look(snapshot)
        is_late = snapshot.segments and snapshot.version >= SLOW_READ_VERSION
        if is_late and next(stops, False):
            first = [values.clone() for _, _, values in snapshot.parts]
            sys.stdout.write("reading\n")
            sys.stdout.flush()
            signal.sigwait({signal.SIGUSR1})
            again = [values.clone() for _, _, values in snapshot.parts]
            is_same = all(map(torch.equal, first, again))
            sys.stdout.write(f"read again: {'the same' if is_same else 'something else'}\n")
            sys.stdout.flush()
        return found

    setattr(Snapshot, "is_intact", property(is_intact))  # noqa: B010


def flipped_bit() -> None:
    """Lose one bit of what is held for a primary, once, in version 10."""
    make = ServerShell._make
    left = iter([True])

    def careless(self: ServerShell, effect: MakeParts) -> None:
        make(self, effect)
        key = effect.table, effect.shard
        is_backup = not self._core.shards[key].chain.is_primary
        if is_backup and effect.version == FLIPPED_VERSION and next(left, False):
            first = next(self._states[key].tensors())
            first.view(torch.int32)[0] ^= 1

    setattr(ServerShell, "_make", careless)  # noqa: B010


def lonely_primary() -> None:
    """Publish a version without asking whether the backups have it."""
    setattr(Chain, "holds", lambda *_: True)  # noqa: B010


def small_files() -> None:
    """Have no room for more than a small file: memory that is shared counts as one."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE_BYTES, SMALL_FILE_BYTES))


def equal_leases() -> None:
    """Deal slots evenly once; no lease moves and nobody helps."""
    setattr(Balance, "check", lambda *_: None)  # noqa: B010
    setattr(Balance, "help", lambda *_: [])  # noqa: B010


def small_blocks() -> None:
    """Let blocks be small, so that a small table has many; in all processes of a job."""
    setattr(layout, "BLOCK_ELEMENTS", SMALL_BLOCK_ELEMENTS)  # noqa: B010


def few_records() -> None:
    """Put a snapshot in the place of the journal every few records."""
    setattr(scheduler_core, "RECORDS_MAX", FEW_RECORDS)  # noqa: B010


def _add_as_it_comes(
    self: FoldSet[object], node: Node, handle: object
) -> tuple[list[Merge[object]], list[object]] | None:
    taken: list[Node] = self.__dict__.setdefault("taken", [])
    node = canonical(node, self.active)
    if any(contains(old, node) or contains(node, old) for old in taken):
        return None
    taken.append(node)
    is_whole = not _missing_of_all(self)
    held = list(self.nodes.items())
    self.nodes.clear()
    key = Node(root_level(self.active), 0) if is_whole else node
    if not held:
        self.nodes[key] = handle
        return [], []
    self.nodes[key] = held[0][1]
    return [Merge(held[0][1], handle, key)], []


def _missing_of_all(self: FoldSet[object]) -> list[int]:
    spans = [span(node, self.active) for node in self.__dict__.get("taken", [])]
    return [slot for slot in range(self.active) if not any(a <= slot < b for a, b in spans)]
