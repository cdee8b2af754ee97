"""Connections that are closed for what they brought come back, and training does not notice."""

import torch

from tests.support.threads import ThreadCluster, thread_cluster
from treefold.transport.sockets import Hub
from treefold.worker import Dtype, OptimizerSpec, Placement, Rule, TableSpec, TensorSpec

ELEMENTS, ROUNDS = 1_000, 5


def spec() -> TableSpec:
    """One tensor, plain SGD."""
    tensor = TensorSpec("w", [ELEMENTS], Dtype.FLOAT32, 0)
    optimizer = OptimizerSpec("SGD", [{"lr": 0.5}])
    return TableSpec("t", Rule.OPTIMIZER, Placement.ELEMENTWISE, [tensor], optimizer)


def hubs(cluster: ThreadCluster) -> list[Hub]:
    """The sockets of scheduler and servers."""
    return [cluster.scheduler._hub, *(server._hub for server in cluster.servers)]


def end_all(cluster: ThreadCluster) -> None:
    """Close every connection to a listener that has brought a message."""
    for hub in hubs(cluster):
        [meter] = hub._meters.values()
        for connection in list(meter.senders.values()):
            meter.end(connection, "a test")


def test_a_job_goes_on_while_its_connections_are_closed_in_every_round() -> None:
    with thread_cluster() as cluster:
        client = cluster.client()
        table = client.declare(spec(), torch.zeros(ELEMENTS)).table
        for _ in range(ROUNDS):
            round_ = client.push(table, torch.ones(ELEMENTS), [{"lr": 0.5}])
            end_all(cluster)
            client.wait(round_)
        assert torch.equal(client.pull(table), torch.full((ELEMENTS,), -0.5 * ROUNDS))
        assert all(hub.traffic.cut >= ROUNDS - 1 for hub in hubs(cluster))
