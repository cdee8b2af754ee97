"""What every version must be: the reference that the cluster is held against.

Values are symbols. A leaf names its slot, a fold of left and right is the pair of them, and a
version names itself: since every version's roots are compared before it is published, a name is all
that a reader has to compare.
"""

import math

from tests.sim.memory import fold
from tests.sim.scenario import Scenario
from treefold.common.layout import Layout
from treefold.common.spec import BUFFER_GROUP, Hyper, Rule
from treefold.common.tree import Node, root_level, span
from treefold.worker.effects import SlotMeta


class Reference:
    """Values of one scenario.

    Parameters
    ----------
    scenario : Scenario
        Its tables, plans, and which gradients are absent.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.layouts = [Layout(spec) for spec in scenario.tables]
        self.trained = [n for n, t in enumerate(scenario.tables) if t.rule is Rule.OPTIMIZER]
        self.apart = [n for n in self.trained if scenario.tables[n].is_asynchronous]
        self.folded = [n for n in self.trained if n not in self.apart]
        self._tensors: dict[tuple[int, int, int], list[int]] = {}
        self._roots: dict[tuple[int, int, int, int], tuple[object, int]] = {}
        self._norms: dict[tuple[int, int], float] = {}

    # ---- contributions ---------------------------------------------------------------------------

    def tensors(self, table: int, start: int, stop: int) -> list[int]:
        """The tensors of a part, in the order of its absent marks."""
        key = (table, start, stop)
        if key not in self._tensors:
            pieces = self.layouts[table].pieces(start, stop)
            self._tensors[key] = [piece.tensor for piece in pieces]
        return self._tensors[key]

    def has_buffers(self, table: int, start: int, stop: int) -> bool:
        """Whether a part has elements of a buffer, which no gradient can be lent with."""
        specs = self.scenario.tables[table].tensors
        found = self.tensors(table, start, stop)
        return any(specs[tensor].group == BUFFER_GROUP for tensor in found)

    def absent(self, key: tuple[int, int, int], round_: int, slot: int) -> int:
        """Which tensors of part ``key = (table, start, stop)`` have no gradient in a slot."""
        few = self.scenario.absent_of
        if not few:
            return 0
        table = key[0]
        marks = 0
        for position, tensor in enumerate(self.tensors(*key)):
            if (7 * tensor + 13 * round_ + 5 * slot + 3 * table) % 16 < few:
                marks |= 1 << position
        return marks

    def leaf(self, key: tuple[int, int, int], round_: int, slot: int) -> tuple[object, int]:
        """Value and absent marks of one slot's contribution to one part; None without gradient."""
        marks = self.absent(key, round_, slot)
        if marks == (1 << len(self.tensors(*key))) - 1:
            return None, marks
        return (*key, round_, slot), marks

    def root(self, key: tuple[int, int, int], round_: int) -> tuple[object, int]:
        """Value and absent marks of the whole fold of one part."""
        memo = (*key, round_)
        if memo not in self._roots:
            active = self.scenario.plan_of(round_).active_slots(round_)
            self._roots[memo] = self._node(key, round_, Node(root_level(active), 0), active)
        return self._roots[memo]

    def _node(
        self, key: tuple[int, int, int], round_: int, node: Node, active: int
    ) -> tuple[object, int]:
        start, stop = span(node, active)
        if stop - start == 1:
            return self.leaf(key, round_, start)
        left = self._node(key, round_, Node(node.level - 1, 2 * node.index), active)
        if span(Node(node.level - 1, 2 * node.index + 1), active)[0] >= stop:
            return left
        right = self._node(key, round_, Node(node.level - 1, 2 * node.index + 1), active)
        return fold(left[0], right[0]), left[1] & right[1]

    # ---- what goes with a round ------------------------------------------------------------------

    def meta(self, table: int, round_: int, slot: int) -> SlotMeta:
        """What a slot's loop body leaves; only that of slot 0 may be used."""
        spec = self.scenario.tables[table].optimizer
        count = 0 if spec is None else len(spec.groups)
        every = 0 if table in self.apart else self.scenario.clip_every
        limit = 1.5 if every and round_ % every == 0 else 0.0
        groups: list[Hyper] = [{"lr": round_ + slot / 64 + group} for group in range(count)]
        return SlotMeta(groups, limit + (slot if limit else 0), self.state(table, round_ + 1, slot))

    def state(self, table: int, version: int, slot: int = 0) -> bytes:
        """What comes with a version for the workers."""
        return b"" if version == 0 else b"%d %d %d" % (table, version, slot)

    def sums(self, table: int, round_: int, first: int, blocks: int) -> list[float]:
        """Made-up sums of squares whose total depends on the order in which they are added."""
        return [1.0 / (3 + block + round_ + table) for block in range(first, first + blocks)]

    def norm(self, table: int, version: int) -> float:
        """The gradient norm that goes with a version, NaN if it has no limit."""
        round_ = version - 1
        if round_ < 0 or self.meta(table, round_, 0).norm_max == 0:
            return math.nan
        if (table, round_) not in self._norms:
            total = 0.0
            for value in self.sums(table, round_, 0, self.layouts[table].blocks):
                total += value
            self._norms[table, round_] = math.sqrt(total)
        return self._norms[table, round_]

    # ---- versions --------------------------------------------------------------------------------

    def version(self, table: int, start: int, version: int) -> object:
        """The name of one version of a part."""
        return ("version", table, start, version)

    def initial(self, table: int, start: int) -> object:
        """The values that a script declares."""
        return ("initial", table, start)
