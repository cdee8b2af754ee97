"""A round in which nothing happens costs nothing but its tensors, on any cluster."""

import tracemalloc

import pytest

from tests.sim.scale import Job, quiet_rounds

MODEL = 100_000_000
HEADERS_MAX = 0.001  # of the payloads
ROUNDS = 10
EDGES_MAX = 0.5 / ROUNDS  # the first and the last round are seen from the middle of an exchange
SMALL = 1_000_000  # bytes of a model that one server gives to many in no time


@pytest.mark.parametrize(("workers", "servers"), [(4, 2), (12, 2), (12, 6)])
def test_a_quiet_round_has_no_control_messages_and_moves_the_model_once_each_way(
    workers: int, servers: int
) -> None:
    figures = quiet_rounds(Job(workers, servers, MODEL, rounds=ROUNDS))
    assert figures.control == {}
    assert figures.worker_bytes == pytest.approx(2 * MODEL, rel=EDGES_MAX)
    at_server = figures.server_bytes * servers / workers
    assert at_server == pytest.approx(figures.worker_bytes, rel=HEADERS_MAX)


def test_a_slower_network_makes_rounds_slower_by_what_the_slowest_link_carries() -> None:
    fast, slow = (quiet_rounds(Job(4, 2, MODEL, rate)) for rate in (10e9, 1e9))
    longest_s = 4 * MODEL / 2 * 8 / 1e9  # what one server receives from four workers, or sends
    assert 1 / slow.rounds_per_s - 1 / fast.rounds_per_s == pytest.approx(
        2 * longest_s * 0.9, rel=0.25
    )


def test_memory_of_the_simulator_grows_as_its_members_do_and_not_as_what_all_hear_of_all() -> None:
    few, many = (_peak_bytes(Job(workers, 1, SMALL, rounds=1)) for workers in (60, 120))
    assert many < 2.5 * few


def _peak_bytes(job: Job) -> int:
    """What was in use at most while a job was simulated."""
    tracemalloc.start()
    try:
        quiet_rounds(job)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
