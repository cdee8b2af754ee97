"""Single stories, told on purpose: what seeds meet by chance, or too rarely, or never."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.sim.cluster import Cluster, Cores, tiny_layout
from tests.sim.network import Weather
from tests.sim.scenario import Early, Fault, Kind, Patience, Scenario, loader, passes, table
from tests.sim.trainer import Script, Trainer
from tests.sim.world import MS, SECOND, Violation
from treefold.common.errors import JobFailedError, SpecMismatchError
from treefold.scheduler import core as scheduler_core
from treefold.scheduler.core import SchedulerCore
from treefold.server import lateness
from treefold.wire.membership import Membership
from treefold.wire.words import Outcome, Phase
from treefold.worker.effects import Task

CALM = Scenario(
    seed=5,
    slots=4,
    servers=2,
    workers=2,
    tables=(table("model", [(12, 0), (4, 0)]),),
    plans=passes(4, [12], 4, 4),
    compute_ns=10 * MS,
    weather=Weather(MS // 4, MS // 4),
    patience=Patience(),
)
QUIET = ("Heartbeat", "HeartbeatSeen")
CONTROL = (
    "Register", "Registered", "Heartbeat", "HeartbeatSeen", "DeclareTable", "DeclarePlan",
    "Accepted", "View", "AssignTable", "RoundLate", "Grant", "Flush", "NormReport", "NormDecision",
    "Fenced", "Refused",
)  # fmt: skip


def run(scenario: Scenario, cores: Cores | None = None) -> Cluster:
    """Simulate a scenario to its end."""
    with tiny_layout(scenario.block_elements, scenario.part_blocks_max):
        cluster = Cluster(scenario, cores or Cores())
        cluster.run()
    return cluster


def run_until(scenario: Scenario, is_there: Callable[[Cluster], bool]) -> Cluster:
    """Simulate a scenario until something holds."""
    cluster = Cluster(scenario)
    cluster.begin()
    while not is_there(cluster):
        assert cluster.world.step(), "it never came to that"
    return cluster


def at_version(version: int) -> Callable[[Cluster], bool]:
    """Whether every shard has reached a version."""

    def is_there(cluster: Cluster) -> bool:
        found = cluster.checks.versions.values()
        return bool(found) and min(found) >= version

    return is_there


# ---- nobody is asked in a normal round -----------------------------------------------------------


def control_messages(scenario: Scenario) -> dict[str, int]:
    """Control messages of rounds 4 to 10, by kind."""
    with tiny_layout(scenario.block_elements, scenario.part_blocks_max):
        cluster = run_until(scenario, at_version(4))
        before = dict(cluster.network.kinds)
        while not at_version(10)(cluster):
            cluster.world.step()
        after = cluster.network.kinds
    found = {kind: after.get(kind, 0) - before.get(kind, 0) for kind in CONTROL}
    return {kind: count for kind, count in found.items() if count and kind not in QUIET}


def test_healthy_rounds_exchange_nothing_with_the_scheduler_but_heartbeats() -> None:
    assert control_messages(CALM) == {}


def test_rounds_that_are_called_late_too_early_are_not_quiet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lateness, "_period_ns", lambda _: MS // 10)
    assert control_messages(CALM)["RoundLate"] > 0


def test_a_limit_of_the_norm_costs_one_report_a_shard_and_one_decision_a_server() -> None:
    kinds = control_messages(replace(CALM, clip_every=1))
    shards, servers, rounds = 4, 2, 6
    assert kinds == {"NormReport": shards * rounds, "NormDecision": servers * rounds}


# ---- a job ends for everybody --------------------------------------------------------------------


@pytest.mark.parametrize("at_ms", [0, 150, 300, 420, 600])
def test_a_server_that_dies_ends_the_job_with_an_error_for_every_worker(at_ms: int) -> None:
    death = Fault(at_ms * MS, Kind.CRASH, "server-1")
    patience = replace(CALM.patience, server_dead_after_ns=3 * SECOND, form_timeout_ns=5 * SECOND)
    doomed = replace(
        CALM, faults=(death,), heal_ns=SECOND, is_doomed=True, patience=patience, compute_ns=40 * MS
    )
    cluster = run(doomed)
    ending = cluster.scheduler.scheduler.ending
    assert ending is not None
    assert ending.outcome in (Outcome.FAILED, Outcome.NOT_FORMED)
    assert all(worker.outcome is Outcome.FAILED for worker in cluster.everybody)
    assert all(worker.error is not None for worker in cluster.everybody)
    assert cluster.servers[0].halt is not None
    assert cluster.servers[0].halt.status != 0


def test_a_server_that_dies_in_training_is_named_to_every_worker() -> None:
    death = Fault(600 * MS, Kind.CRASH, "server-1")
    patience = replace(CALM.patience, server_dead_after_ns=3 * SECOND)
    doomed = replace(CALM, faults=(death,), heal_ns=SECOND, is_doomed=True, patience=patience)
    cluster = run(replace(doomed, compute_ns=40 * MS))
    texts = [str(worker.error) for worker in cluster.everybody]
    assert all(re.match(r"server-. fell silent and its 2 shards with it", text) for text in texts)
    assert all(isinstance(worker.error, JobFailedError) for worker in cluster.everybody)


def test_a_clean_job_ends_with_status_zero_everywhere() -> None:
    cluster = run(CALM)
    halts = [server.halt for server in cluster.servers] + [cluster.scheduler.halt]
    assert [halt.status for halt in halts if halt is not None] == [0, 0, 0]
    assert [worker.outcome for worker in cluster.everybody] == [Outcome.DONE] * 2
    assert all(not worker.payloads.held for worker in cluster.everybody)
    assert all(not server.payloads.held for server in cluster.servers)


# ---- processes that are stopped ------------------------------------------------------------------

STOPPED = replace(
    CALM,
    plans=passes(4, [60], 4, 4),
    compute_ns=60 * MS,
    factors=(4.0, 1.0),
    patience=replace(CALM.patience, server_dead_after_ns=6 * SECOND, unreachable_ns=6 * SECOND),
    heal_ns=14 * SECOND,
)


def stopped(name: str, for_ns: int, at_ms: int = 750) -> Scenario:
    """A process is stopped in the middle of training."""
    return replace(STOPPED, faults=(Fault(at_ms * MS, Kind.FREEZE, name, for_ns),))


def test_a_scheduler_that_was_stopped_gives_nobody_up() -> None:
    cluster = run(stopped("scheduler", 12 * SECOND))
    assert "Fenced" not in cluster.network.kinds


def test_a_scheduler_that_takes_its_own_stop_for_silence_ends_the_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SchedulerCore, "_forgive_stall", lambda *_: None)
    with pytest.raises(Violation, match=r"FAILED|while the job goes on"):
        run(stopped("scheduler", 12 * SECOND))


def test_a_worker_that_was_stopped_goes_on() -> None:
    cluster = run(stopped("worker-1", 12 * SECOND))
    assert [worker.error for worker in cluster.everybody if worker.error is not None] == []


def test_a_worker_that_takes_its_own_stop_for_silence_of_servers_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Membership, "forgive_stall", lambda *_: 0)
    moments = range(600, 1_000, 50)  # not at every one does it wait for servers
    with pytest.raises(Violation, match="while the job goes on"):
        _ = [run(stopped("worker-1", 12 * SECOND, at_ms)) for at_ms in moments]


HASTY = replace(
    CALM,
    replicas=2,
    plans=passes(4, [30], 4, 4),
    compute_ns=20 * MS,
    patience=replace(CALM.patience, heartbeat_ns=100 * MS, dead_after_ns=300 * MS),
    faults=(Fault(250 * MS, Kind.FREEZE, "scheduler", 400 * MS),),
    heal_ns=SECOND,
)


def test_a_scheduler_that_was_stopped_for_a_moment_gives_nobody_up_either() -> None:
    cluster = run(HASTY)
    assert "Fenced" not in cluster.network.kinds


def test_a_scheduler_that_judges_before_it_has_heard_everybody_gives_them_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheduler_core, "LATE_MS", 1_000)
    assert "Fenced" in run(HASTY).network.kinds


# ---- clocks that go wrong ------------------------------------------------------------------------


@pytest.mark.parametrize("ppm", [1, 200, 50_000])
def test_what_clocks_show_changes_nothing_but_when_things_happen(ppm: int) -> None:
    cluster = run(replace(STOPPED, skew_ppm=ppm))
    assert [worker.outcome for worker in cluster.everybody] == [Outcome.DONE] * 2
    assert "Fenced" not in cluster.network.kinds


def test_a_worker_whose_machine_was_suspended_goes_on() -> None:
    fault = Fault(750 * MS, Kind.SUSPEND, "worker-1", 12 * SECOND)
    cluster = run(replace(STOPPED, faults=(fault,), skew_ppm=200))
    assert [worker.error for worker in cluster.everybody if worker.error is not None] == []


# ---- workers that come, go, and stand by ---------------------------------------------------------


def test_a_worker_without_a_slot_takes_over_where_one_dies() -> None:
    standby = replace(
        CALM,
        slots=1,
        plans=passes(1, [20], 1, 1),
        compute_ns=50 * MS,
        faults=(Fault(700 * MS, Kind.CRASH, "worker-1"), Fault(700 * MS, Kind.CRASH, "worker-2")),
        workers=3,
        starts_ns=(0, 0, 0),
        factors=(1.0, 1.0, 1.0),
        heal_ns=SECOND,
    )
    cluster = run(standby)
    assert cluster.workers["worker-0"].outcome is Outcome.DONE


def test_a_late_joiner_gets_slots_of_its_own() -> None:
    late = replace(
        CALM, plans=passes(4, [60], 4, 4), starts_ns=(0, 0, 900 * MS), factors=(1.0, 1.0, 1.0)
    )
    cluster = run(late)
    trainer = cluster.workers["worker-2"].trainer
    assert trainer is not None
    assert trainer.tasks > 0


def test_a_drained_worker_leaves_the_rest_to_others() -> None:
    drained = replace(
        CALM, faults=(Fault(500 * MS, Kind.DRAIN, "worker-1"),), heal_ns=SECOND, compute_ns=30 * MS
    )
    cluster = run(drained)
    outcomes = [worker.outcome for worker in cluster.workers.values()]
    assert outcomes == [Outcome.DONE, Outcome.DRAINED]


def test_who_was_given_up_while_it_finished_still_says_that_the_job_is_done() -> None:
    cut = Fault(450 * MS, Kind.PARTITION, "worker-0", 1_500 * MS, "scheduler")
    patience = replace(CALM.patience, heartbeat_ns=100 * MS, dead_after_ns=200 * MS)
    alone = replace(
        CALM, workers=1, starts_ns=(0,), factors=(1.0,), faults=(cut,), heal_ns=2 * SECOND,
        weather=replace(CALM.weather, is_reliable=False), patience=patience, compute_ns=12 * MS,
    )  # fmt: skip
    cluster = run(alone)
    assert cluster.scheduler.scheduler.phase is Phase.ENDED
    assert cluster.report().outcome is Outcome.DONE


class Different(Trainer):
    """Worker 1 runs another script than the others, and comes second."""

    def _run(self) -> Script:
        if self.process.name == "worker-1":
            yield 500 * MS
            other = table("model", [(12, 0), (4, 1)])
            self.scenario = replace(self.scenario, tables=(other,))
        yield from super()._run()


def test_a_worker_with_another_script_is_refused_and_the_others_go_on() -> None:
    cluster = run(replace(CALM, is_doomed=True), Cores(trainer=Different))
    failed = [worker for worker in cluster.everybody if worker.outcome is Outcome.FAILED]
    assert len(failed) == 1
    assert isinstance(failed[0].error, SpecMismatchError)
    assert "tensors[1].group" in str(failed[0].error)
    assert cluster.report().outcome is Outcome.DONE


class Lingering(Trainer):
    """A script that does something else after a step: the first one that computes a slot 0."""

    def _linger(self, task: Task) -> int:
        computed = [(r, s) for _, r, s in self.process.checks.computed if (r, s) == (3, 0)]
        return 30 * SECOND if (task.round, task.slot) == (3, 0) and len(computed) == 1 else 0


@pytest.mark.parametrize("clip_every", [0, 1])
def test_a_worker_that_lingers_after_its_step_does_not_keep_the_others(clip_every: int) -> None:
    plans = passes(2, [12], 2, 2)
    lingering = replace(CALM, slots=2, plans=plans, clip_every=clip_every, early=Early.STEP)
    with tiny_layout(CALM.block_elements, CALM.part_blocks_max):
        cluster = Cluster(lingering, Cores(trainer=Lingering))
        cluster.begin()
        while not at_version(12)(cluster):
            assert cluster.world.step(), "it never came to that"
    assert cluster.world.now_ns < 10 * SECOND


# ---- workers with loaders of their own -----------------------------------------------------------

LOADERS = replace(CALM, slots=2, plans=loader(2), loader_rounds=6)


def test_own_loaders_of_one_length_end_together() -> None:
    assert run(LOADERS).report().outcome is Outcome.DONE


def test_an_own_loader_that_is_longer_ends_the_job_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = Trainer._loader

    def longer(self: Trainer) -> Script:
        if self.process.name == "worker-1":
            self.scenario = replace(self.scenario, loader_rounds=8)
        yield from script(self)

    monkeypatch.setattr(Trainer, "_loader", longer)
    cluster = run(replace(LOADERS, is_doomed=True))
    text = str(cluster.workers["worker-1"].error)
    assert re.match(r"round 6 lacks slot (.) of worker-\1, which is done", text)


# ---- what a worker must not do -------------------------------------------------------------------


class Pausing(Trainer):
    """A script that does something else for a while between its passes."""

    def _passes(self) -> Script:
        for at, plan in enumerate(self.scenario.plans):
            yield 90 * SECOND if at else 0
            yield from self._pass(plan)


def test_a_script_that_pauses_longer_than_it_waits_for_servers_goes_on() -> None:
    plans, late = passes(4, [3, 3], 4, 4), Weather(100 * MS, 0)
    pausing = replace(CALM, plans=plans, weather=late, heal_ns=100 * SECOND)
    cluster = run(pausing, Cores(trainer=Pausing))
    assert [worker.outcome for worker in cluster.everybody] == [Outcome.DONE] * 2
