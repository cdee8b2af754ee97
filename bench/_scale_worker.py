"""treefold's worker in `bench.scale`: a loop whose body sleeps, and a count of its socket traffic.

The count is taken where pyzmq takes in and gives out frames, by a socket class of this benchmark's
own, so that it holds for any treefold. What goes through shared memory is not seen, which is why
the benchmark asks for the socket lane.
"""

import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import torch
import zmq
from torch import nn

import treefold.torch as ps
from bench._link import Link, Member
from bench._small_parts import RATE, counted_rounds
from bench.rounds import servers_spent
from treefold.common.config import load

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


@dataclass(slots=True)
class Traffic:
    """What this process has sent to servers and received from them, and its control messages."""

    sent_bytes: int = 0
    received_bytes: int = 0
    messages: int = 0
    control_messages: int = 0


TRAFFIC = Traffic()
CONTROL: dict[int, None] = {}
"""Sockets that are connected to the scheduler."""


class CountingSocket(zmq.Socket[bytes]):
    """A socket that counts whole messages and their bytes, headers and payloads alike."""

    def connect(self, addr: str) -> Any:  # noqa: ANN401 # whatever pyzmq returns
        """Connect, and note whether that is the scheduler."""
        if addr == load({}).settings.scheduler:
            CONTROL[id(self)] = None
        return super().connect(addr)

    def send(self, data: Any, flags: int = 0, *args: Any, **options: Any) -> Any:  # noqa: ANN401
        """Send a frame, and count it."""
        done = super().send(data, flags, *args, **options)
        if id(self) not in CONTROL:
            TRAFFIC.sent_bytes += memoryview(data).nbytes
        if not flags & zmq.SNDMORE:
            self._count_message()
        return done

    def recv(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401 # bytes or a frame
        """Receive a frame, and count it."""
        frame = super().recv(*args, **options)
        if id(self) not in CONTROL:
            TRAFFIC.received_bytes += memoryview(frame).nbytes
        if not self.getsockopt(zmq.RCVMORE):
            self._count_message()
        return frame

    def _count_message(self) -> None:
        if id(self) in CONTROL:
            TRAFFIC.control_messages += 1
        else:
            TRAFFIC.messages += 1


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
    zmq.Context._socket_class = CountingSocket  # type: ignore[misc] # for all contexts, indeed
    ps.init()
    model = Weights()
    optimizer = ps.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=RATE), model)
    member = Member(Link(path, "player", ps.rank()))
    epochs = 0

    def run(steps: int) -> dict[str, int]:
        """Traffic of the window."""
        nonlocal epochs
        epochs += 1
        before = asdict(TRAFFIC)
        data = torch.utils.data.TensorDataset(torch.zeros(steps * work.slots))
        for (samples,) in ps.batches(data, work.slots, epochs):
            time.sleep(work.slot_ms / 1e3)
            optimizer.zero_grad()
            model(samples).backward()
            optimizer.step()
        return {what: count - before[what] for what, count in asdict(TRAFFIC).items()}

    asks = {"rounds": lambda _: counted_rounds(model), "servers": lambda _: servers_spent()}
    member.meet()
    member.serve(run, asks)


if __name__ == "__main__":
    main()
