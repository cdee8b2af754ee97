"""What stale contributions cost in accuracy, with and without momentum, and what wins it back.

    python -m bench.staleness --data /usr/share/datasets/fashion-mnist

Sixteen workers of nearly the same speed, in virtual time: what is computed, corrected and stepped
is real, by the servers' own code, on Fashion-MNIST. Every mode applies as many contributions, each
with its share of a round, and each seed draws data, initial values and speeds. Prints a table of
accuracies and one line of JSON.
"""

import argparse
import heapq
import random
import statistics
import sys
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, nn

from bench._harness import machine, print_document, print_table
from bench._train_work import Images
from treefold.common.layout import Layout
from treefold.common.spec import (
    Compensation,
    Consistency,
    ConsistencyKind,
    Dtype,
    Hyper,
    OptimizerSpec,
    Placement,
    Rule,
    TableSpec,
    TensorSpec,
)
from treefold.server.compensation import StalenessMean, compensated
from treefold.server.delays import Delays
from treefold.server.shard import FoldedPart, ShardState

HIDDEN = 100
BATCH = 32  # samples of a contribution
SPEEDS = (0.9, 1.1)  # of a step, drawn anew each time
SETUPS: dict[str, Hyper] = {
    "lr 0.5": {"lr": 0.5},
    "lr 0.05, momentum 0.9": {"lr": 0.05, "momentum": 0.9},
    "lr 0.1, momentum 0.9": {"lr": 0.1, "momentum": 0.9},
    "lr 0.2, momentum 0.9": {"lr": 0.2, "momentum": 0.9},
}
ASYNC = ConsistencyKind.ASYNC
RULES: dict[str, Consistency] = {
    "sync": Consistency(),
    "async": Consistency(ASYNC),
    "lr-staleness": Consistency(ASYNC, 0, Compensation.LR_STALENESS),
    "dc-asgd": Consistency(ASYNC, 0, Compensation.DC_ASGD, 0.04, 64),
    "dc-asgd-adaptive": Consistency(ASYNC, 0, Compensation.DC_ASGD_ADAPTIVE, 2.0, 64),
    "momentum": Consistency(ASYNC, 0, Compensation.MOMENTUM),
}


@dataclass(frozen=True, slots=True)
class Work:
    """What is trained, and by how many."""

    train: Images
    test: Images
    workers: int
    contributions: int


