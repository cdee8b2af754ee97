"""What the live page costs the processes of a job: ``python -m bench.live_page [--workers N]``.

The scheduler: one sample and one document with so many members, in milliseconds per second of a
job. A server: the statistics of a part, beside an AdamW step of the same part in the same run.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import msgspec
import torch

from treefold.common.layout import Layout, ShardSpan
from treefold.common.spec import Dtype, OptimizerSpec, Placement, Rule, TableSpec, TensorSpec
from treefold.scheduler.admission import SchedulerLimits
from treefold.scheduler.core import SchedulerCore
from treefold.scheduler.history import History
from treefold.scheduler.status import status_of
from treefold.server.shard import FoldedPart, ShardState
from treefold.server.statistics import sums_of
from treefold.wire.exchange import Received
from treefold.wire.messages import Heartbeat, Register
from treefold.wire.words import PROTOCOL_VERSION, Role

S = 1_000_000_000
REPEATS = 30
SPENT = {"compute": 600, "push": 20, "pull": 30, "wait": 250}  # ms per second
PART = 4 * 65_536


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--servers", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    of_scheduler(options.workers, options.servers)
    of_server()


def of_scheduler(workers: int, servers: int) -> None:
    """Sample and encode, with everybody beating twice a second."""
    limits = SchedulerLimits(1, servers, workers, S // 2, 2 * S, 10 * S, 120 * S, 5 * S)
    core, history = SchedulerCore(limits), History()
    roles = [Role.SERVER] * servers + [Role.WORKER] * workers
    for number, role in enumerate(roles):
        peer, address = str(number).encode(), f"tcp://10.0.0.1:{number}"
        who = Register(PROTOCOL_VERSION, role, 1 + number, address, "host", number, "0")
        core.handle(0, Received(peer, who))
    sampling: list[float] = []
    encoding: list[float] = []
    bodies: list[bytes] = []
    for second in range(REPEATS):
        for number in range(len(roles)):
            spent = {name: ms * 1_000_000 * second for name, ms in SPENT.items()}
            beat = Heartbeat(1 + number, 1, 1, second, 1, second, 0.5, "version 7", 0, 0.0, spent)
            core.handle(second * S, Received(str(number).encode(), beat))
        now_ns = second * S
        sampling.append(timed(partial(history.sample, now_ns, now_ns / S, core)))
        began_ns = time.perf_counter_ns()
        bodies.append(msgspec.json.encode(history.news()) + status_of(core, now_ns))
        encoding.append((time.perf_counter_ns() - began_ns) / 1e6)
    print(f"{workers} workers, {servers} servers: per second of a job")
    for name, times in (("sample", sampling), ("document", encoding)):
        print(f"  {name}: {statistics.median(times):.2f} ms (worst {max(times):.2f})")
    print(f"  size of a document: {len(bodies[-1]) / 1024:.0f} KiB")


def of_server() -> None:
    """Statistics of a part of a shard, and a step of it."""
    spec = TableSpec(
        "t",
        Rule.OPTIMIZER,
        Placement.ELEMENTWISE,
        [TensorSpec("w", [PART], Dtype.FLOAT32, 0)],
        OptimizerSpec("AdamW", [{"lr": 0.001}]),
    )
    state = ShardState(spec, ShardSpan(0, Layout(spec).blocks))
    gradient = torch.randn(PART)
    summing: list[float] = []
    stepping: list[float] = []
    for _ in range(REPEATS):
        summing.append(timed(lambda: sums_of(state.values(0))))
        folded = [FoldedPart(0, gradient, b"\0")]
        stepping.append(timed(partial(state.step, folded, [{"lr": 0.001}])))
    ratios = [one / other for one, other in zip(summing, stepping, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    print("a part of 262,144 elements")
    print(f"  statistics: {statistics.median(summing):.2f} ms")
    print(f"  AdamW step: {statistics.median(stepping):.2f} ms")
    print(f"  ratio: {statistics.median(ratios):.2f} (half of them {low:.2f} to {high:.2f})")


def timed(what: Callable[[], object]) -> float:
    """Milliseconds that a call takes."""
    began_ns = time.perf_counter_ns()
    what()
    return (time.perf_counter_ns() - began_ns) / 1e6


if __name__ == "__main__":
    main()
