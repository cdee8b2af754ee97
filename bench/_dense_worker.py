"""treefold's worker in `bench.dense`: a user's script, with a module that has these parameters."""

import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

import treefold.torch as ps
from bench._dense_work import Work, error_of
from bench._link import Link, Member
from bench.rounds import servers_spent


class Parameters(nn.Module):
    """A module that is nothing but its parameters, cut from one flat tensor."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        tensors = torch.split(work.initial(), work.sizes)
        self.tensors = nn.ParameterList([nn.Parameter(tensor.clone()) for tensor in tensors])

    def forward(self, gradient: Tensor, sizes: list[int]) -> Tensor:
        """A loss whose gradient is the one given."""
        wanted = torch.split(gradient, sizes)
        return torch.stack([p.dot(g) for p, g in zip(self.tensors, wanted, strict=True)]).sum()


def flat(model: nn.Module) -> Tensor:
    """All parameters in one tensor, float32 [elements]."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def main() -> None:
    """Take steps with gradients that are ready, in the way of a script with its own loader.

    The value of a window is when each of its steps ended, on the clock that all processes share.
    """
    path, given = sys.argv[1:]
    work = Work.parse(given)
    ps.init()
    model = Parameters(work)
    # Any, since whether there is such a keyword depends on this treefold.
    options: dict[str, Any] = {} if work.wire == "float32" else {"wire": work.wire}
    inner = work.make_optimizer(list(model.parameters()))
    options["in_place"] = work.in_place
    optimizer = ps.DistributedOptimizer(inner, model, **options)
    member = Member(Link(path, "player", ps.rank()))
    model(work.gradient(ps.rank()), work.sizes).backward()

    def run(steps: int) -> list[int]:
        ended_ns = []
        for _ in range(steps):
            optimizer.step()
            ended_ns.append(time.monotonic_ns())
        return ended_ns

    member.meet()
    asks = {
        "error": lambda wanted: error_of(flat(model), wanted),
        "servers": lambda _: servers_spent(),
    }
    member.serve(run, asks)


if __name__ == "__main__":
    main()
