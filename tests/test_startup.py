"""What a process imports before it can work: torch takes seconds, and its compiler as long again.

Every check runs in an interpreter of its own, and is tried on something that does import it.
"""

import subprocess
import sys

import pytest

HEAVY = ("numpy", "sympy", "torch", "torch._dynamo", "prometheus_client")

# A command imports the module of its own name, and the shell of what it becomes only when it is
# sure that it will run.
COMMANDS = {
    "checkpoint": ["treefold.cli.checkpoint", "treefold.checkpoint.manifest"],
    "config": ["treefold.cli.config"],
    "render": ["treefold.cli.render"],
    "run": ["treefold.cli.run"],
    "scheduler": ["treefold.cli.scheduler", "treefold.scheduler.shell"],
    "status": ["treefold.cli.status"],
    "worker": ["treefold.cli.worker"],
}

TRAINING = """
import torch
import treefold.torch as ps

ps.init()
model = torch.nn.Linear(4, 2)
inner = torch.optim.AdamW(model.parameters(), lr=0.1)
schedule = torch.optim.lr_scheduler.StepLR(inner, 1)
optimizer = ps.DistributedOptimizer(inner, model)
samples = torch.utils.data.TensorDataset(torch.ones(16, 4), torch.ones(16, 2))
for x, y in ps.batches(samples, batch_size=16, epoch=0):
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    ps.clip_grad_norm(model.parameters(), 1.0)
    optimizer.step()
schedule.step()
ps.shutdown()
"""

STEPS = """
import torch
from treefold.common.optim import ELEMENTWISE, TENSORWISE, spare_compiler
from treefold.server.optimizers import step

spare_compiler()
for name, kind in {**ELEMENTWISE, **TENSORWISE}.items():
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    gradient = torch.eye(2)
    parameter.grad = gradient.to_sparse() if name == "SparseAdam" else gradient
    optimizer = kind([parameter])
    step(optimizer)
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    assert not torch.equal(parameter, torch.ones(2, 2)), name
"""

PLAIN_STEP = """
import torch

parameter = torch.nn.Parameter(torch.ones(2))
parameter.grad = torch.ones(2)
torch.optim.SGD([parameter]).step()
"""

COMPILED = """
import torch
from treefold.common.optim import spare_compiler

spare_compiler()
parameter = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.SGD([parameter], lr=1.0)

@torch.compile(backend="eager")
def train(x):
    optimizer.zero_grad()
    return (x * parameter).sum()

for _ in range(2):
    train(torch.ones(2)).backward()
    optimizer.step()
assert parameter.tolist() == [-1.0, -1.0]
mark = torch.optim.Optimizer.zero_grad.__wrapped__.__dynamo_disable
assert mark.__module__ != spare_compiler.__module__
"""


def imported(code: str, names: tuple[str, ...] = HEAVY) -> list[str]:
    """Which of some modules are there after an interpreter has run some code."""
    asked = f"{code}\nimport sys\nprint(*[name for name in {names!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def imports(modules: list[str]) -> str:
    """Code that imports modules."""
    return "\n".join(f"import {module}" for module in modules)


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_heavy_is_imported_by_the_command(command: str) -> None:
    assert imported(imports(["treefold.cli.main", *COMMANDS[command]])) == []


def test_the_command_that_computes_is_seen_to_import_torch() -> None:
    assert "torch" in imported(imports(["treefold.cli.server", "treefold.server.shell"]))


def test_a_worker_does_not_import_the_scheduler_and_the_server() -> None:
    roles = ("treefold.scheduler.core", "treefold.server.core", "treefold.worker.core")
    assert imported("import treefold.torch", roles) == ["treefold.worker.core"]


def test_training_does_not_import_torchs_compiler() -> None:
    assert imported(TRAINING) == ["numpy", "torch"]


def test_no_thread_outlives_the_end_of_a_script() -> None:
    """A thread that is in torch when the interpreter ends aborts the process."""
    left = "import threading\nassert threading.enumerate() == [threading.main_thread()]"
    slow = """
import time
from treefold.server.shell import ServerShell

run = ServerShell.run

def run_and_linger(shell):
    status = run(shell)
    time.sleep(0.3)
    return status

ServerShell.run = run_and_linger
"""
    imported(f"{slow}\n{TRAINING}\n{left}")


def test_no_optimizers_step_on_a_server_imports_torchs_compiler() -> None:
    assert imported(STEPS) == ["numpy", "torch"]


def test_a_plain_step_is_seen_to_import_torchs_compiler() -> None:
    assert "torch._dynamo" in imported(PLAIN_STEP)


def test_who_compiles_gets_torchs_own_way_back() -> None:
    assert "torch._dynamo" in imported(COMPILED)
