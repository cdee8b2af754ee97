"""A worker whose model is on a GPU: what its rounds cost beyond computing, and how fast it copies.

    python -m bench.gpu

One process with an embedded cluster, SGD. Three ways to get gradients out and parameters in: copies
that wait for the GPU (as a plain ``.cpu()`` does), staged ones that begin with the step, and staged
ones that overlap with backward. Rates are those of the exchange with gradients ready, beside bare
copies of as many bytes from and to one pinned tensor.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import nn

import treefold.torch as ps
from bench._harness import Spread, machine, print_document, print_table
from treefold.torch import session, streams

LAYERS = 24
CLASSES = 10
WARM_UP = 3  # rounds in which buffers are made and pinned, and overlap is learnt
MODES = {  # whether copies are staged, and whether they overlap with backward
    "copies that wait": (False, False),
    "staged": (True, False),
    "staged, overlapped": (True, True),
}


@dataclass(frozen=True, slots=True)
class Work:
    """What is trained: ``LAYERS`` layers of this width, on so many samples per step."""

    device: torch.device
    width: int
    batch: int
    rounds: int

    def model(self) -> nn.Module:
        """The model."""
        inner = [nn.Sequential(nn.Linear(self.width, self.width), nn.ReLU()) for _ in range(LAYERS)]
        return nn.Sequential(*inner, nn.Linear(self.width, CLASSES)).to(self.device)

    def batch_of(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch, which stays on the device."""
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(self.batch, self.width, generator=generator)
        targets = torch.arange(self.batch) % CLASSES
        return inputs.to(self.device), targets.to(self.device)

    def settle(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(slots=True)
class Found:
    """Seconds of each round, and of getting gradients out and parameters in."""

    rounds: list[float] = field(default_factory=list)
    outward: list[float] = field(default_factory=list)
    inward: list[float] = field(default_factory=list)


class Numbers(torch.utils.data.Dataset[int]):
    """As many samples as there are rounds; the real ones are on the device already."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        """How many."""
        return self._count

    def __getitem__(self, number: int) -> int:
        """One of them."""
        return number


@contextmanager
def copies(*, is_staged: bool) -> Iterator[None]:
    """Within this context copies are staged, or wait for the GPU."""
    if is_staged:
        yield
        return
    with mock.patch.object(streams, "port_of", return_value=None):
        yield


def compute(work: Work) -> list[float]:
    """Seconds of forward and backward alone."""
    model = work.model()
    inputs, targets = work.batch_of()
    found = []
    for _ in range(WARM_UP + work.rounds):
        work.settle()
        began = time.perf_counter()
        model.zero_grad(set_to_none=False)
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call] # torch's own has no types
        work.settle()
        found.append(time.perf_counter() - began)
    return found[WARM_UP:]


def train(work: Work, *, is_overlapped: bool) -> Found:
    """Rounds at full speed; then, if nothing overlaps, as many with gradients ready at the step."""
    torch.manual_seed(0)
    ps.init(slots=1)
    try:
        model = work.model()
        sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
        optimizer = ps.DistributedOptimizer(sgd, model, overlap=is_overlapped, lend=False)
        inputs, targets = work.batch_of()
        watched = 0 if is_overlapped else work.rounds
        free = WARM_UP + work.rounds + 1
        found, spent = Found(), session.current().client.spent
        began, pulled = time.perf_counter(), 0
        for number, _ in enumerate(ps.batches(Numbers(free + watched), 1, shuffle=False)):
            now, pulled_ns = time.perf_counter(), spent.ns.get("pull", 0)
            if WARM_UP < number < free:
                found.rounds.append(now - began)
            if number > free:
                found.inward.append((pulled_ns - pulled) / 1e9)
            began, pulled = now, pulled_ns
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call] # torch's own has no types
            if number >= free:
                work.settle()
            pushed = spent.ns.get("push", 0)
            optimizer.step()
            if number >= free:
                found.outward.append((spent.ns.get("push", 0) - pushed) / 1e9)
    finally:
        ps.shutdown()
    return found


def bare(work: Work, nbytes: int) -> dict[str, float]:
    """GB/s of plain copies between the GPU and one pinned tensor; empty without a GPU."""
    if work.device.type != "cuda":
        return {}
    here = torch.empty(nbytes, dtype=torch.uint8, device=work.device)
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def rate(copy: Callable[[], object]) -> float:
        taken = []
        for _ in range(WARM_UP + work.rounds):
            work.settle()
            began = time.perf_counter()
            copy()
            work.settle()
            taken.append(time.perf_counter() - began)
        return nbytes / statistics.median(taken[WARM_UP:]) / 1e9

    return {
        "out": rate(lambda: host.copy_(here, non_blocking=True)),
        "in": rate(lambda: here.copy_(host, non_blocking=True)),
    }


def measure(work: Work) -> dict[str, object]:
    """All ways of one model."""
    parameters = sum(parameter.numel() for parameter in work.model().parameters())
    nbytes = 4 * parameters
    alone = Spread.of(compute(work))
    limit = bare(work, nbytes)
    results: dict[str, object] = {}
    rows = [["computing alone", f"{1e3 * alone.median:.1f}", "", "", *_rates(limit)]]
    for name, (is_staged, is_overlapped) in MODES.items():
        with copies(is_staged=is_staged):
            found = train(work, is_overlapped=is_overlapped)
        taken = Spread.of([1e3 * seconds for seconds in found.rounds])
        beyond = taken.median - 1e3 * alone.median
        reached = {}
        if found.outward:
            reached["out"] = nbytes / statistics.median(found.outward) / 1e9
            reached["in"] = nbytes / statistics.median(found.inward) / 1e9
        spread = f"{taken.least:.1f} to {taken.most:.1f}"
        rows.append([name, f"{taken.median:.1f}", spread, f"{beyond:.1f}", *_rates(reached)])
        results[name] = {
            "round_ms": taken.document(),
            "beyond_compute_ms": round(beyond, 2),
            "gb_per_s": {way: round(value, 2) for way, value in reached.items()},
        }
    title = f"{parameters:,} float32 parameters, {work.batch} samples per step"
    columns = ["", "ms per round", "spread", "beyond computing", "GB/s out", "GB/s in"]
    print_table(title, columns, rows)
    return {
        "parameters": parameters,
        "batch": work.batch,
        "compute_ms": round(1e3 * alone.median, 2),
        "bare_gb_per_s": {way: round(value, 2) for way, value in limit.items()},
        "results": results,
    }


def _rates(values: dict[str, float]) -> list[str]:
    return [f"{values[way]:.1f}" if way in values else "" for way in ("out", "in")]


def main() -> None:
    """Measure, and print."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--device", default="cuda:0", help="cpu tries the script out")
    made.add_argument("--widths", default="1024,2048", help="of the layers")
    made.add_argument("--batch", type=int, default=4096, help="samples of a step")
    made.add_argument("--rounds", type=int, default=7, help="of each figure, at least 5")
    options = made.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU here")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    works = [
        Work(device, int(width), options.batch, max(5, options.rounds))
        for width in options.widths.split(",")
    ]
    models = [measure(work) for work in works]
    print_document({"device": name, "models": models, "machine": machine()})


if __name__ == "__main__":
    main()
