"""A small job with three optimizers, BatchNorm, dropout, a norm limit and a short last round.

Every slot is told on standard output before its loop body does anything. At the end the worker
prints a hash of every parameter and buffer. Options make this worker stop, wait, fail or be slow.
"""

import argparse
import hashlib
import signal
import sys
import threading
import time

import torch
from torch import Tensor, nn

import treefold.torch as ps
from treefold.torch import session

FEATURES, HIDDEN, CLASSES = 64, 1_024, 10
SAMPLES, BATCH_SIZE = 131, 32  # rounds of 32 samples, the last of an epoch has 3


def options() -> argparse.Namespace:
    """What this worker is to do beside training."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--sleep-ms", type=float, default=0.0, help="in every loop body")
    parser.add_argument("--gate", default="", help="ROUND:PATH, wait there from this round on")
    parser.add_argument("--hold", default="", help="ROUND:WHERE, stop there for ever")
    parser.add_argument("--fail", default="", help="raise in this round, or at the ``start``")
    parser.add_argument("--lbfgs", action="store_true", help="with an optimizer that is refused")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--width", type=int, default=HIDDEN)
    parser.add_argument("--lr", type=float, default=1e-2)
    return parser.parse_args()


class Nets(nn.Module):
    """Three nets one after the other, each of which has its optimizer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(
                nn.Linear(FEATURES, width),
                nn.BatchNorm1d(width),
                nn.ReLU(),
                nn.Dropout(0.1),
                nn.Linear(width, FEATURES),
            )
            for _ in range(3)
        )
        self.head = nn.Linear(FEATURES, CLASSES, bias=False)
        self.head.requires_grad_(requires_grad=False)
        self.tail = nn.ModuleList([self.nets[2], self.head])

    def forward(self, x: Tensor) -> Tensor:
        """Tensor, float32 [n, FEATURES] to float32 [n, CLASSES]."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.train(self.training and len(x) > 1)  # one sample has no variance
        for net in self.nets:
            x = x + net(x)
        scores: Tensor = self.head(x)
        return scores


class Trouble:
    """What this worker does in a loop body that has nothing to do with training."""

    def __init__(self, chosen: argparse.Namespace, model: Nets) -> None:
        self._chosen = chosen
        self._hold_round, _, self._hold_where = chosen.hold.partition(":")
        self._gate_round, _, self._gate_path = chosen.gate.partition(":")
        if self._hold_where == "middle":
            model.nets[1].register_full_backward_pre_hook(lambda *_: self.at("middle"))

    def at(self, where: str) -> None:
        """Come to one place of the body: ``begin``, ``middle`` of backward or its end, ``step``."""
        if where == "begin":
            self._wait()
            if str(ps.round()) == self._chosen.fail:
                raise RuntimeError(f"this script fails in round {ps.round()}, as it was told")
            time.sleep(self._chosen.sleep_ms / 1e3)
        if where == self._hold_where and ps.round() >= int(self._hold_round):
            say(f"holding in round {ps.round()}")
            signal.pause()

    def _wait(self) -> None:
        if self._gate_path and ps.round() >= int(self._gate_round):
            say(f"at the gate in round {ps.round()}")
            with open(self._gate_path, "rb"):  # noqa: PTH123 # until somebody opens it for writing
                self._gate_path = ""


def say(text: str) -> None:
    """Print at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def train(chosen: argparse.Namespace) -> None:
    """The plain loop."""
    torch.manual_seed(11)
    x = torch.randn(SAMPLES, FEATURES)
    y = (x @ torch.randn(FEATURES, CLASSES)).argmax(1)
    dataset = torch.utils.data.TensorDataset(x, y)
    model = Nets(chosen.width)
    if chosen.fail == "start":
        raise RuntimeError("this script fails at the start, as it was told")
    if chosen.lbfgs:
        ps.DistributedOptimizer(torch.optim.LBFGS(model.parameters()), model)
    first, second, third = (net.parameters() for net in model.nets)
    trained = [
        ps.DistributedOptimizer(inner, part, overlap=True)  # on any number of processors
        for inner, part in (
            (torch.optim.AdamW(first, lr=chosen.lr), model.nets[0]),
            (torch.optim.SGD(second, lr=0.05, momentum=0.9, nesterov=True), model.nets[1]),
            (torch.optim.Adagrad(third, lr=0.02), model.tail),
        )
    ]
    decay = torch.optim.lr_scheduler.ExponentialLR(trained[0], 0.97)
    loss_of = nn.CrossEntropyLoss()
    trouble = Trouble(chosen, model)
    say("ready")
    for epoch in range(chosen.epochs):
        for inputs, targets in ps.batches(dataset, batch_size=chosen.batch_size, epoch=epoch):
            task = session.current().task
            assert task is not None
            say(f"round {task.round} slot {task.slot}")
            trouble.at("begin")
            for optimizer in trained:
                optimizer.zero_grad()
            loss_of(model(inputs), targets).backward()
            trouble.at("backward")
            ps.clip_grad_norm(model.nets[0].parameters(), 0.5)
            for optimizer in trained:
                optimizer.step()
            decay.step()
            trouble.at("step")
    hashed = hashlib.sha256()
    for name, value in sorted(ps.state_dict().items()):
        hashed.update(name.encode() + value.numpy().tobytes())
    say(f"final {hashed.hexdigest()}")


if __name__ == "__main__":
    ps.init()
    train(options())
    ps.shutdown()
    for thread in threading.enumerate():
        if thread.name.startswith("treefold"):
            thread.join()  # of an embedded cluster: its server still writes the ledger
    sys.exit(0)
