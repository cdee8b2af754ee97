"""The processes of `bench.small`: an echo over bare ZeroMQ, and treefold's workers.

As a script it is a worker: ``round`` takes part in rounds of a tiny model with an own loader, as a
user would write it; ``push`` sends empty contributions with the low-level client.
"""

import sys
from collections.abc import Callable

import torch
import zmq
from torch import nn

import treefold.torch as ps
from bench._harness import Part, Processes
from bench._link import Link, Member
from treefold.common.plan import LoopPlan, PlanKind
from treefold.wire.words import Outcome
from treefold.worker import (
    Client,
    Dtype,
    OptimizerSpec,
    Placement,
    Rule,
    SlotMeta,
    TableSpec,
    Task,
    TensorSpec,
    load,
)

ECHO_BYTES = 64  # a small header
RATE = 2.0**-10  # exact, so that parameters count the rounds


def echo(transport: str, folder: str) -> Processes:
    """One process that sends, one that answers."""
    given = (transport, folder)
    return Processes(
        f"echo {transport}", [Part("server", 0, answer, given), Part("player", 0, ask, ())]
    )


def answer(link: Link, transport: str, folder: str) -> None:
    """Send everything back."""
    router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    router.bind(f"ipc://{folder}/echo" if transport == "ipc" else "tcp://127.0.0.1:*")
    member = Member(link, router.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0"))
    member.meet()
    member.end_with_conductor()
    while True:
        router.send_multipart(router.recv_multipart())


def ask(link: Link) -> None:
    """Send, and wait for it to come back."""
    member = Member(link)
    dealer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    [address] = member.meet()
    dealer.connect(address)
    message = bytes(ECHO_BYTES)

    def run(steps: int) -> None:
        for _ in range(steps):
            dealer.send(message)
            dealer.recv()

    member.serve(run)


def take_rounds(path: str) -> None:
    """A model of 10,000 parameters, its gradient ready, the user's own loop."""
    ps.init()
    model = nn.Sequential(nn.Linear(100, 90), nn.ReLU(), nn.Linear(90, 10))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    optimizer = ps.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=RATE), model)
    member = Member(Link(path, "player", ps.rank()))
    loss = torch.stack([parameter.sum() for parameter in model.parameters()]).sum()
    loss.backward()  # type: ignore[no-untyped-call] # torch's own has no types

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.step()

    member.meet()
    member.serve(run, {"rounds": lambda _: counted_rounds(model)})


def counted_rounds(model: nn.Module) -> float:
    """How often zeros were stepped by `RATE` with a gradient of ones; NaN if they differ."""
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return -flat[0].item() / RATE if bool((flat == flat[0]).all()) else float("nan")


def push_nothing(path: str) -> None:
    """Slots that contribute nothing: the protocol's own round trip."""
    client = Client(load({}).settings)
    tensor = TensorSpec("weights", [1], Dtype.FLOAT32, 0)
    optimizer = OptimizerSpec("SGD", [{"lr": RATE}])
    spec = TableSpec("model", Rule.OPTIMIZER, Placement.ELEMENTWISE, [tensor], optimizer)
    client.declare(spec, torch.zeros(1)).release()
    size = client.size
    client.enter_loop(LoopPlan(PlanKind.LOADER, 0, 0, 0, size, 0, size, 0, False, 0))
    member = Member(Link(path, "player", client.rank))
    tasks = [next_of(client)]

    def run(steps: int) -> None:
        for _ in range(steps):
            client.finish_slot(tasks[0], {0: SlotMeta([{"lr": RATE}], 0.0, b"")})
            tasks[0] = next_of(client)

    member.meet()
    member.serve(run, {"rounds": lambda _: float(tasks[0].round)})
    client.leave(Outcome.DONE, "")


def next_of(client: Client) -> Task:
    """The next slot, whose parameters are of no interest."""
    task = client.next_task()
    assert isinstance(task, Task)
    for snapshot in task.snapshots:
        snapshot.release()
    return task


WORKERS: dict[str, Callable[[str], None]] = {"round": take_rounds, "push": push_nothing}

if __name__ == "__main__":
    WORKERS[sys.argv[2]](sys.argv[1])
