"""Train a PyTorch model on a parameter server.

The script is a plain loop::

    import treefold.torch as ps

    ps.init()
    optimizer = ps.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model)
    for epoch in range(epochs):
        for x, y in ps.batches(dataset, batch_size=512, epoch=epoch):
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()

The loop body runs once per slot that falls to this worker. Parameters change between rounds, never
within a body. The same script runs alone, with an embedded cluster.
"""

from treefold.torch.health import CenteredClipping, Health, Krum, TrimmedMean
from treefold.torch.loop import Batches, batches
from treefold.torch.optimizer import DistributedOptimizer, clip_grad_norm
from treefold.torch.options import DCASGD, SSP, Async, Quorum
from treefold.torch.saving import save, state_dict
from treefold.torch.session import init, is_chief, log, rank, shutdown, size
from treefold.torch.session import round_number as round  # noqa: A004 # ps.round() reads as it is
from treefold.torch.shards import DataShard, DataShards, data_shards

__all__ = [
    "DCASGD",
    "SSP",
    "Async",
    "Batches",
    "CenteredClipping",
    "DataShard",
    "DataShards",
    "DistributedOptimizer",
    "Health",
    "Krum",
    "Quorum",
    "TrimmedMean",
    "batches",
    "clip_grad_norm",
    "data_shards",
    "init",
    "is_chief",
    "log",
    "rank",
    "round",
    "save",
    "shutdown",
    "size",
    "state_dict",
]
