"""treefold's worker in `bench.overlap`: layers that sleep, each with the parameters of one part."""

import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

import treefold.torch as ps
from bench._link import Link, Member

LAYER = 262_144  # elements, 1 MiB: one part
RATE = 2.0**-10


@dataclass(frozen=True, slots=True)
class Load:
    """A model, how long its layers take each way, and what may overlap."""

    layers: int
    forward_ms: float
    backward_ms: float
    overlap: bool | str
    slots: int

    def dump(self) -> str:
        """As text, for another process."""
        return msgspec.json.encode(asdict(self)).decode()

    @classmethod
    def parse(cls, text: str) -> "Load":
        """From `dump`."""
        return msgspec.json.decode(text, type=cls)


class Sleepy(torch.autograd.Function):
    """A layer's work: sleeps forward and backward, and its gradient is all ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, times: tuple[float, float]) -> Tensor:  # noqa: ANN401 # torch's own
        """Pass ``x`` on."""
        ctx.back_s, ctx.shape = times[1], weights.shape
        time.sleep(times[0])
        return x + weights[:1].detach() * 0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401 # torch's own
        """Make the gradient of this layer."""
        time.sleep(ctx.back_s)
        return grads[0], torch.ones(ctx.shape), None


class Layer(nn.Module):
    """One part's worth of parameters."""

    def __init__(self, times: tuple[float, float]) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(LAYER))
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        """Sleep."""
        passed: Tensor = Sleepy.apply(x, self.weights, self.times)  # type: ignore[no-untyped-call] # torch's
        return passed


def main() -> None:
    """Take rounds by order of the conductor."""
    path, given = sys.argv[1:]
    work = Load.parse(given)
    ps.init()
    times = work.forward_ms / work.layers / 1e3, work.backward_ms / work.layers / 1e3
    model = nn.Sequential(*(Layer(times) for _ in range(work.layers)))
    inner = torch.optim.SGD(model.parameters(), lr=RATE)
    optimizer = ps.DistributedOptimizer(inner, model, overlap=work.overlap)
    member = Member(Link(path, "player", ps.rank()))
    epochs = 0

    def run(steps: int) -> None:
        nonlocal epochs
        epochs += 1
        data = torch.utils.data.TensorDataset(torch.zeros(steps * work.slots))
        for (samples,) in ps.batches(data, work.slots, epochs):
            optimizer.zero_grad()
            start = samples.mean().reshape(1).requires_grad_()
            model(start).sum().backward()
            optimizer.step()

    def rounds(_: str) -> list[float]:
        """Rounds that each layer has counted: every one has the same."""
        counts = [float(layer[0]) / -RATE for layer in model.parameters()]
        return [min(counts), max(counts)]

    member.meet()
    member.serve(run, {"rounds": rounds})


if __name__ == "__main__":
    main()
