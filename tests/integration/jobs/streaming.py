"""A job whose model has many parts, tied, checkpointed, unused and strangely used parameters.

At the end the worker prints in how many places a parameter lay, which rounds began before all of
their parts were here, and a hash of every parameter and buffer. With ``--linger`` the worker that
makes this file stays in a loop body until servers have overwritten what it computes with. With
``--withhold`` the second layer is lost, time and again, until the forward of the first one has run
with that version. With ``--write`` the worker that makes this file writes to a parameter;
with ``--drain`` it is asked to stop.
"""

import argparse
import atexit
import copy
import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import treefold.torch as ps
from treefold.torch import session
from treefold.torch.awaiting import AwaitedParameter
from treefold.wire.messages import Pulled
from treefold.worker.effects import ReleasePayload
from treefold.worker.exchange import Exchange
from treefold.worker.pulls import Table

WIDTH, CLASSES = 512, 10  # a square layer is one part
SAMPLES, BATCH_SIZE = 76, 16
EPOCHS = 2
ROUNDS = -(-SAMPLES // BATCH_SIZE)
LAST_ROUNDS = [ROUNDS * (epoch + 1) for epoch in range(EPOCHS)]
OVERLAPS: dict[str, bool | str] = {"true": True, "backward": "backward", "false": False}


class Net(nn.Module):
    """Every way in which parameters are used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.tied = nn.Linear(WIDTH, WIDTH, bias=False)
        self.tied.weight = self.first.weight
        self.lent = nn.Linear(WIDTH, WIDTH, bias=False)
        self.unused = nn.Linear(WIDTH, WIDTH, bias=False)
        self.remade = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh(), nn.Dropout(0.1))
        self.frozen = nn.Linear(WIDTH, WIDTH, bias=False)
        self.frozen.requires_grad_(requires_grad=False)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Tensor, float32 [n, WIDTH] to float32 [n, CLASSES]."""
        x = torch.tanh(self.first(x))
        x = torch.tanh(nn.functional.linear(x, self.lent.weight))
        again: Tensor = checkpoint(self.remade, x, use_reentrant=False)
        x = self.frozen(self.norm(self.tied(again)))
        scores: Tensor = self.head(x)
        return scores


class Withheld:
    """Loses the second layer until the first one has run."""

    def __init__(self, model: Net) -> None:
        self.version = self.lost = 0
        model.first.register_forward_hook(self._on_first)
        take = Exchange.take

        def lossy(
            exchange: Exchange, now_ns: int, pulled: Pulled, payloads: tuple[int, ...]
        ) -> Table | None:
            whole: Table | None = None
            for number, payload in enumerate(payloads, pulled.part):
                if self._is_held(exchange.tables[pulled.table], pulled, number):
                    exchange._out.append(ReleasePayload(payload))
                    self.lost += 1
                else:
                    one = msgspec.structs.replace(pulled, part=number, count=1)
                    whole = take(exchange, now_ns, one, (payload,)) or whole
            return whole

        Exchange.take = lossy  # type: ignore[assignment,method-assign] # the fault

    def _is_held(self, table: Table, pulled: Pulled, number: int) -> bool:
        if table.declare_call is not None or pulled.version <= self.version:
            return False
        if pulled.version in LAST_ROUNDS:  # nobody computes with it
            return False
        if not session.current().client._shell.core._leased(pulled.version):
            return False  # nor does this worker
        part = [part for part in table.parts if part.shard == pulled.shard][number]
        return WIDTH * WIDTH <= part.start < 2 * WIDTH * WIDTH

    def _on_first(self, module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> None:
        del module, inputs, output
        self.version = ps.round()


def use_otherwise(model: Net, number: int) -> None:
    """Look at parameters as scripts do, here and there, before the forward."""
    if number % 4 == 1:
        total = sum(float(value.double().sum()) for value in model.state_dict().values())
        assert total == total  # reads every value
    if number % 4 == 2:
        float(model.lent.weight.data[0, 0])
        next(iter(model.remade.parameters()))[0, 0].item()
    if number % 4 == 3:
        twin = copy.deepcopy(model)
        assert type(twin.lent.weight) is nn.Parameter
        assert torch.equal(twin.lent.weight, model.lent.weight)


def is_first(path: Path) -> bool:
    """Whether nobody else has been here; a file says so."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def linger() -> None:
    """Wait until the version that this body computes with is gone."""
    while not session.current().client.is_void:
        time.sleep(0.005)
    say("overwritten")


def is_in_servers_memory(tensor: Tensor) -> bool:
    """Whether a tensor lies in memory that this process has mapped of another one."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        begin, end = (int(at, 16) for at in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return "memfd:" in line
    return False


def write(model: Net) -> None:
    """Do what is forbidden."""
    with torch.no_grad():
        model.lent.weight.add_(1.0)


def say(text: str) -> None:
    """Print at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def train(chosen: argparse.Namespace) -> None:
    """The plain loop."""
    torch.manual_seed(11)
    x = torch.randn(SAMPLES, WIDTH)
    y = (x @ torch.randn(WIDTH, CLASSES)).argmax(1)
    model = Net()
    trained = [one for one in model.parameters() if one.requires_grad]
    inner = torch.optim.AdamW(trained, lr=1e-3)
    optimizer = ps.DistributedOptimizer(
        inner, model, overlap=OVERLAPS[chosen.overlap], in_place=chosen.in_place
    )
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    withheld = Withheld(model) if chosen.withhold else None
    early: dict[int, None] = {}
    places: dict[int, None] = {}
    number = 0
    dataset = torch.utils.data.TensorDataset(x, y)
    atexit.register(
        lambda: say(f"after {any(map(is_in_servers_memory, model.parameters()))}")
    )  # before the one that leaves the cluster
    for epoch in range(EPOCHS):
        for inputs, targets in ps.batches(dataset, batch_size=BATCH_SIZE, epoch=epoch):
            if isinstance(model.lent.weight, AwaitedParameter):
                early[ps.round()] = None
            else:
                places[model.lent.weight.data_ptr()] = None
            if withheld is None:
                use_otherwise(model, number)
            is_in_place = chosen.in_place and len(places) > 1  # no longer where it was made
            if chosen.linger is not None and is_in_place and is_first(chosen.linger):
                linger()
            if chosen.drain is not None and is_in_place and is_first(chosen.drain):
                say(f"before {any(map(is_in_servers_memory, model.parameters()))}")
                os.kill(os.getpid(), signal.SIGTERM)
            if chosen.write is not None and is_in_place and is_first(chosen.write):
                write(model)
            number += 1
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call] # torch's own has no types
            optimizer.step()
            decay.step()
            if number % 3 == 0:
                float(model.unused.weight.detach()[0, 0])
        assert not any(isinstance(one, AwaitedParameter) for one in model.parameters())
    hashed = hashlib.sha256()
    for name, value in sorted(ps.state_dict().items()):
        hashed.update(name.encode() + value.numpy().tobytes())
    say(f"places {len(places)}")
    say(f"early {','.join(map(str, early))} lost {withheld.lost if withheld else 0}")
    say(f"final {hashed.hexdigest()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--overlap", choices=OVERLAPS, default="true")
    parser.add_argument("--in-place", action="store_true")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--linger", type=Path)
    parser.add_argument("--withhold", action="store_true")
    parser.add_argument("--drain", type=Path)
    ps.init()
    train(parser.parse_args())
    ps.shutdown()
    for thread in threading.enumerate():
        if thread.name.startswith("treefold"):
            thread.join()  # of an embedded cluster: its server still writes the ledger
    sys.exit(0)
