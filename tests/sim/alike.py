"""Scripts that read asynchronous tables, with the same in all of their shards.

They do so between passes, and without synchronous tables also before a loop body, when others are
busy: scripts that use torch may not, since it is hardly what somebody wants there.
"""

import random
from collections.abc import Sequence

from tests.sim.contributions import Contributions
from tests.sim.scenario import Scenario
from tests.sim.worker import Found
from tests.sim.world import Violation

SHARE = 0.2  # of passes and loop bodies have such a read, in a third of the seeds


def is_read(job: Scenario, name: str, round_: int, *, is_between: bool) -> bool:
    """Whether a worker reads after a pass, or before a loop body of a round."""
    if not job.is_asynchronous or random.Random(f"alike {job.seed}").random() > 1 / 3:
        return False
    if not is_between and not all(one.is_asynchronous or not one.optimizer for one in job.tables):
        return False
    return random.Random(f"alike {job.seed} {name} {round_}").random() < SHARE


def check_alike(checks: Contributions, view: int, found: Sequence[Found]) -> None:
    """What was read of each shard is a version, and all of them have the same contributions."""
    known: list[list[int]] = []
    for one in found:
        values = [memory.value for memory in one.memories]
        versions = checks.on_snapshot(view, one.snapshot, one.parts, values)
        for shard, version in versions.items():
            history = checks.histories.get((one.snapshot.table, shard), [])
            clocks = list(history[version - 1].clocks) if version else []
            while clocks and not clocks[-1]:
                clocks.pop()
            known.append(clocks)
    if any(clocks != known[0] for clocks in known):
        raise Violation(f"shards are read with {known} in them")