class Job:
    """One training run.

    Parameters
    ----------
    work : Work
        What is trained.
    rule : Consistency
        The mode.
    hyper : dict
        Of SGD.
    seed : int
        Of everything that is drawn.
    """

    def __init__(self, work: Work, rule: Consistency, hyper: Hyper, seed: int) -> None:
        self._work = work
        self._rule = rule
        self._groups = [hyper]
        self._samples = torch.Generator().manual_seed(seed)
        self._speeds = random.Random(seed)
        torch.manual_seed(seed)
        self._model = nn.Sequential(
            nn.Flatten(), nn.Linear(784, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10)
        )
        self._parameters = list(self._model.parameters())
        self._state = self._shard(hyper)
        self._delays = Delays(self._state, rule) if rule.compensation.is_delayed else None
        self._mean = StalenessMean()
        self.version = 0

    def _shard(self, hyper: Hyper) -> ShardState:
        tensors = [
            TensorSpec(name, list(one.shape), Dtype.FLOAT32, 0)
            for name, one in self._model.named_parameters()
        ]
        optimizer = OptimizerSpec("SGD", [hyper])
        spec = TableSpec("model", Rule.OPTIMIZER, Placement.ELEMENTWISE, tensors, optimizer)
        state = ShardState(spec, Layout(spec).cut(1)[0])
        flat = nn.utils.parameters_to_vector(self._parameters).detach()
        for part, (start, stop) in enumerate(state.parts):
            state.initialize(part, flat[start:stop].clone())
        return state

    def run(self) -> tuple[float, float]:
        """Train; returns accuracy and mean staleness."""
        if self._rule.kind is ConsistencyKind.SYNC:
            self._run_rounds()
        else:
            self._run_apart()
        return self._accuracy(), self._mean.value

    def _run_rounds(self) -> None:
        for _ in range(self._work.contributions // self._work.workers):
            values = self._values()
            total = self._gradient(values)
            for _ in range(self._work.workers - 1):
                total += self._gradient(values)
            self._step(total, self._groups)

    def _run_apart(self) -> None:
        number = count()  # of those that are due at one time
        due = [(self._takes(), next(number), 0, self._values()) for _ in range(self._work.workers)]
        heapq.heapify(due)
        for _ in range(self._work.contributions):
            now, _, base, values = heapq.heappop(due)
            self._apply(self._gradient(values), base)
            heapq.heappush(due, (now + self._takes(), next(number), self.version, self._values()))

    def _takes(self) -> float:
        return self._speeds.uniform(*SPEEDS)

    def _apply(self, gradient: Tensor, base: int) -> None:
        stale = self.version - base
        self._mean.add(stale)
        rule = self._rule.compensation
        groups = compensated(rule, self._groups, stale, self._mean.value)
        if self._delays is not None:
            for part, (start, stop) in enumerate(self._state.parts):
                self._delays.correct(part, gradient[start:stop], base, self._work.workers)
        self._step(gradient, groups)

    def _step(self, gradient: Tensor, groups: list[Hyper]) -> None:
        folded = []
        for part, (start, stop) in enumerate(self._state.parts):
            if self._delays is not None:
                self._delays.keep(part, self.version)
            folded.append(FoldedPart(part, gradient[start:stop], b"\0"))
        self._state.step(folded, groups)
        self.version += 1

    def _values(self) -> Tensor:
        return torch.cat([self._state.values(part) for part in range(len(self._state.parts))])

    def _gradient(self, values: Tensor) -> Tensor:
        """Of a batch, with its share of a round."""
        nn.utils.vector_to_parameters(values, self._parameters)
        train = self._work.train
        chosen = torch.randint(len(train), (BATCH,), generator=self._samples)
        pixels, labels = train.images[chosen], train.labels[chosen]
        loss = nn.functional.cross_entropy(self._model(pixels), labels)
        found = torch.autograd.grad(loss / self._work.workers, self._parameters)
        return nn.utils.parameters_to_vector(found)

    def _accuracy(self) -> float:
        nn.utils.vector_to_parameters(self._values(), self._parameters)
        test = self._work.test
        with torch.no_grad():
            right = (self._model(test.images).argmax(1) == test.labels).sum()
        return int(right) / len(test)


def main() -> None:
    """Train in every mode, and print."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--data", default="/usr/share/datasets/fashion-mnist", help="IDX files")
    made.add_argument("--workers", type=int, default=16)
    made.add_argument("--contributions", type=int, default=4000)
    made.add_argument("--seeds", type=int, default=5)
    options = made.parse_args()
    torch.set_num_threads(1)
    train, test = Images(options.data, "train"), Images(options.data, "t10k")
    work = Work(train, test, options.workers, options.contributions)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for setup, hyper in SETUPS.items():
        results[setup] = {}
        for mode, rule in RULES.items():
            if rule.compensation is Compensation.MOMENTUM and "momentum" not in hyper:
                continue
            found = [Job(work, rule, hyper, seed).run() for seed in range(options.seeds)]
            accuracies = [accuracy for accuracy, _ in found]
            results[setup][mode] = {
                "accuracy": round(statistics.mean(accuracies), 4),
                "spread": round(statistics.pstdev(accuracies), 4),
                "least": round(min(accuracies), 4),
                "most": round(max(accuracies), 4),
                "staleness": round(statistics.mean(stale for _, stale in found), 2),
            }
            print(f"{setup}, {mode}: {results[setup][mode]}", file=sys.stderr, flush=True)
    rows = [[mode, *(_cell(results[setup].get(mode)) for setup in SETUPS)] for mode in RULES]
    title = f"accuracy, {options.workers} workers, mean (standard deviation) of {options.seeds}"
    print_table(title, ["", *SETUPS], rows)
    print_document({"workers": options.workers, "results": results, "machine": machine()})


def _cell(found: dict[str, float] | None) -> str:
    return "" if found is None else f"{found['accuracy']:.3f} ({found['spread']:.3f})"


if __name__ == "__main__":
    main()
