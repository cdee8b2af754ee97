"""Five processes in network namespaces, and every pair of them cut off from each other.

Scheduler, two servers that both hold every shard, two workers, over TCP, with the settings that a
user gets. Gradients are whole numbers, so that one that was lost or counted twice shows. What is
checked of every cut, and what is only measured, says `tests.support.partitions`.

All pairs both ways and one way for 1 s, a chosen few for 10 and 40 s; with ``--partitions=full``
all pairs for all times, which takes half an hour. Where there can be no namespaces nothing is run,
and the last lines of the report say so.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest

from tests.support import netns
from tests.support.partitions import (
    GRACE,
    SCHEDULER,
    SERVERS,
    WORKERS,
    Cut,
    Partitioned,
    Path_,
    Slow,
    partitioned,
    report,
)
from tests.support.processes import Cluster

MakeCluster = Callable[..., Cluster]
Paths = list[Path_]
Plan = list[tuple[Paths, float]]
Scene = Callable[[Partitioned], None]
SHORT_S, LONGER_S, LONG_S = 1, 10, 40

pytestmark = pytest.mark.skipif(
    bool(netns.available()),
    reason=f"NOT RUN: cutting networks needs network namespaces, and {netns.available()}",
)


def both(one: int, other: int) -> Paths:
    """A pair cut both ways."""
    return [(one, other), (other, one)]


PAIRS = list(combinations(range(5), 2))
WAYS = {pair: [both(*pair), [pair], [pair[::-1]]] for pair in PAIRS}
SHORT: Plan = [(paths, SHORT_S) for ways in WAYS.values() for paths in ways]
FULL: dict[str, Plan] = {
    f"{pair[0]}-{pair[1]}": [
        (paths, seconds) for seconds in (SHORT_S, LONGER_S, LONG_S) for paths in ways
    ]
    for pair, ways in WAYS.items()
}
CHOSEN = [
    both(*SERVERS),
    both(SCHEDULER, SERVERS[0]),
    both(SCHEDULER, WORKERS[0]),
    both(WORKERS[0], SERVERS[0]),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All scenes at once, since they mostly wait; or one by one if each of them takes minutes."""
    if "scenes" in metafunc.fixturenames:
        is_full = metafunc.config.getoption("--partitions") == "full"
        all_at_once = [*halves(SHORT), *[partial(cut_twice, paths=paths) for paths in CHOSEN]]
        together = {"all at once": [*all_at_once, leave_a_primary_alone_twice]}
        alone: dict[str, list[Scene]] = {name: [partial(cut_all, plan=FULL[name])] for name in FULL}
        chosen = alone | {"alone": [leave_a_primary_alone_twice]} if is_full else together
        metafunc.parametrize("scenes", chosen.values(), ids=list(chosen))


@pytest.fixture(scope="module")
def cuts(measured: list[str]) -> Iterator[list[Cut]]:
    """All cuts of this module, of which the report tells at the end."""
    found: list[Cut] = []
    yield found
    times = sorted({cut.seconds for cut in found})
    measured += [report([cut for cut in found if cut.seconds == time]) for time in times]


def test_whatever_is_cut_nothing_is_lost_and_who_is_alone_publishes_nothing(
    cluster: MakeCluster, tmp_path: Path, cuts: list[Cut], scenes: list[Scene]
) -> None:
    """Each scene in a cluster of its own."""
    with ExitStack() as stack:
        jobs = [
            stack.enter_context(partitioned(cluster, tmp_path / f"job-{number}"))
            for number in range(len(scenes))
        ]
        with ThreadPoolExecutor(len(jobs)) as threads:
            done = [threads.submit(scene, job) for scene, job in zip(scenes, jobs, strict=True)]
            for one in done:
                one.result()
        cuts += [cut for made in jobs for cut in made.cuts]


def cut_all(made: Partitioned, plan: Plan) -> None:
    """One cut after the other."""
    for paths, seconds in plan:
        check(made.cut(paths, seconds), paths)
    made.finish()


def cut_twice(made: Partitioned, paths: Paths) -> None:
    """For both of the longer times."""
    cut_all(made, [(paths, LONGER_S), (paths, LONG_S)])


def leave_a_primary_alone_twice(made: Partitioned) -> None:
    """Cut a primary off from its backup and the scheduler, but not from the workers."""
    for seconds in (LONGER_S, LONG_S):
        alone = made.leader()
        other = next(host for host in SERVERS if host != alone)
        cut = made.cut([*both(alone, other), *both(alone, SCHEDULER)], seconds)
        assert cut.published(alone) <= GRACE
        assert cut.newest > GRACE, "the other side did not go on"
    made.finish()


def halves(plan: Plan) -> list[Scene]:
    """The same cuts in two clusters."""
    return [partial(cut_all, plan=plan[::2]), partial(cut_all, plan=plan[1::2])]


def check(cut: Cut, paths: Paths) -> None:
    """Nobody publishes what its backup has not, and nobody promotes one who is needed."""
    if set(paths[0]) == set(SERVERS):
        assert max(cut.published(host) for host in SERVERS) <= GRACE, cut.name


def test_a_primary_that_did_not_ask_its_backup_would_be_noticed(
    cluster: MakeCluster, tmp_path: Path
) -> None:
    faults = {"server": ["lonely_primary"]}
    with partitioned(cluster, tmp_path / "job", faults=faults) as made:
        cut = made.cut(both(*SERVERS), SHORT_S)
        assert max(cut.published(host) for host in SERVERS) > GRACE


def test_a_connection_that_delivers_nothing_is_made_anew(
    cluster: MakeCluster, tmp_path: Path
) -> None:
    with partitioned(cluster, tmp_path / "job") as made:
        made.network.cut_both(WORKERS[0], SERVERS[0])
        made.become_disconnected(WORKERS[0], SERVERS[0])
        made.network.heal_both(WORKERS[0], SERVERS[0])
        made.go_on()
        made.finish()


@pytest.mark.skipif(
    bool(netns.can_be_slow()),
    reason=f"NOT RUN: slow networks need TAP devices, and {netns.can_be_slow()}",
)
@pytest.mark.parametrize("host", [SERVERS[0], WORKERS[0]])
def test_a_host_behind_a_slow_and_lossy_network_changes_no_bit(
    cluster: MakeCluster, tmp_path: Path, host: int
) -> None:
    with partitioned(cluster, tmp_path / "job", Slow(host, 5.0, 0.01)) as made:
        made.cut(both(host, SCHEDULER), SHORT_S)
        made.finish()
