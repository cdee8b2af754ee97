"""treefold's worker in `bench.scale`: a loop whose body sleeps, and the counts of its traffic."""

import sys
import time
from dataclasses import asdict, dataclass

import msgspec
import torch
from torch import nn

import treefold.torch as ps
from bench._link import Link, Member
from bench._small_parts import RATE, counted_rounds
from bench.rounds import servers_spent
from treefold.torch import session
from treefold.wire.exchange import SCHEDULER

PARAMETERS = 524_288  # 2 MiB, 8 blocks: 4 servers have 2 each


@dataclass(frozen=True, slots=True)
class Load:
    """A cluster, and how long a slot's computation takes."""

    workers: int
    servers: int
    slots: int
    slot_ms: float

    def dump(self) -> str:
        """As text, for another process."""
        return msgspec.json.encode(asdict(self)).decode()

    @classmethod
    def parse(cls, text: str) -> "Load":
        """From `dump`."""
        return msgspec.json.decode(text, type=cls)


def traffic() -> dict[str, int]:
    """What this process has exchanged with servers so far, and its messages with the scheduler."""
    counts = session.current().client._shell.hub.traffic
    found = dict.fromkeys(("messages", "control_messages"), 0)
    for name, ways in (("sent", counts.sent), ("received", counts.received)):
        of_servers = [way for (socket, _), way in ways.items() if socket != SCHEDULER]
        of_all = sum(way.messages for way in ways.values())
        messages = sum(way.messages for way in of_servers)
        found["messages"] += messages
        found["control_messages"] += of_all - messages
        found[f"{name}_bytes"] = sum(w.header_bytes + w.payload_bytes for w in of_servers)
        found[f"{name}_shared_bytes"] = sum(way.shared_bytes for way in of_servers)
    return found


class Weights(nn.Module):
    """One tensor, whose gradient is all ones."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(PARAMETERS))

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        """A loss."""
        return self.weights.sum() + samples.sum()


def main() -> None:
    """Take rounds by order of the conductor."""
    path, given = sys.argv[1:]
    work = Load.parse(given)
    ps.init()
    model = Weights()
    optimizer = ps.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=RATE), model)
    member = Member(Link(path, "player", ps.rank()))
    epochs = 0

    def run(steps: int) -> dict[str, int]:
        """Traffic of the window."""
        nonlocal epochs
        epochs += 1
        before = traffic()
        data = torch.utils.data.TensorDataset(torch.zeros(steps * work.slots))
        for (samples,) in ps.batches(data, work.slots, epochs):
            time.sleep(work.slot_ms / 1e3)
            optimizer.zero_grad()
            model(samples).backward()
            optimizer.step()
        return {what: count - before[what] for what, count in traffic().items()}

    asks = {"rounds": lambda _: counted_rounds(model), "servers": lambda _: servers_spent()}
    member.meet()
    member.serve(run, asks)


if __name__ == "__main__":
    main()
