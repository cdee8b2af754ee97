"""The worker's side of the exchange. Users import `Client`; `treefold.torch` is built on it."""

from treefold.common.config import Settings, load
from treefold.common.spec import Dtype, OptimizerSpec, Placement, Rule, TableSpec, TensorSpec
from treefold.worker.client import Client
from treefold.worker.effects import SlotMeta
from treefold.worker.handed import LoopEnd, PartRun, Snapshot, Task
from treefold.worker.shell import Values

__all__ = [
    "Client",
    "Dtype",
    "LoopEnd",
    "OptimizerSpec",
    "PartRun",
    "Placement",
    "Rule",
    "Settings",
    "SlotMeta",
    "Snapshot",
    "TableSpec",
    "Task",
    "TensorSpec",
    "Values",
    "load",
]
