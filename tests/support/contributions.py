"""What the slots of a small table contribute, as servers would take it, wherever its model is."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.support.reference import PoisonedFlats, bits
from tests.support.sessions import backward
from treefold.common.fold import TORCH_DTYPES
from treefold.common.layout import Layout
from treefold.common.process import Spent
from treefold.common.spec import Dtype, OptimizerSpec, Placement, Rule, TableSpec, TensorSpec
from treefold.torch.binding import DTYPES
from treefold.torch.pushing import Pushing, TablePort
from treefold.worker.handed import PartRun, Task
from treefold.worker.pulls import PartRange
from treefold.worker.shell import Values


def numbers(elements: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Gradients as they come, with everything that rounding can go wrong with."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-42, 6, (elements,), generator=generator)
    values = torch.randn(elements, generator=generator) * 10.0**exponents
    odd = [0.0, -0.0, torch.inf, -torch.inf, 1e-45, -1e-45, 3e38, 65520.0, 1.00390625, -1.01171875]
    values[: len(odd)] = torch.tensor(odd)[:elements]
    return values.to(dtype)


def poisoned(elements: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory that shows when it is read before it was written."""
    return torch.full((elements,), torch.nan, dtype=dtype)


class Hands:
    """A client that keeps what it is handed, as servers understand it."""

    def __init__(self, layout: Layout, part_elements: int) -> None:
        self.spent = Spent()
        self.flats = PoisonedFlats()
        self.handed: dict[int, bytes] = {}
        begins = range(0, layout.elements, part_elements)
        ranges = [(at, min(at + part_elements, layout.elements)) for at in begins]
        self._parts = [
            PartRange(0, n, a, b, len(layout.pieces(a, b)), layout.wire((a, b)))
            for n, (a, b) in enumerate(ranges)
        ]

    def parts(self, _: int) -> list[PartRange]:
        """As `Client.parts`."""
        return self._parts

    def scratch(self, elements: int) -> Tensor:
        """As `Client.scratch`."""
        return poisoned(elements)

    def contribute(self, task: Task, where: PartRun, values: Values | None) -> None:
        """Look at the values at once."""
        del task
        first = self._parts[where.part]
        for part in self._parts[where.part : where.part + where.count]:
            assert part.number not in self.handed, "handed over twice"
            assert part.wire is first.wire
            taken = b"absent"
            if values is not None:
                own = values.flat[part.start - first.start : part.stop - first.start]
                assert own.dtype == TORCH_DTYPES[part.wire]
                taken = bits(own * values.scale if values.scale != 1.0 else own)
            self.handed[part.number] = taken


@dataclass(frozen=True, slots=True)
class Case:
    """A table: what its parameters are, what it travels as, and a slot's share of the round."""

    wire: Dtype
    dtype: torch.dtype
    scale: float
    sizes: tuple[int, ...] = (7, 30, 1, 12, 50)
    part_elements: int = 16


class Slots:
    """A script whose gradients are known bit for bit, on any device.

    Parameters
    ----------
    case : Case
        Which table.
    device : str
        Of its parameters.
    """

    def __init__(self, case: Case, device: str = "cpu") -> None:
        self._case = case
        tensors = [
            TensorSpec(f"w{n}", [size], DTYPES[case.dtype], 0) for n, size in enumerate(case.sizes)
        ]
        optimizer = OptimizerSpec("SGD", [{"lr": 0.1}])
        spec = TableSpec("t", Rule.OPTIMIZER, Placement.ELEMENTWISE, tensors, optimizer, case.wire)
        layout = Layout(spec)
        self.client = Hands(layout, case.part_elements)
        self.parameters = [
            nn.Parameter(torch.zeros(size, dtype=case.dtype, device=device)) for size in case.sizes
        ]
        named = [(f"w{n}", parameter) for n, parameter in enumerate(self.parameters)]
        port = TablePort(self.client, 0, layout)  # type: ignore[arg-type]  # all that it needs
        self.pushing = Pushing(port, named, True, False)
        factors = [[numbers(size, case.dtype, seed) for size in case.sizes] for seed in range(4)]
        # The first slot is watched for changes, which it is not possible to see beside infinities.
        factors[0] = [factor.nan_to_num(posinf=2.0, neginf=-2.0) for factor in factors[0]]
        self._factors = [[factor.to(device) for factor in of_slot] for of_slot in factors]

    def begin(self, slot: int) -> None:
        """Run a slot up to the end of its backward; slot 2 does not use the last parameter."""
        self.client.handed = {}
        self.pushing.begin(Task(0, slot, []), self._case.scale, is_stale_allowed=False)
        self.pushing.gradients.zero(set_to_none=True)
        used = self.parameters[: -1 if slot == 2 else None]
        loss = torch.zeros((), device=self.parameters[0].device)
        for parameter, factor in zip(used, self._factors[slot], strict=False):
            loss = loss + (parameter * factor).float().sum()
        backward(loss)

    def end(self) -> dict[int, bytes]:
        """Run the rest of it; returns what was contributed, part by part."""
        self.pushing.step()
        self.pushing.end([])
        return self.client.handed

    def run(self) -> list[dict[int, bytes]]:
        """Four slots."""
        found = []
        for slot in range(4):
            self.begin(slot)
            found.append(self.end())
        return found
