"""treefold's worker in `bench.train`: a user's script."""

import sys
import time

from torch.nn.functional import cross_entropy

import treefold.torch as ps
from bench._link import Link, Member
from bench._train_work import Images, Training, accuracy, make_optimizer
from treefold.torch import session


def main() -> None:
    """Train by order of the conductor."""
    path, given = sys.argv[1:]
    training = Training.parse(given)
    ps.init()
    model = training.make_model()
    optimizer = ps.DistributedOptimizer(make_optimizer(model), model)
    data = Images(training.data, "train")
    member = Member(Link(path, "player", ps.rank()))
    spent_ns = session.current().client.spent.ns
    epochs = 0

    def run(steps: int) -> float:
        """The share of the time that was not spent on the loop's body."""
        nonlocal epochs
        epochs += 1
        began_ns, before_ns = time.perf_counter_ns(), spent_ns.get("compute", 0)
        for x, y in ps.batches(
            data, training.batch, epochs, collate_fn=lambda batch: batch, max_rounds=steps
        ):
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call] # torch's own has no types
            optimizer.step()
        computed_ns = spent_ns.get("compute", 0) - before_ns
        return 1.0 - computed_ns / (time.perf_counter_ns() - began_ns)

    member.meet()
    member.serve(run, {"accuracy": lambda _: accuracy(model, training.data)})


if __name__ == "__main__":
    main()
