"""Faults that a test plants in a process before it starts: each breaks one promise on purpose.

Named by a command's first words, ``fault:NAME``; see `tests.support.zygote.run`.
"""

from treefold.common.tree import FoldSet, Merge, Node, canonical, contains, root_level, span
from treefold.scheduler.balance import Balance
from treefold.wire import membership
from treefold.wire.messages import PROTOCOL_VERSION


def arrival_order() -> None:
    """Fold whatever is there when it comes, not siblings as they meet."""
    setattr(FoldSet, "add", _add_as_it_comes)  # noqa: B010 # mypy forbids it otherwise
    setattr(FoldSet, "missing", _missing_of_all)  # noqa: B010


def other_protocol() -> None:
    """Register as a process of another protocol version."""
    setattr(membership, "PROTOCOL_VERSION", PROTOCOL_VERSION + 1)  # noqa: B010


def equal_leases() -> None:
    """Deal slots evenly once; no lease moves and nobody helps."""
    setattr(Balance, "check", lambda *_: None)  # noqa: B010
    setattr(Balance, "help", lambda *_: [])  # noqa: B010


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
