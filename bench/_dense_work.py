"""What `bench.dense` has everybody do: parameters, gradients, the step, and the right result.

The work: every worker has its gradient of all parameters; a step is to add the workers' gradients
up, scaled to their mean, to take the optimizer's step, and to give every worker the new parameters.
The gradients stay the same, so that their computation costs nothing.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from bench._harness import WINDOWS_MIN

SHAPES: dict[str, list[int]] = {
    "standard": [1_040_000] * 24 + [1_000] * 325,  # 25,285,000 float32 values, 101 MB
    "small": [5_000] * 5_000,  # 25,000,000
    "fifth": [1_000_000] * 4 + [4_000] * 250,  # 5,000,000
    "10k": [9_000, 90, 900, 10],  # the model of `bench.small`
    "tiny": [40_000] * 4 + [1_000] * 5,  # to try the benchmark itself
}
OPTIMIZERS = ("sgd", "adamw")
WIRES = ("float32", "bfloat16")
SGD_RATE, ADAMW_RATE = 0.01, 0.001
CHUNK = 262_144  # 1 MiB: stays in the second-level cache between the passes over it
TOLERANCES = {"float32": 2e-5, "bfloat16": 2e-2}  # shares of the largest parameter


@dataclass(frozen=True, slots=True)
class Work:
    """One work: keys of `SHAPES`, `OPTIMIZERS` and `WIRES`, and how many take part.

    With ``in_place`` workers of treefold use parameters where servers keep them.
    """

    shape: str = "standard"
    optimizer: str = "sgd"
    wire: str = "float32"
    workers: int = 2
    servers: int = 2
    in_place: bool = False

    @property
    def sizes(self) -> list[int]:
        """Elements of each tensor."""
        return SHAPES[self.shape]

    @property
    def elements(self) -> int:
        """Elements of all tensors."""
        return sum(self.sizes)

    def share(self, number: int, of: int) -> tuple[int, int]:
        """Start and stop of one of some equal shares of the elements."""
        return self.elements * number // of, self.elements * (number + 1) // of

    def initial(self) -> Tensor:
        """The parameters before the first step, float32 [elements]."""
        return torch.randn(self.elements, generator=torch.Generator().manual_seed(0))

    def gradient(self, worker: int) -> Tensor:
        """A worker's gradient, float32 [elements]."""
        return torch.randn(self.elements, generator=torch.Generator().manual_seed(1 + worker))

    def make_optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """What a user would write, with the fused kernels for AdamW."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=SGD_RATE)
        return torch.optim.AdamW(parameters, lr=ADAMW_RATE, fused=True)

    def dump(self) -> str:
        """As text, for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> "Work":
        """From `dump`."""
        return cls(**json.loads(text))


class Step:
    """The optimizer on a flat tensor, piece by piece, by plain torch calls.

    Parameters
    ----------
    optimizer : str
        One of `OPTIMIZERS`.
    parameters : Tensor, float32 [n]
        Changed in place. A piece must always be the same.
    """

    def __init__(self, optimizer: str, parameters: Tensor) -> None:
        self._is_sgd = optimizer == "sgd"
        self.parameters = parameters
        self._moments: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def take(self, start: int, stop: int, gradient: Tensor, scale: float = 1.0) -> None:
        """Step the elements ``[start, stop)``.

        Parameters
        ----------
        start, stop : int
            Which ones.
        gradient : Tensor, float32 [stop - start]
            Changed if it has to be scaled.
        scale : float
            By what to multiply the gradient.
        """
        piece = self.parameters[start:stop]
        if self._is_sgd:
            piece.add_(gradient, alpha=-SGD_RATE * scale)
            return
        if scale != 1.0:
            gradient.mul_(scale)
        if start not in self._moments:
            zeros = torch.zeros_like(piece), torch.zeros_like(piece), torch.zeros(())
            self._moments[start] = zeros
        mean, square, count = self._moments[start]
        adamw(
            [piece], [gradient], [mean], [square], [], [count],
            fused=True, amsgrad=False, beta1=0.9, beta2=0.999, lr=ADAMW_RATE, weight_decay=0.01,
            eps=1e-8, maximize=False,
        )  # fmt: skip


def pieces(start: int, stop: int, size: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Cut a range into pieces of a size."""
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


# ---- the right result ----------------------------------------------------------------------------


def reference(work: Work, steps: int) -> Tensor:
    """The parameters after so many steps, by torch's own optimizer on one tensor."""
    parameters = torch.nn.Parameter(work.initial())
    total = work.gradient(0)
    for worker in range(1, work.workers):
        total += work.gradient(worker)
    parameters.grad = total.div_(work.workers)
    optimizer = work.make_optimizer([parameters])
    for _ in range(steps):
        optimizer.step()
    return parameters.detach()


def error_of(parameters: Tensor, wanted: str) -> float:
    """The largest difference from a file of float32 values, as a share of the largest of those."""
    expected = torch.from_file(wanted, size=parameters.numel(), dtype=torch.float32)
    worst, largest = 0.0, 0.0
    for start, stop in pieces(0, parameters.numel()):
        difference = (parameters[start:stop] - expected[start:stop]).abs().max().item()
        worst = max(worst, difference) if difference == difference else float("inf")
        largest = max(largest, expected[start:stop].abs().max().item())
    return worst / largest


def parser(description: str) -> argparse.ArgumentParser:
    """The command line of a benchmark that does this work over several lanes."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("--shape", choices=SHAPES, default=Work().shape)
    made.add_argument("--optimizer", choices=OPTIMIZERS, default=Work().optimizer)
    made.add_argument("--workers", type=int, default=2)
    made.add_argument("--servers", type=int, default=2)
    made.add_argument("--windows", type=int, default=WINDOWS_MIN)
    made.add_argument("--steps", type=int, default=20)
    made.add_argument("--lanes", default="shared,tcp")
    return made


def work_of(options: argparse.Namespace) -> Work:
    """What it is to do."""
    return Work(
        shape=options.shape,
        optimizer=options.optimizer,
        workers=options.workers,
        servers=options.servers,
    )
