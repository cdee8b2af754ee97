"""Small checkpoints whose files have any bytes in them: the store does not look into them.

Without torch, so that processes which are killed start soon.
"""

import hashlib
import random

from treefold.checkpoint.manifest import FileEntry, Manifest, TableEntry
from treefold.checkpoint.store import Store
from treefold.common.layout import BLOCK_ELEMENTS
from treefold.common.plan import LoopPlan, PlanKind
from treefold.common.spec import (
    Dtype,
    OptimizerSpec,
    Placement,
    Rule,
    TableSpec,
    TensorSpec,
)

TRAINED = TableSpec(
    "model",
    Rule.OPTIMIZER,
    Placement.ELEMENTWISE,
    [TensorSpec("weight", [3, BLOCK_ELEMENTS], Dtype.FLOAT32, 0)],
    OptimizerSpec("SGD", [{"lr": 0.1, "nesterov": False, "dampening": 0.0, "foreach": None}]),
)
FROZEN = TableSpec(
    "model.frozen",
    Rule.CONSTANT,
    Placement.ELEMENTWISE,
    [TensorSpec("table", [BLOCK_ELEMENTS], Dtype.FLOAT32, 0)],
    None,
)
PLAN = LoopPlan(PlanKind.SLOTS, 0, 0, 4, 8, 40, 10, 0, shuffle=True, seed=3)


def write(store: Store, path: str, data: bytes) -> None:
    """Write a file in two steps."""
    with store.create(path) as stream:
        stream.write(data[: len(data) // 2])
        stream.write(data[len(data) // 2 :])


def file(store: Store, path: str, blocks: tuple[int, int], job: int = 1) -> FileEntry:
    """A file whose bytes depend on its name and job alone."""
    data = random.Random(f"{path} of job {job}").randbytes(150 + 10 * blocks[0])
    write(store, path, data)
    return FileEntry(path, *blocks, len(data), hashlib.sha256(data).hexdigest())


def frozen(store: Store, job: int = 1) -> TableEntry:
    """A table without rounds, written once."""
    path = f"00000000/t1.model.frozen-0-{job}.safetensors"
    return TableEntry(1, FROZEN, b"", 0, b"", None, [file(store, path, (0, 1), job)])


def trained(store: Store, version: int, job: int = 1) -> TableEntry:
    """A table of two shards at one version."""
    files = [
        file(store, f"{version:08d}/t0.model-{shard}-{job}.safetensors", blocks, job)
        for shard, blocks in enumerate([(0, 2), (2, 1)])
    ]
    return TableEntry(0, TRAINED, b"\x00record", version, b"state\xff", 2.5, files)


def manifest_of(version: int, *tables: TableEntry, job: int = 1) -> Manifest:
    """A manifest of these tables."""
    return Manifest(
        job=job,
        version=version,
        view=4,
        slots=8,
        seed=-5,
        package="0.1.0",
        created="2026-11-27T03:00:00+00:00",
        plans=[PLAN],
        tables=list(tables),
    )


def save(store: Store, version: int, constant: TableEntry, job: int = 1) -> Manifest:
    """Write the files of a checkpoint and let it count."""
    manifest = manifest_of(version, trained(store, version, job), constant, job=job)
    store.commit(manifest)
    return manifest
