"""Bad input on real sockets, with everything in one process: each gets a clear answer."""

import pytest
import torch

from tests.support.threads import beside, thread_cluster
from treefold.common.errors import JobFailedError, SpecMismatchError
from treefold.common.plan import LoopPlan, PlanKind
from treefold.transport.request import Requester
from treefold.wire.codec import decode, encode
from treefold.wire.messages import AnyMessage, Pull, Refused
from treefold.wire.words import Code
from treefold.worker import (
    Dtype,
    OptimizerSpec,
    Placement,
    Rule,
    TableSpec,
    TensorSpec,
)

ELEMENTS = 1_000
ROUNDS = 12
ANSWER_MS = 20_000


def spec(lr: float = 0.5, elements: int = ELEMENTS) -> TableSpec:
    """One tensor, plain SGD."""
    tensor = TensorSpec("w", [elements], Dtype.FLOAT32, 0)
    optimizer = OptimizerSpec("SGD", [{"lr": lr}])
    return TableSpec("t", Rule.OPTIMIZER, Placement.ELEMENTWISE, [tensor], optimizer)


def plan(slots: int = 4, batch_size: int = 8) -> LoopPlan:
    """Some rounds of leased slots."""
    samples = ROUNDS * batch_size
    kind = PlanKind.SLOTS
    return LoopPlan(kind, 0, 0, ROUNDS, slots, samples, batch_size, 0, False, 0)


def ask(address: str, message: AnyMessage) -> AnyMessage:
    """One message to a listener, by a peer that it does not know, and the answer."""
    requester = Requester(address)
    try:
        requester.send(encode(message))
        header = requester.receive(ANSWER_MS)
    finally:
        requester.close()
    assert header is not None, "no answer"
    return decode(header)


def test_a_pass_that_differs_is_refused_with_the_difference() -> None:
    with thread_cluster(workers=2) as cluster:
        first, second = cluster.client(), cluster.client()
        begun = beside(lambda: first.declare(spec(), torch.zeros(ELEMENTS)))
        second.declare(spec(), torch.zeros(ELEMENTS))
        begun()
        first.enter_loop(plan())
        with pytest.raises(SpecMismatchError, match=r"batch_size: 8 here, 4 there"):
            second.enter_loop(plan(batch_size=4))
        with pytest.raises(SpecMismatchError, match=r"slots: 4 here, 2 there"):
            second.enter_loop(plan(slots=2))
        second.enter_loop(plan())


def test_a_hyper_parameter_that_the_optimizer_lacks_reaches_the_worker_as_an_error() -> None:
    with thread_cluster() as cluster:
        client = cluster.client()
        table = client.declare(spec(), torch.zeros(ELEMENTS)).table
        round_ = client.push(table, torch.ones(ELEMENTS), [{"lr": 0.5, "warmth": 1.0}])
        with pytest.raises(JobFailedError, match="warmth"):
            client.wait(round_)


def test_an_unknown_table_is_refused_by_name() -> None:
    with thread_cluster() as cluster:
        client = cluster.client()
        client.declare(spec(), torch.zeros(ELEMENTS))
        job = client._shell.core.membership.job  # what only a member knows
        server, view = cluster.servers[0].address, client._shell.core.view
        assert view is not None
        answer = ask(server, Pull(job, 99, view.number, 7, 0, 0, 0, []))
        assert isinstance(answer, Refused)
        assert answer.code is Code.UNKNOWN_TABLE
        assert "no shard 0 of table 7" in answer.text
        stranger = ask(server, Pull(job + 1, 99, 1, 0, 0, 0, 0, []))
        assert isinstance(stranger, Refused)
        assert stranger.code is Code.JOB_MISMATCH
